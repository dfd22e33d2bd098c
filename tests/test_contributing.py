"""CONTRIBUTING.md has each fault that is planted, and the harnesses whose tests find it."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support import planted, planted_parts

TESTS = Path(__file__).parent
DOCUMENT = (TESTS.parent / "CONTRIBUTING.md").read_text()
HARNESSES = dict(re.findall(r"^- (.+):\n((?:  `.+::test_.+`,?\n)+)", DOCUMENT, re.MULTILINE))
"""The lines of each that name its tests."""
FOUND_BY = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCUMENT, re.MULTILINE))

PLANTED = {
    name
    for module in (planted, planted_parts)
    for name, thing in vars(module).items()
    if inspect.isfunction(thing) and thing.__module__ == module.__name__ and name[0] != "_"
}


@cache
def finds(harness: str) -> set[str]:
    """The faults that its tests name."""
    named = set()
    for file, test in re.findall(r"`(.+)::(test_\w+)`", HARNESSES[harness]):
        source = (TESTS / file).read_text()
        (function,) = (
            each
            for each in ast.parse(source).body
            if isinstance(each, ast.FunctionDef) and each.name == test
        )
        first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
        text = "\n".join(source.splitlines()[first - 1 : function.end_lineno])
        named |= PLANTED & set(re.findall(r"\w+", text))
    return named


def test_each_harness_is_described_and_has_its_tests() -> None:
    assert re.findall(r"^\| ([^|`]+) \| .+ \| .+ \|$", DOCUMENT, re.MULTILINE)[1:] == [*HARNESSES]


def test_each_planted_fault_has_its_row() -> None:
    assert sorted(FOUND_BY) == sorted(PLANTED)


@pytest.mark.parametrize("fault", sorted(PLANTED))
def test_a_fault_is_found_where_it_is_said_to_be(fault: str) -> None:
    there = [harness for harness in HARNESSES if fault in finds(harness)]
    assert FOUND_BY[fault].split(", ") == there
