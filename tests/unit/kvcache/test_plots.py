"""Plots are well-formed SVG whose points lie where their values say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.plots import HEIGHT, WIDTH, plot

SVG = "{http://www.w3.org/2000/svg}"
VALUES = st.floats(1e-3, 1e6)


@given(
    lines=st.dictionaries(st.text(max_size=8), st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=5), min_size=1),
    logarithmic=st.booleans(),
)
def test_whatever_is_drawn_stays_inside_and_is_well_formed(
    lines: dict[str, list[tuple[float, float]]], logarithmic: bool
) -> None:
    printable = {re.sub(r"[^ -~]", "?", name): line for name, line in lines.items()}
    root = ET.fromstring(plot("a < b & c", "x", "y", printable, as_points=True, log_x=logarithmic, log_y=logarithmic))
    circles = root.findall(f"{SVG}circle")
    assert len(circles) == sum(map(len, printable.values()))
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= WIDTH
        assert 0 <= float(circle.attrib["cy"]) <= HEIGHT


def test_larger_values_lie_further_right_and_higher() -> None:
    root = ET.fromstring(
        plot("t", "x", "y", {"a": [(1, 1), (10, 100), (100, 10)]}, as_points=True, log_x=True, log_y=True)
    )
    low, high, middle = ((float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.findall(f"{SVG}circle"))
    assert low[0] < high[0] < middle[0]
    assert high[1] < middle[1] < low[1]
    assert high[0] - low[0] == pytest.approx(middle[0] - high[0], abs=0.2), "equal factors are equal steps"
