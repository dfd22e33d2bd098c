"""Dedup ids: a repeat within the window is known, one after it is not, and the table is bounded."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.durable.dedup_ids import NS_PER_S, DedupIds, Original
from mesh.errors import InvalidOption

WINDOW_S = 120
START_NS = 1_700_000_000 * NS_PER_S


@pytest.fixture
def ids() -> DedupIds:
    return DedupIds(WINDOW_S, Counter())


def test_a_repeat_within_the_window_names_the_original(ids: DedupIds) -> None:
    ids.add("order-7", 41, START_NS)
    within_ns = START_NS + WINDOW_S * NS_PER_S - 1
    assert ids.seen("order-7", within_ns) == Original(41, START_NS)
    assert ids.seen("order-8", within_ns) is None


def test_a_repeat_after_the_window_is_new(ids: DedupIds) -> None:
    ids.add("order-7", 41, START_NS)
    after_ns = START_NS + WINDOW_S * NS_PER_S
    assert ids.seen("order-7", after_ns) is None
    ids.add("order-7", 99, after_ns)
    assert ids.seen("order-7", after_ns) == Original(99, after_ns)


def test_the_window_counts_from_the_original_and_not_from_its_repeats(ids: DedupIds) -> None:
    ids.add("order-7", 41, START_NS)
    assert ids.seen("order-7", START_NS + 100 * NS_PER_S)
    assert ids.seen("order-7", START_NS + 130 * NS_PER_S) is None


def test_a_clock_that_goes_back_does_not_bring_an_id_back(ids: DedupIds) -> None:
    ids.add("early", 1, START_NS)
    ids.add("late", 2, START_NS + 130 * NS_PER_S)
    assert ids.seen("early", START_NS) is None
    ids.add("back", 3, START_NS)
    assert ids.seen("back", START_NS) == Original(3, START_NS + 130 * NS_PER_S)


def test_what_is_out_of_the_window_takes_no_memory(ids: DedupIds) -> None:
    for i in range(1000):
        ids.add(f"{i}", i, START_NS + i * NS_PER_S)
    assert len(ids) == WINDOW_S


def test_over_the_limit_the_oldest_are_forgotten_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "DEDUP_IDS_MAX", 10)
    forgotten: Counter[str] = Counter()
    ids = DedupIds(WINDOW_S, forgotten)
    for i in range(13):
        ids.add(f"{i}", i, START_NS)
    assert len(ids) == 10
    assert forgotten == {"dedup id": 3}
    assert ids.seen("2", START_NS) is None
    assert ids.seen("3", START_NS) == Original(3, START_NS)


def test_an_id_used_again_after_its_window_is_the_youngest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "DEDUP_IDS_MAX", 2)
    ids = DedupIds(WINDOW_S, Counter())
    after_ns = START_NS + WINDOW_S * NS_PER_S
    ids.add("again", 1, START_NS)
    ids.add("between", 2, START_NS + 1)
    ids.add("again", 3, after_ns)
    ids.add("last", 4, after_ns)
    assert ids.seen("between", after_ns) is None
    assert ids.seen("again", after_ns) == Original(3, after_ns)


def test_a_clock_that_went_back_over_a_restart_does_not_shorten_the_window(ids: DedupIds) -> None:
    ids.add("before", 1, START_NS)
    restarted = DedupIds(WINDOW_S, Counter())
    restarted.restore(ids)
    restarted.add("back", 2, START_NS - 100 * NS_PER_S)
    assert restarted.seen("back", START_NS + 100 * NS_PER_S) == Original(2, START_NS)


def test_text_is_its_utf8(ids: DedupIds) -> None:
    ids.add("größe", 1, START_NS)
    assert ids.seen("größe".encode(), START_NS) == Original(1, START_NS)


@pytest.mark.parametrize(
    ("dedup_id", "text"),
    [
        ("", "dedup_id must have 1 to 255 bytes, not 0"),
        ("x" * 256, "dedup_id must have 1 to 255 bytes, not 256"),
        ("ö" * 128, "dedup_id must have 1 to 255 bytes, not 256"),
        (b"x" * 2000, "dedup_id must have 1 to 255 bytes, not 2,000"),
        (7, "dedup_id must be str or bytes, not int"),
        ("\ud800", "dedup_id has lone surrogates, which UTF-8 cannot say"),
    ],
)
def test_what_can_be_no_id_is_refused(ids: DedupIds, dedup_id: str | bytes, text: str) -> None:
    with pytest.raises(InvalidOption) as seen:
        ids.seen(dedup_id, START_NS)
    with pytest.raises(InvalidOption) as added:
        ids.add(dedup_id, 1, START_NS)
    assert str(seen.value) == str(added.value) == text
    assert len(ids) == 0


def test_the_longest_id_is_taken(ids: DedupIds) -> None:
    ids.add("x" * 255, 1, START_NS)
    assert ids.seen(b"x" * 255, START_NS)


@pytest.mark.parametrize("window_s", [0, -1, 1e9, float("nan")])
def test_a_window_that_cannot_be_is_refused(window_s: float) -> None:
    with pytest.raises(InvalidOption, match="dedup_window_s must be over 0 and under 1e9 s, not"):
        DedupIds(window_s, Counter())


steps = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-5, 30)), max_size=60)


@pytest.mark.slow
@given(steps)
def test_an_id_is_known_exactly_as_long_as_the_window(steps: list[tuple[str, int]]) -> None:
    """Whatever the clock does: the log's never goes back."""
    ids = DedupIds(20e-9, Counter())
    used: dict[str, Original] = {}
    now = log_clock = 0
    for offset, (name, passed) in enumerate(steps):
        now += passed
        original = used.get(name)
        if original is not None and max(now, log_clock) - original.time_ns >= 20:
            original = None
        assert ids.seen(name, now) == original
        if original is None:
            ids.add(name, offset, now)
            log_clock = max(now, log_clock)
            used[name] = Original(offset, log_clock)
