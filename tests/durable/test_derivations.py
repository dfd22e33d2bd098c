"""Derived appends: an input is turned into each of its outputs once, whenever it comes again."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.durable.dedup_ids import Original
from mesh.durable.derivations import (
    OFFSET_END,
    Derivations,
    DerivedOutputs,
    DerivedSomewhere,
    Inputs,
    TooOld,
)
from mesh.errors import InvalidOption

SOURCE = 0xFEED


@pytest.fixture
def forgotten() -> Counter[str]:
    return Counter()


@pytest.fixture
def derivations(forgotten: Counter[str]) -> Derivations:
    return Derivations(forgotten)


def test_a_repeat_names_the_original(derivations: Derivations) -> None:
    assert derivations.seen(SOURCE, 5) is None
    derivations.add(SOURCE, 5, 0, 77, 1000)
    assert derivations.seen(SOURCE, 5) == Original(77, 1000)
    assert derivations.seen(SOURCE, 4) is None
    assert derivations.seen(SOURCE, 6) is None


def test_sources_and_outputs_are_apart(derivations: Derivations) -> None:
    derivations.add(SOURCE, 5, 0, 77, 1000)
    assert derivations.seen(SOURCE, 5, 1) is None
    assert derivations.seen(SOURCE + 1, 5, 0) is None
    derivations.add(SOURCE, 5, 1, 78, 1000)
    derivations.add(SOURCE + 1, 5, 0, 79, 1000)
    assert derivations.seen(SOURCE, 5, 0) == Original(77, 1000)
    assert derivations.seen(SOURCE, 5, 1) == Original(78, 1000)
    assert derivations.seen(SOURCE + 1, 5, 0) == Original(79, 1000)


@pytest.mark.slow
def test_a_repeat_is_known_after_all_that_followed_which_take_one_interval(
    derivations: Derivations,
) -> None:
    for offset in range(100_000):
        derivations.add(SOURCE, offset, 0, offset, 1000)
    assert derivations.intervals == 1
    assert derivations.seen(SOURCE, 0) == DerivedSomewhere()
    assert derivations.seen(SOURCE, 99_999) == Original(99_999, 1000)
    assert derivations.seen(SOURCE, 100_000) is None


def test_only_the_latest_are_known_with_their_place(
    derivations: Derivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DERIVED_LATEST_MAX", 3)
    for offset in range(5):
        derivations.add(SOURCE, offset, 0, offset + 10, 1000)
    seen = [derivations.seen(SOURCE, offset) for offset in range(6)]
    assert seen[:2] == [DerivedSomewhere(), DerivedSomewhere()]
    assert seen[2:5] == [Original(offset + 10, 1000) for offset in (2, 3, 4)]
    assert seen[5] is None
    assert len(derivations.latest()) == 3


GROUP_WINDOW = 65_536
"""Offsets that a group looks at beyond what is settled."""


@pytest.mark.slow
def test_a_group_s_whole_window_is_known_though_every_other_input_has_no_output(
    derivations: Derivations,
) -> None:
    end = 3 * GROUP_WINDOW
    for offset in range(0, end, 2):
        derivations.add(SOURCE, offset, 0, offset, 1000)
        lowest = max(0, offset - GROUP_WINDOW + 2)
        assert isinstance(derivations.seen(SOURCE, lowest), Original | DerivedSomewhere)
    for offset in range(end - GROUP_WINDOW, end):
        seen = derivations.seen(SOURCE, offset)
        assert (seen is None) == (offset % 2 == 1), offset
    assert derivations.intervals <= limits.DERIVED_INTERVALS_EACH


def test_what_is_below_the_floor_is_neither_new_nor_a_repeat(
    derivations: Derivations, forgotten: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DERIVED_INTERVALS_KEPT", 3)
    monkeypatch.setattr(limits, "DERIVED_INTERVALS_EACH", 4)
    for offset in range(0, 50, 10):
        derivations.add(SOURCE, offset, 0, offset, 1000)
    assert derivations.intervals == 3
    assert forgotten == {"derived interval": 2}
    too_old = derivations.seen(SOURCE, 0)
    assert too_old == TooOld(0, 11)
    assert (
        str(too_old) == "derived from offset 0, below 11: what was derived from there is forgotten"
    )
    assert derivations.seen(SOURCE, 10) == TooOld(10, 11)
    assert derivations.seen(SOURCE, 11) is None
    assert derivations.seen(SOURCE, 20) == Original(20, 1000)
    derivations.add(SOURCE, 5, 0, 99, 1000)
    assert derivations.intervals == 3, "the floor does not sink"


def test_the_source_idle_longest_is_forgotten_first(
    derivations: Derivations, forgotten: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DERIVED_SOURCES_MAX", 3)
    for source in (1, 2, 3, 1, 4):
        derivations.add(source, 5, 0, 5, 1000)
        derivations.add(source, 7, 0, 7, 1000)
    assert len(derivations) == 3
    assert derivations.intervals == 6
    assert forgotten == {"derived source": 1}
    assert [derivations.seen(source, 5) is None for source in (1, 2, 3, 4)] == [
        False,
        True,
        False,
        False,
    ]


def test_what_is_derived_anew_after_its_source_was_forgotten_is_among_the_latest(
    derivations: Derivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DERIVED_SOURCES_MAX", 1)
    monkeypatch.setattr(limits, "DERIVED_LATEST_MAX", 2)
    derivations.add(1, 5, 0, 10, 1000)
    derivations.add(2, 5, 0, 20, 1000)
    assert derivations.seen(1, 5) is None
    derivations.add(1, 5, 0, 30, 1000)
    derivations.add(1, 6, 0, 40, 1000)
    assert derivations.seen(1, 5) == Original(30, 1000)


def test_many_intervals_cost_the_source_idle_longest(
    derivations: Derivations, forgotten: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DERIVED_INTERVALS_MAX", 10)
    for source in (1, 2, 3):
        for offset in range(0, 8, 2):
            derivations.add(source, offset, 0, 5, 1000)
    assert derivations.intervals == 8
    assert forgotten == {"derived source": 1}
    assert derivations.seen(1, 0) is None
    assert derivations.seen(2, 0) is not None


@pytest.mark.parametrize(
    ("offset", "output", "text"),
    [
        (-1, 0, "derived from offset -1, which no record can have"),
        (
            OFFSET_END,
            0,
            "derived from offset 9,223,372,036,854,775,808, which no record can have",
        ),
        (0, -1, "output -1 of one input is over the limit of 256"),
        (0, 256, "output 256 of one input is over the limit of 256"),
    ],
)
def test_what_can_be_no_position_is_refused(
    derivations: Derivations, offset: int, output: int, text: str
) -> None:
    with pytest.raises(InvalidOption) as seen:
        derivations.seen(SOURCE, offset, output)
    with pytest.raises(InvalidOption) as added:
        derivations.add(SOURCE, offset, output, 1, 1000)
    assert str(seen.value) == str(added.value) == text


def test_the_last_offset_there_can_be_is_taken(derivations: Derivations) -> None:
    derivations.add((1 << 64) - 1, OFFSET_END - 1, 255, 1, 1000)
    assert derivations.seen((1 << 64) - 1, OFFSET_END - 1, 255) == Original(1, 1000)


@given(st.lists(st.integers(0, 40), max_size=60))
def test_intervals_are_the_set_of_offsets_and_no_more_than_it_takes(offsets: list[int]) -> None:
    inputs = Inputs()
    for offset in offsets:
        inputs.add(offset)
    there = set(offsets)
    assert {offset for offset in range(-1, 43) if offset >= 0 and offset in inputs} == there
    assert inputs.intervals == sum(offset - 1 not in there for offset in there)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(0, 1)), max_size=60),
    st.integers(0, 60),
)
def test_no_input_is_turned_into_the_same_output_twice(
    tries: list[tuple[int, int, int]], restart_at: int
) -> None:
    """Also if all of it is made anew from what a snapshot has."""
    derivations = Derivations(Counter())
    there: dict[tuple[int, int, int], int] = {}
    for i, key in enumerate(tries):
        if i == restart_at:
            outputs, latest = derivations.outputs(), derivations.latest()
            derivations = Derivations(Counter())
            derivations.restore(outputs, latest)
        seen = derivations.seen(*key)
        assert seen == (Original(there[key], 1000) if key in there else None)
        if seen is None:
            source, offset, output = key
            derivations.add(source, offset, output, i, 1000)
            there[key] = i
    assert derivations.intervals == sum(len(row.bounds) // 2 for row in derivations.outputs())


def test_a_restored_table_is_as_bounded_as_any(
    derivations: Derivations, forgotten: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version with lower limits reads what one with higher limits wrote."""
    monkeypatch.setattr(limits, "DERIVED_SOURCES_MAX", 2)
    monkeypatch.setattr(limits, "DERIVED_INTERVALS_KEPT", 2)
    monkeypatch.setattr(limits, "DERIVED_INTERVALS_EACH", 2)
    monkeypatch.setattr(limits, "DERIVED_LATEST_MAX", 1)
    other = Derivations(Counter())
    with monkeypatch.context() as before:
        before.setattr(limits, "DERIVED_LATEST_MAX", 2)
        other.add(3, 4, 0, 40, 1000)
        other.add(3, 5, 0, 50, 1000)
    rows = [DerivedOutputs(source, 0, 0, [1, 2, 3, 4, 5, 6]) for source in (1, 2, 3)]
    derivations.restore(rows, other.latest())
    assert len(derivations) == 2
    assert derivations.intervals == 4
    assert forgotten == {"derived source": 1, "derived interval": 3}
    assert derivations.seen(3, 1) == TooOld(1, 2)
    assert derivations.seen(3, 5) == Original(50, 1000)
    assert len(derivations.latest()) == 1
