"""What a consumer has done is said completely, in messages that are not too large, and not of
records that were cut off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.durable.deliveries import Settlements
from mesh.durable.derivations import OFFSET_END
from mesh.durable.protocol import Settle, encode_message, room_for_settlements
from mesh.durable.unsaid import Unsaid

NAMES = ("orders", "billing", "m" * 32)
MOST = (1 << 64) - 1
OFFSETS = st.one_of(st.integers(0, 50), st.integers(OFFSET_END - 50, OFFSET_END - 1))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ack"), OFFSETS),
        st.tuples(st.just("nak"), OFFSETS),
        st.tuples(st.just("extend"), OFFSETS),
        st.tuples(st.just("add_unseen"), OFFSETS),
        st.tuples(st.just("reject"), OFFSETS, st.text(max_size=300)),
    ),
    max_size=40,
)


def all_of(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {offset for first, end in ranges for offset in range(first, end)}


def do(unsaid: Unsaid, step: tuple[str, int] | tuple[str, int, str]) -> None:
    match step:
        case ("ack", offset):
            unsaid.ack(offset, 1)
        case ("nak", offset):
            unsaid.nak(offset, 0.5)
        case ("extend" | "add_unseen" as name, offset):
            getattr(unsaid, name)([offset])
        case ("reject", offset, reason):
            unsaid.reject(offset, reason)


@given(STEPS, st.integers(1024, 1500), st.data())
def test_all_of_it_is_said_once_in_messages_with_room_for_it(
    steps: list[tuple[str, int]], bytes_max: int, data: st.DataObject
) -> None:
    unsaid = Unsaid(room_for_settlements(*NAMES, bytes_max))
    said: list[Settlements] = []
    for step in steps:
        do(unsaid, step)
    while unsaid.count:
        taken = unsaid.take()
        if data.draw(st.booleans(), "is busy"):
            unsaid.put_back(taken, 1)
            taken = unsaid.take()
        said.append(taken)
        message = Settle(*NAMES, MOST, taken, True, MOST, MOST)
        assert len(encode_message(message)) <= bytes_max
    done = {name: [step[1] for step in steps if step[0] == name] for name, *_ in steps}
    assert set().union(*(all_of(each.acks) for each in said)) == set(done.get("ack", ()))
    assert set().union(*(all_of(each.unseen) for each in said)) == set(done.get("add_unseen", ()))
    assert [nak for each in said for nak, _ in each.naks] == done.get("nak", [])
    assert [offset for each in said for offset in each.extends] == done.get("extend", [])
    assert [offset for each in said for offset, _ in each.rejects] == done.get("reject", [])
    assert not unsaid.settles


@given(STEPS)
def test_which_message_says_that_a_record_is_handed_back_is_known_beforehand(
    steps: list[tuple[str, int]],
) -> None:
    unsaid = Unsaid(100)
    expected: list[int] = []
    for step in steps:
        if step[0] == "nak":
            expected.append(unsaid.messages_before_nak)
        do(unsaid, step)
    found: list[int] = []
    number = 0
    while unsaid.count:
        found += [number] * len(unsaid.take().naks)
        number += 1
    assert found == expected


def test_neighbours_are_one_range_in_whatever_order_they_are_done() -> None:
    unsaid = Unsaid(1000)
    for offset in (0, 1, 2, 5, 4, 3, 9):
        unsaid.ack(offset, 1)
    assert unsaid.settles
    assert unsaid.take() == Settlements(((0, 6), (9, 10)))
    assert not unsaid.settles


def test_a_reason_is_shortened_to_what_there_is_room_for() -> None:
    unsaid = Unsaid(100)
    unsaid.reject(7, "é" * limits.REASON_CHARACTERS_MAX)
    assert unsaid.take().rejects == ((7, "é" * 40),)
    unsaid = Unsaid(1)
    unsaid.reject(7, "no room")
    assert unsaid.take().rejects == ((7, ""),)


def test_a_reason_that_was_given_when_there_was_more_room_is_shortened_too() -> None:
    """By a sidecar that came back with a smaller limit: it was never said."""
    unsaid = Unsaid(1000)
    unsaid.reject(7, "x" * 200)
    said = unsaid.take()
    unsaid.put_back(said, 1)
    unsaid.reject(8, "y" * 200)
    unsaid.bound(100)
    assert [unsaid.take().rejects for _ in range(2)] == [((7, "x" * 80),), ((8, "y" * 80),)]
    assert unsaid.count == 0


def test_a_message_says_no_more_than_a_sidecar_takes_in_however_large_it_may_be() -> None:
    unsaid = Unsaid(1 << 40)
    for offset in range(limits.SETTLED_MAX + 7):
        unsaid.nak(offset, 0.0)
    assert unsaid.messages_before_nak == 1
    assert len(unsaid.take().naks) == limits.SETTLED_MAX
    assert len(unsaid.take().naks) == 7


@pytest.mark.parametrize(("log_epoch", "kept"), [(1, 5), (2, 10)])
def test_what_is_put_back_is_not_said_of_records_that_were_cut_off_meanwhile(
    log_epoch: int, kept: int
) -> None:
    unsaid = Unsaid(1000)
    unsaid.cut(5, 2)
    said = Settlements(((0, 10),), ((4, 0.0), (5, 0.0)), (4, 5), ((4, ""), (5, "")), ((0, 10),))
    unsaid.put_back(said, log_epoch)
    left = unsaid.take()
    assert (left.acks, left.unseen) == (((0, kept),), ((0, kept),))
    for each in ([n for n, _ in left.naks], list(left.extends), [n for n, _ in left.rejects]):
        assert each == [n for n in (4, 5) if n < kept]
    assert unsaid.is_gone(5, 1)
    assert not unsaid.is_gone(4, 1)
    assert not unsaid.is_gone(5, 2)
    assert unsaid.ack(5, 1) == 0
