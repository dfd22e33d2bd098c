"""What a subscriber makes of sequences: every gap once, no repeat, no false loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.sockets.sequences import Sequences

A, B = b"/a\0", b"/b\0"
NOTHING_MISSED = 0


@pytest.fixture
def sequences() -> Sequences:
    return Sequences()


def test_whoever_comes_late_has_missed_nothing(sequences: Sequences) -> None:
    assert sequences.take(1, A, 500, 1) == (NOTHING_MISSED, 0)
    assert sequences.take(1, A, 501, 3) == (NOTHING_MISSED, 0)
    assert sequences.take(1, A, 504, 1) == (NOTHING_MISSED, 0)


def test_a_gap_is_told_once_and_from_where(sequences: Sequences) -> None:
    sequences.take(1, A, 1, 1)
    assert sequences.take(1, A, 5, 1) == (2, 0)
    assert sequences.take(1, A, 6, 1) == (NOTHING_MISSED, 0)


def test_what_was_there_before_is_skipped(sequences: Sequences) -> None:
    sequences.take(1, A, 1, 4)
    assert sequences.take(1, A, 2, 1) == (NOTHING_MISSED, 1)
    assert sequences.take(1, A, 3, 4) == (NOTHING_MISSED, 2), "3 and 4, of 3 to 6"
    assert sequences.take(1, A, 7, 1) == (NOTHING_MISSED, 0)


def test_a_mark_exposes_what_was_last(sequences: Sequences) -> None:
    sequences.take(1, A, 1, 1)
    assert sequences.stands_at(1, A, 1) == NOTHING_MISSED
    assert sequences.stands_at(1, A, 2) == 2
    assert sequences.stands_at(1, A, 4) == 3
    assert sequences.stands_at(1, A, 4) == NOTHING_MISSED
    assert sequences.take(1, A, 4, 1) == (NOTHING_MISSED, 1), "it was called lost: too late"
    assert sequences.take(1, A, 5, 1) == (NOTHING_MISSED, 0)


def test_a_mark_that_was_overtaken_takes_nothing_back(sequences: Sequences) -> None:
    sequences.take(1, A, 1, 9)
    assert sequences.stands_at(1, A, 4) == NOTHING_MISSED
    assert sequences.take(1, A, 10, 1) == (NOTHING_MISSED, 0)


def test_the_first_mark_is_the_baseline(sequences: Sequences) -> None:
    assert sequences.stands_at(1, A, 7) == NOTHING_MISSED
    assert sequences.take(1, A, 9, 1) == (8, 0)


def test_the_mark_of_a_quiet_topic_is_no_baseline(sequences: Sequences) -> None:
    """It may come before what a newcomer gets for himself, and that is no repeat."""
    assert sequences.falls_quiet_at(1, A, 7) == NOTHING_MISSED
    assert sequences.take(1, A, 7, 1) == (NOTHING_MISSED, 0), "the last value"
    assert sequences.falls_quiet_at(1, A, 9) == 8, "now it counts"
    sequences.marked(1)
    assert sequences.falls_quiet_at(1, B, 2) == 1, "and of those that are new since the mark"


def test_after_its_mark_a_topic_that_is_new_starts_with_1(sequences: Sequences) -> None:
    sequences.marked(1)
    assert sequences.take(1, A, 3, 1) == (1, 0)
    assert sequences.stands_at(1, B, 2) == 1
    assert sequences.take(2, A, 3, 1) == (NOTHING_MISSED, 0), "of that sender no mark has come"


def test_senders_and_topics_are_apart(sequences: Sequences) -> None:
    for sender, name in ((1, A), (1, B), (2, A)):
        assert sequences.take(sender, name, 1, 1) == (NOTHING_MISSED, 0)
    assert sequences.take(1, A, 3, 1) == (2, 0)
    assert sequences.take(1, B, 2, 1) == (NOTHING_MISSED, 0)
    assert sequences.take(2, A, 2, 1) == (NOTHING_MISSED, 0)


TOPICS, SENDERS = 10, 3


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of everything is followed, so that it overflows."""
    monkeypatch.setattr(limits, "TRACKED_CHANNELS_MAX", TOPICS)
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", SENDERS)


@pytest.mark.usefixtures("few")
def test_the_quietest_topic_is_forgotten_first(sequences: Sequences) -> None:
    sequences.take(1, A, 1, 1)
    for i in range(TOPICS - 1):
        sequences.take(1, b"/%d\0" % i, 1, 1)
    sequences.take(1, A, 2, 1)
    sequences.take(1, b"/one more\0", 1, 1)
    assert sequences.take(1, A, 9, 1) == (3, 0), "it was heard of just now"
    assert sequences.take(1, b"/0\0", 9, 1) == (NOTHING_MISSED, 0), "forgotten: a newcomer"
    assert len(sequences._expected) == TOPICS


@pytest.mark.usefixtures("few")
def test_a_forgotten_topic_does_not_seem_to_start_with_1(sequences: Sequences) -> None:
    """Nor after a further mark, which all of its sender's topics are in."""
    for _ in range(2):
        for i in range(TOPICS + 2):
            assert sequences.stands_at(5, b"/%d\0" % i, 500) == NOTHING_MISSED
        sequences.marked(5)
        assert sequences.take(5, b"/0\0", 501, 1) == (NOTHING_MISSED, 0)
    assert sequences.falls_quiet_at(5, b"/forgotten\0", 7) == NOTHING_MISSED
    assert sequences.falls_quiet_at(5, b"/forgotten\0", 8) == 8, "the best there is to go by"


@pytest.mark.usefixtures("few")
def test_nor_if_it_is_forgotten_after_the_mark(sequences: Sequences) -> None:
    sequences.marked(5)
    for i in range(TOPICS + 1):
        sequences.take(5, b"/%d\0" % i, 1, 1)
    assert sequences.take(5, b"/0\0", 9, 1) == (NOTHING_MISSED, 0)


@pytest.mark.usefixtures("few")
def test_whose_topics_are_all_followed_keeps_its_mark(sequences: Sequences) -> None:
    sequences.marked(1)
    for i in range(TOPICS + 1):
        sequences.take(2, b"/%d\0" % i, 1, 1)
    assert sequences.take(1, A, 2, 1) == (1, 0)


@pytest.mark.usefixtures("few")
def test_the_senders_that_are_remembered_are_bounded(sequences: Sequences) -> None:
    for sender in range(100):
        sequences.marked(sender)
        for i in range(TOPICS + 1):
            sequences.take(1000 + sender, b"/%d\0" % i, 1, 1)
    assert len(sequences._marked) == SENDERS
    assert len(sequences._overflowing) == SENDERS
    assert sequences.take(99, A, 2, 1) == (1, 0), "the latest mark counts"


class Naive:
    """The same by definition: which numbers of a topic are settled, received or called lost."""

    def __init__(self) -> None:
        self.settled: dict[tuple[int, bytes], set[int]] = {}
        self.marked: set[int] = set()

    def arrive(self, sender: int, name: bytes, first: int, last: int) -> tuple[set[int], set[int]]:
        """All up to `last` were sent, and those from `first` are here: (missed, repeated)."""
        settled = self.settled.get((sender, name))
        if settled is None:
            settled = set() if sender in self.marked else set(range(1, first))
        here = set(range(first, last + 1))
        missed = set(range(1, first)) - settled
        repeated = here & settled
        self.settled[sender, name] = settled | missed | here
        return missed, repeated


EVENT = st.tuples(
    st.sampled_from(["take", "stands_at", "marked"]),
    st.integers(1, 2),
    st.sampled_from([A, B]),
    st.integers(1, 12),
    st.integers(1, 3),
)


@given(st.lists(EVENT, max_size=30))
def test_whatever_arrives_in_whatever_order_it_agrees_with_the_definition(
    events: list[tuple[str, int, bytes, int, int]],
) -> None:
    sequences, naive = Sequences(), Naive()
    for what, sender, name, seq, count in events:
        if what == "marked":
            sequences.marked(sender)
            naive.marked.add(sender)
        elif what == "take":
            first, skip = sequences.take(sender, name, seq, count)
            missed, repeated = naive.arrive(sender, name, seq, seq + count - 1)
            assert set(range(first, seq)) == missed if first else not missed
            assert set(range(seq, seq + skip)) == repeated
        else:
            first = sequences.stands_at(sender, name, seq)
            missed, _ = naive.arrive(sender, name, seq + 1, seq)
            assert set(range(first, seq + 1)) == missed if first else not missed
