"""Intervals are a set of offsets, whatever is added and discarded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.durable.intervals import Intervals, Range

RANGES = st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda r: (r[0], r[0] + r[1]))


def offsets(ranges: list[Range]) -> set[int]:
    return {offset for first, end in ranges for offset in range(first, end)}


@given(st.lists(st.tuples(st.booleans(), RANGES)), RANGES, st.integers(1, 5))
def test_a_set_of_ranges_is_the_set_of_their_offsets(
    steps: list[tuple[bool, Range]], asked: Range, most: int
) -> None:
    intervals, model = Intervals(), set[int]()
    for adds, (first, end) in steps:
        if adds:
            intervals.add(first, end)
            model |= set(range(first, end))
        else:
            intervals.discard(first, end)
            model -= set(range(first, end))
    assert offsets(list(intervals)) == model
    assert bool(intervals) == bool(model)
    assert {offset for offset in range(50) if offset in intervals} == model
    assert offsets(intervals.missing_in(*asked)) == set(range(*asked)) - model
    assert intervals.missing_from(asked[0]) == min(set(range(asked[0], 99)) - model)
    assert intervals.count(most) == min(most, len(model))
    if model:
        assert intervals.first == min(model)
    ranges = list(intervals)
    assert len(intervals) == len(ranges)
    assert intervals.take(most) == ranges[:most]
    assert list(intervals) == ranges[most:]


@given(st.lists(RANGES))
def test_ranges_are_ascending_and_never_touch(ranges: list[Range]) -> None:
    bounds = [bound for one in Intervals(ranges) for bound in one]
    assert bounds == sorted(set(bounds))


@given(st.lists(RANGES), RANGES)
def test_what_is_missing_is_told_in_as_few_ranges_as_there_are_holes(
    ranges: list[Range], asked: Range
) -> None:
    bounds = [bound for one in Intervals(ranges).missing_in(*asked) for bound in one]
    assert bounds == sorted(set(bounds))


@given(st.lists(RANGES), st.lists(st.integers(1, 6), min_size=1))
def test_the_low_end_comes_out_first_and_only_as_much_as_wanted(
    ranges: list[Range], sizes: list[int]
) -> None:
    intervals, model = Intervals(ranges), offsets(ranges)
    while intervals:
        most = sizes[len(model) % len(sizes)]
        first, end = intervals.pop(most)
        assert first == min(model)
        assert 1 <= end - first <= most
        assert end - first == most or end not in model
        assert set(range(first, end)) <= model
        model -= set(range(first, end))
        assert offsets(list(intervals)) == model
    assert not model


def test_neighbours_become_one_range() -> None:
    intervals = Intervals([(0, 5), (10, 15), (5, 10)])
    assert list(intervals) == [(0, 15)]


@pytest.mark.parametrize("change", [Intervals.add, Intervals.discard])
def test_an_empty_range_changes_nothing(change: object) -> None:
    intervals = Intervals([(0, 5), (10, 15)])
    for first, end in [(3, 3), (7, 7), (12, 8)]:
        assert callable(change)
        change(intervals, first, end)
    assert list(intervals) == [(0, 5), (10, 15)]
