"""The table of faults names tests that exist, and leaves no row without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
FAULTS = (TESTS.parent / "docs" / "FAULTS.md").read_text("utf-8")


def names_in(path: str) -> set[str]:
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_test_that_is_named_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", FAULTS)
    assert len(named) == FAULTS.count("::"), "each reference is a path and a name between backquotes"
    known = {path: names_in(path) for path in {path for path, _ in named}}
    assert [(path, test) for path, test in named if test not in known[path]] == []


def test_no_row_is_missing_or_without_a_test() -> None:
    rows = [row for row in FAULTS.splitlines() if re.match(r"\| G?\d+ \|", row)]
    assert [row for row in rows if "::" not in row] == []
    numbers = [row.split("|")[1].strip() for row in rows]
    assert numbers == [*(f"G{number}" for number in range(1, 20)), *map(str, range(1, 52))]
