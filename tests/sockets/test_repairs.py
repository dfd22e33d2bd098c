"""Gaps that are open for a while: what comes out, whatever is dropped, found late or never."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mesh.message import Origin, Run
from mesh.sockets.repairs import FlowKey, Lost, Outcome, Passed, Repairs, Want

TIMEOUT_S = 5.0
A: FlowKey = (1, "a")
B: FlowKey = (1, "b")


def run_of(first: int, count: int = 1, flow: FlowKey = A) -> Run:
    """Messages whose payloads are their sequences; not always the first of their frame."""
    before = min(2, first - 1)
    origin = Origin(flow[1], str(flow[0]), first - before, first)
    return Run(list(range(first, first + count)), before, origin)


def said(outcomes: list[Outcome]) -> list[tuple[str, int]]:
    """What became of each message."""
    found: list[tuple[str, int]] = []
    for each in outcomes:
        if isinstance(each, Lost):
            found += [("lost", seq) for seq in range(each.first, each.last + 1)]
        else:
            word = "repaired" if each.repaired else "came"
            assert [m.seq for m in each.run] == each.run.payloads
            found += [(word, seq) for seq in each.run.payloads]
    return found


def repairs_of(bytes_max: int = 1000, flows_max: int = 10) -> Repairs:
    return Repairs(TIMEOUT_S, bytes_max=bytes_max, flows_max=flows_max)


class Reader:
    """Someone who receives what was not dropped, as `mesh.sockets.repairing` does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.repairs = repairs_of(bytes_max=10**9)
        self.expected = {A: 1, B: 1}
        self.out: dict[FlowKey, list[tuple[str, int]]] = {A: [], B: []}
        self.missed_at: dict[tuple[FlowKey, int], float] = {}
        self.handed_in: set[tuple[FlowKey, int]] = set()

    def comes(self, flow: FlowKey, first: int, count: int) -> None:
        expected = self.expected[flow]
        if first > expected:
            self.misses(flow, first - 1)
        if flow in self.repairs.flows:
            self.repairs.hold(flow, run_of(first, count, flow), count)
        else:
            self.out[flow] += said([Passed(run_of(first, count, flow), False)])
        self.expected[flow] = first + count

    def misses(self, flow: FlowKey, last: int) -> None:
        first = self.expected[flow]
        if first > last:
            return
        assert self.repairs.missed(flow, first, last, 0, self.now)
        for seq in range(first, last + 1):
            self.missed_at[flow, seq] = self.now
        self.expected[flow] = last + 1

    def finds(self, flow: FlowKey, first: int, count: int) -> None:
        wanted = {
            (each.flow, seq)
            for each in self.repairs.wants()
            for seq in range(each.first, each.last + 1)
        }
        self.handed_in |= wanted & {(flow, seq) for seq in range(first, first + count)}
        outcomes = self.repairs.found(flow, run_of(first, count, flow), count, self.now)
        assert not any(isinstance(each, Lost) for each in outcomes)
        self.take(outcomes, flow)

    def waits(self, seconds: float) -> None:
        self.now += seconds
        outcomes = self.repairs.expire(self.now)
        for flow in (A, B):
            self.take([each for each in outcomes if _flow_of(each) == flow], flow)

    def take(self, outcomes: list[Outcome], flow: FlowKey) -> None:
        for what, seq in said(outcomes):
            self.out[flow].append((what, seq))
            if what == "lost":
                assert (flow, seq) not in self.handed_in, "it was found"
                assert self.now >= self.missed_at[flow, seq] + TIMEOUT_S, "given up too early"


def _flow_of(outcome: Outcome) -> FlowKey:
    if isinstance(outcome, Lost):
        return outcome.flow
    return int(outcome.run.origin.sender), outcome.run.origin.channel


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.sampled_from([A, B]), st.integers(1, 4)),
        st.tuples(st.just("drop"), st.sampled_from([A, B]), st.integers(1, 4)),
        st.tuples(st.just("mark"), st.sampled_from([A, B]), st.just(0)),
        st.tuples(st.just("find"), st.sampled_from([A, B]), st.integers(1, 9)),
        st.tuples(st.just("wait"), st.sampled_from([A, B]), st.sampled_from([1, 3, 6])),
    ),
    max_size=60,
)


@given(STEPS, st.randoms(use_true_random=False))
def test_each_message_comes_once_in_order_or_is_counted(
    steps: list[tuple[str, FlowKey, int]], luck: random.Random
) -> None:

    reader, sent = Reader(), {A: 0, B: 0}
    for what, flow, number in steps:
        if what == "send":
            reader.comes(flow, sent[flow] + 1, number)
            sent[flow] += number
        elif what == "drop":
            sent[flow] += number
        elif what == "mark":
            reader.misses(flow, sent[flow])
        elif what == "find" and sent[flow]:
            first = luck.randint(1, sent[flow])
            reader.finds(flow, first, min(number, sent[flow] - first + 1))
        elif what == "wait":
            reader.waits(number)
        for each in (A, B):
            told = [seq for _, seq in reader.out[each]]
            assert told == list(range(1, len(told) + 1)), "at most once, and in order"
            missing = any(want.flow == each for want in reader.repairs.wants())
            assert missing == (each in reader.repairs.flows)
            if not missing:
                assert len(told) == reader.expected[each] - 1, "nothing is held without a gap"
    for _ in range(2):
        reader.waits(2 * TIMEOUT_S)
    for each in (A, B):
        assert [seq for _, seq in reader.out[each]] == list(range(1, reader.expected[each]))
    assert not reader.repairs.flows
    assert (reader.repairs._held, reader.repairs._found) == (0, 0), "the account is even"


def test_what_came_behind_a_gap_waits_for_it_and_other_topics_do_not() -> None:
    repairs = repairs_of()
    assert repairs.missed(A, 3, 4, 77, 0.0)
    assert repairs.wants() == [Want(A, 3, 4, 77)]
    repairs.hold(A, run_of(5, 2), 10)
    assert B not in repairs.flows
    assert repairs.found(B, run_of(3, 2, B), 10, 0.0) == []
    assert said(repairs.found(A, run_of(3), 10, 0.0)) == [("repaired", 3)]
    assert said(repairs.found(A, run_of(1, 9), 10, 0.0)) == [
        ("repaired", 4), ("came", 5), ("came", 6),
    ]  # fmt: skip
    assert not repairs.flows


def test_a_gap_is_given_up_when_nothing_was_found_of_it_for_the_timeout() -> None:
    repairs = repairs_of()
    repairs.missed(A, 1, 3, 0, 0.0)
    repairs.hold(A, run_of(4), 1)
    assert said(repairs.found(A, run_of(1), 1, 3.0)) == [("repaired", 1)]
    assert repairs.expire(7.9) == []
    assert said(repairs.expire(8.0)) == [("lost", 2), ("lost", 3), ("came", 4)]
    assert repairs.found(A, run_of(2), 1, 8.1) == [], "too late"


def test_what_nobody_could_take_is_not_given_up() -> None:
    repairs = repairs_of()
    repairs.missed(A, 1, 1, 0, 0.0)
    repairs.extend(4.0)
    assert repairs.expire(8.9) == []
    assert said(repairs.expire(9.0)) == [("lost", 1)]


def test_holes_between_what_was_found_are_given_up_together() -> None:
    repairs = repairs_of()
    repairs.missed(A, 1, 9, 0, 0.0)
    for seq in (6, 2, 4):
        assert repairs.found(A, run_of(seq), 1, 1.0) == []
    assert [(want.first, want.last) for want in repairs.wants()] == [(1, 1), (3, 3), (5, 5), (7, 9)]
    assert [word for word, _ in said(repairs.expire(6.0))] == ["lost", "repaired"] * 3
    assert [(want.first, want.last) for want in repairs.wants()] == [(7, 9)], "more may follow"
    assert said(repairs.expire(11.0)) == [("lost", 7), ("lost", 8), ("lost", 9)]


def test_what_is_held_is_bounded_apart_from_what_is_found() -> None:
    repairs = repairs_of(bytes_max=100)
    repairs.missed(A, 1, 5, 0, 0.0)
    repairs.hold(A, run_of(6), 99)
    assert not repairs.full
    repairs.hold(A, run_of(7), 1)
    assert (repairs.full, repairs.crowded) == (True, False)
    assert repairs.found(A, run_of(3), 100, 0.0) == []
    assert repairs.crowded
    repairs.expire(6.0)
    assert not repairs.crowded, "what is missing before it was given up"
    repairs.expire(20.0)
    assert not repairs.full
    assert not repairs.flows


def test_no_more_topics_are_repaired_than_the_bound_says() -> None:
    repairs = repairs_of(flows_max=1)
    assert repairs.missed(A, 1, 1, 0, 0.0)
    assert repairs.missed(A, 2, 2, 0, 0.0)
    assert not repairs.missed(B, 1, 1, 0, 0.0)
    assert said(repairs.expire(6.0)) == [("lost", 1), ("lost", 2)]


def test_what_a_ctrl_c_has_said_twice_is_one_gap() -> None:
    repairs = repairs_of()
    repairs.missed(A, 1, 3, 0, 0.0)
    repairs.missed(A, 1, 5, 0, 0.0)
    repairs.hold(A, run_of(4, 3), 1)
    assert [(want.first, want.last) for want in repairs.wants()] == [(1, 5)]
    repairs.missed(A, 5, 8, 0, 0.0)
    assert [(want.first, want.last) for want in repairs.wants()] == [(1, 5), (7, 8)]
    assert said(repairs.expire(6.0)) == [
        *(("lost", seq) for seq in range(1, 6)), ("came", 6), ("lost", 7), ("lost", 8),
    ]  # fmt: skip
