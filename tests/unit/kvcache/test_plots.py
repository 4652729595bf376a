"""Plots are well-formed SVG whose points lie where their values say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.plots import HEIGHT, LEFT, RIGHT, WIDTH, plot

SVG = "{http://www.w3.org/2000/svg}"
VALUES = st.floats(1e-3, 1e6)


@settings(max_examples=40)
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


def test_a_logarithmic_axis_is_no_longer_than_what_it_shows_and_has_marks() -> None:
    root = ET.fromstring(plot("t", "x", "y", {"a": [(3.0, 0.5), (40.0, 0.9)]}, log_x=True, log_y=True))
    (line,) = root.findall(f"{SVG}polyline")
    places = [float(pair.split(",")[0]) for pair in line.attrib["points"].split()]
    assert places[1] - places[0] > 0.9 * (WIDTH - LEFT - RIGHT)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"5", "10", "20"} <= set(texts)


def test_lines_that_lie_on_each_other_are_all_seen() -> None:
    same = [(1.0, 1.0), (2.0, 2.0)]
    root = ET.fromstring(plot("t", "x", "y", {"first": same, "second": same}))
    below, above = root.findall(f"{SVG}polyline")
    assert "stroke-dasharray" not in below.attrib
    assert "stroke-dasharray" in above.attrib
    assert float(below.attrib["stroke-width"]) > float(above.attrib["stroke-width"])


def test_larger_values_lie_further_right_and_higher() -> None:
    root = ET.fromstring(
        plot("t", "x", "y", {"a": [(1, 1), (10, 100), (100, 10)]}, as_points=True, log_x=True, log_y=True)
    )
    low, high, middle = ((float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.findall(f"{SVG}circle"))
    assert low[0] < high[0] < middle[0]
    assert high[1] < middle[1] < low[1]
    assert high[0] - low[0] == pytest.approx(middle[0] - high[0], abs=0.2), "equal factors are equal steps"
