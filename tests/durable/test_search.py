"""Where reading for what was missed begins, and that nothing is read by."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.durable.search import PATIENCE_S, Search
from mesh.sockets.repairs import FlowKey, Want

NS = 1_000_000_000
A: FlowKey = (2, "a")
B: FlowKey = (2, "b")


def want(first: int, last: int, since_s: float = 100.0, flow: FlowKey = A) -> Want:
    return Want(flow, first, last, round(since_s * NS))


def begun(search: Search, *wants: Want) -> float | None:
    begin_ns = search.begin(wants)
    return None if begin_ns is None else begin_ns / NS


def test_it_begins_a_little_before_the_first_that_is_missing() -> None:
    search = Search()
    assert begun(search, want(5, 6, 100), want(1, 2, 90, B)) == 89.75
    assert begun(search, want(5, 6, 100), want(1, 2, 90, B)) is None, "it reads on"


def test_too_late_a_beginning_goes_further_back_up_to_the_whole_log() -> None:
    search, missing = Search(), want(5, 6)
    for begin in (99.75, 70.0, 0.0):
        assert begun(search, missing) == begin
        search.begun(from_start=False)
        search.read(A, 8, 8, [missing])
    assert begun(search, missing) is None, "there is nothing before that"


def test_where_the_log_begins_there_is_nothing_further_back() -> None:
    search, missing = Search(), want(5, 6)
    search.begin([missing])
    search.begun(from_start=True)
    assert search.read(A, 8, 8, [missing])
    assert begun(search, missing) is None


def test_a_topic_that_does_not_come_for_a_while_is_looked_for_further_back() -> None:
    search, missing = Search(), want(5, 6)
    search.begin([missing])
    search.begun(from_start=False)
    search.at_end([missing], 0.0)
    search.at_end([missing], PATIENCE_S - 0.1)
    assert begun(search, missing) is None
    search.at_end([missing], PATIENCE_S)
    assert begun(search, missing) == 70.0


def test_what_was_read_by_before_it_was_wanted_is_read_again() -> None:
    search, early, late = Search(), want(5, 6), want(9, 9, 101)
    search.begin([early])
    search.read(A, 5, 8, [early])
    assert begun(search, late) is None, "it is still to come"
    search.read(A, 9, 9, [])
    later = want(10, 12, 102)
    assert begun(search, later) is None
    search.read(A, 10, 20, [])
    assert begun(search, want(14, 15, 103)) == 102.75, "it was read by"
    assert begun(search, want(14, 15, 103)) is None


def test_a_topic_that_is_wanted_from_before_the_beginning_is_read_from_there() -> None:
    search, first = Search(), want(5, 6, 100)
    search.begin([first])
    assert begun(search, first, want(1, 1, 100, B)) is None
    assert begun(search, first, want(2, 2, 50, B)) == 49.75


class Log:
    """One that grows, of a sidecar whose clock is `skew_s` ahead, and somebody who reads in it."""

    def __init__(self, skew_s: float) -> None:
        self.skew_s = skew_s
        self.search = Search()
        self.batches: list[tuple[float, FlowKey, int, int]] = []
        self.at = 0
        self.wants: list[Want] = []
        self.found: set[tuple[FlowKey, int]] = set()

    def append(self, now: float, flow: FlowKey, first: int, count: int) -> None:
        self.batches.append((now + self.skew_s, flow, first, first + count - 1))

    @property
    def missing(self) -> list[Want]:
        """What is wanted and was not found, one by one."""
        return [
            Want(each.flow, seq, seq, each.since_ns)
            for each in self.wants
            for seq in range(each.first, each.last + 1)
            if (each.flow, seq) not in self.found
        ]

    def read(self, batches: int, now: float) -> None:
        """A turn, which comes by so many at most."""
        missing = self.missing
        if not missing:
            return
        begin_ns = self.search.begin(missing)
        if begin_ns is not None:
            later = (i for i, each in enumerate(self.batches) if each[0] * NS >= begin_ns)
            self.at = next(later, len(self.batches))
            self.search.begun(from_start=self.at == 0)
        if self.at == len(self.batches):
            self.search.at_end(missing, now)
        for _, flow, first, last in self.batches[self.at : self.at + batches]:
            of = sorted((each for each in missing if each.flow == flow), key=lambda w: w.first)
            if not self.search.read(flow, first, last, of):
                return
            self.at += 1
            self.found |= {(flow, each.first) for each in of if first <= each.first <= last}


@pytest.mark.slow
@settings(max_examples=60)
@given(st.randoms(use_true_random=False), st.floats(-100, 100))
def test_whatever_the_clocks_say_all_that_is_there_is_found(
    luck: random.Random, skew_s: float
) -> None:
    log, now = Log(skew_s), 1000.0
    next_seq, next_want = {A: 1, B: 1}, {A: 1, B: 1}
    sent_at = {(A, 0): now, (B, 0): now}
    for _ in range(150):
        now += luck.choice([0.0, 0.01, 0.4])
        flow = luck.choice([A, B])
        if luck.random() < 0.5:
            first, count = next_seq[flow], luck.randint(1, 3)
            log.append(now, flow, first, count)
            next_seq[flow] += count
            sent_at |= {(flow, seq): now for seq in range(first, first + count)}
        elif next_want[flow] < next_seq[flow]:
            first = luck.randint(next_want[flow], next_seq[flow] - 1)
            last = luck.randint(first, next_seq[flow] - 1)
            log.wants.append(want(first, last, sent_at[flow, first - 1], flow))
            next_want[flow] = last + 1
        if luck.random() < 0.7:
            log.read(luck.randint(1, 4), now)
    for _ in range(30):
        now += PATIENCE_S
        log.read(1000, now)
    assert not log.missing
