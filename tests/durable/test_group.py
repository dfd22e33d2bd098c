"""A group's rules, one by one: who is given what, when it comes back, what is never lost."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from mesh import limits
from mesh.durable.group import DeadRecord, Grant, Group, GroupOptions, Trimmed
from mesh.durable.progress import Progress
from mesh.durable.waiting import Order
from mesh.errors import InvalidOption
from tests.support.groups import newly_dead

WAIT_S = 30.0


def group_of(
    records: int = 0,
    *members: str,
    order: Order = "any",
    prefetch: int = 10,
    max_deliver: int = 20,
    keys: Iterable[bytes | None] = (),
) -> Group:
    group = Group(GroupOptions(order=order, ack_wait_s=WAIT_S, max_deliver=max_deliver))
    group.appended(records, list(keys) or [None] * records)
    for member in members:
        assert group.join(member, prefetch)
    return group


def taken(group: Group, now: float = 0.0) -> list[tuple[str, int, int, int]]:
    return [(g.member, g.first, g.end, g.deliveries) for g in group.take(now)]


def offsets_of(grants: list[Grant], member: str) -> list[int]:
    return [o for g in grants if g.member == member for o in range(g.first, g.end)]


# -- Grants --------------------------------------------------------------------------------------


def test_records_go_out_in_runs_within_the_credit() -> None:
    group = group_of(25, "a", prefetch=10)
    assert group.take(0.0) == [Grant("a", 0, 10, 1)]
    assert group.take(0.0) == []
    assert group.ack("a", 0, 4) == 4
    assert taken(group) == [("a", 10, 14, 1)]
    assert group.in_flight == 10


def test_records_are_shared_out_evenly() -> None:
    assert taken(group_of(10, "a", "b", prefetch=100)) == [("a", 0, 5, 1), ("b", 5, 10, 1)]


def test_who_holds_fewest_is_given_most() -> None:
    group = group_of(4, "a", prefetch=100)
    group.take(0.0)
    group.join("b", 100)
    group.appended(10)
    assert taken(group) == [("a", 4, 5, 1), ("b", 5, 10, 1)]


def test_what_one_has_no_credit_for_goes_to_the_others() -> None:
    group = group_of(0, "small", prefetch=1)
    group.join("large", 10)
    group.appended(8)
    assert taken(group) == [("small", 0, 1, 1), ("large", 1, 8, 1)]


def test_single_records_go_to_idle_members_by_turns() -> None:
    group = group_of(0, "a", "b", "c")
    turns = []
    for offset in range(6):
        group.appended(offset + 1)
        [grant] = group.take(0.0)
        group.ack(grant.member, offset, offset + 1)
        turns.append(grant.member)
    assert turns == ["a", "b", "c"] * 2


def test_redeliveries_go_before_fresh_records_and_in_order() -> None:
    group = group_of(20, "a", prefetch=6)
    group.take(0.0)
    for offset in (4, 1, 2):
        group.nak("a", offset, 0.0)
    group.ack("a", 3, 4)
    assert taken(group) == [("a", 1, 3, 2), ("a", 4, 5, 2), ("a", 6, 7, 1)]
    assert group.counters["redelivered"] == 3


def test_a_prefetch_can_be_changed() -> None:
    group = group_of(30, "a", prefetch=10)
    group.take(0.0)
    group.join("a", 5)
    group.ack("a", 0, 4)
    assert taken(group) == []
    group.join("a", 7)
    assert taken(group) == [("a", 10, 11, 1)]


@pytest.mark.parametrize(("offered", "granted"), [(0, 1), (-5, 1), (1 << 63, limits.PREFETCH_MAX)])
def test_a_prefetch_offered_by_a_peer_is_bounded(offered: int, granted: int) -> None:
    group = group_of(limits.GROUP_WINDOW)
    group.join("a", offered)
    group.take(0.0)
    assert group.in_flight == granted


def test_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUP_MEMBERS_MAX", 2)
    group = group_of(0, "a", "b")
    assert not group.join("c", 1)
    assert group.join("a", 5), "it is here already"
    assert group.counters["too many members"] == 1
    group.leave("a")
    assert group.join("c", 1)


# -- Members -------------------------------------------------------------------------------------


def test_what_a_leaving_member_held_goes_to_the_others_at_once() -> None:
    group = group_of(6, "a", "b", prefetch=3)
    assert taken(group) == [("a", 0, 3, 1), ("b", 3, 6, 1)]
    group.ack("a", 1, 2)
    group.leave("a")
    assert taken(group) == []
    group.ack("b", 3, 6)
    assert taken(group) == [("b", 0, 1, 2), ("b", 2, 3, 2)]
    group.leave("a")
    assert group.in_flight == 2, "it had left already"


def test_what_a_leaving_member_has_shown_to_nobody_was_never_delivered() -> None:
    group = group_of(6, "a", "b", prefetch=3, max_deliver=1)
    assert taken(group) == [("a", 0, 3, 1), ("b", 3, 6, 1)]
    group.ack("a", 0, 1)
    group.recall("a", [(2, 3), (0, 1), (4, 1 << 62)])
    group.leave("a")
    assert newly_dead(group) == [
        DeadRecord(1, 1, "delivered 1 times, which is the limit (max_deliver)")
    ]
    group.ack("b", 3, 6)
    assert taken(group) == [("b", 2, 3, 1)]
    group.recall("nobody", [(0, 6)])
    assert group.in_flight == 1


def test_a_member_that_comes_late_is_given_what_waits() -> None:
    group = group_of(5)
    assert taken(group) == []
    group.join("a", 9)
    assert taken(group) == [("a", 0, 5, 1)]


# -- Leases --------------------------------------------------------------------------------------


def test_a_lease_that_is_over_sends_the_record_out_again() -> None:
    group = group_of(3, "a")
    group.take(1.0)
    group.ack("a", 1, 2)
    assert group.next_at() == 1.0 + WAIT_S
    assert group.expire(1.0 + WAIT_S - 0.1) == 0
    assert group.expire(1.0 + WAIT_S) == 2
    assert group.counters["expired"] == 2
    assert taken(group, 40.0) == [("a", 0, 1, 2), ("a", 2, 3, 2)]
    assert group.next_at() == 40.0 + WAIT_S


def test_an_extended_record_outlives_the_rest_of_its_run() -> None:
    group = group_of(3, "a")
    group.take(0.0)
    assert group.extend("a", 1, 20.0)
    assert group.expire(WAIT_S) == 2
    assert group.next_at() == 20.0 + WAIT_S
    assert taken(group, WAIT_S) == [("a", 0, 1, 2), ("a", 2, 3, 2)]
    assert group.expire(20.0 + WAIT_S) == 1


def test_nothing_is_due_when_all_is_settled() -> None:
    group = group_of(3, "a")
    assert group.next_at() is None
    group.take(0.0)
    group.ack("a", 0, 3)
    assert group.next_at() is None
    assert group.expire(1000.0) == 0


# -- What members say ----------------------------------------------------------------------------


def test_acks_may_come_in_any_order() -> None:
    group = group_of(10, "a")
    group.take(0.0)
    assert group.ack("a", 5, 7) == 2
    assert group.committed == 0
    assert group.ack("a", 0, 5) == 5
    assert group.committed == 7
    assert group.ack("a", 9, 10) == 1
    assert group.ack("a", 7, 9) == 2
    assert group.committed == 10


def test_an_ack_that_comes_after_its_lease_still_counts() -> None:
    group = group_of(4, "a", "b", prefetch=2)
    assert taken(group) == [("a", 0, 2, 1), ("b", 2, 4, 1)]
    group.expire(WAIT_S)
    assert group.ack("a", 0, 1) == 1, "while it waits"
    assert taken(group, WAIT_S) == [("a", 1, 3, 2), ("b", 3, 4, 2)]
    assert group.ack("b", 2, 3) == 1, "while another has it"
    group.leave("b")
    assert group.ack("b", 3, 4) == 1, "though it left"
    assert group.counters["late ack"] == 3
    assert group.in_flight == 1
    assert group.ack("a", 1, 2) == 1
    assert group.committed == 4
    assert taken(group, WAIT_S) == []


def test_an_ack_of_a_delayed_record_counts() -> None:
    group = group_of(1, "a")
    group.take(0.0)
    group.nak("a", 0, 0.0, 10.0)
    group.ack("a", 0, 1)
    assert group.committed == 1
    assert group.next_at() is None
    assert taken(group, 10.0) == []


def test_an_ack_is_never_invented() -> None:
    group = group_of(10, "a", prefetch=2)
    group.take(0.0)
    assert group.ack("a", -(1 << 70), 1 << 70) == 2
    assert group.committed == 2
    assert group.counters["undelivered ack"] > 0
    assert group.ack("a", 0, 2) == 0
    assert group.counters["repeated ack"] == 2
    assert group.ack("a", 7, 5) == 0
    assert group.in_flight == 0
    assert taken(group) == [("a", 2, 4, 1)]


def test_a_record_handed_back_goes_out_again_with_its_count() -> None:
    group = group_of(1, "a")
    group.take(0.0)
    assert group.nak("a", 0, 0.0)
    assert taken(group) == [("a", 0, 1, 2)]


def test_a_record_handed_back_with_a_delay_waits_for_it() -> None:
    group = group_of(2, "a")
    group.take(0.0)
    assert group.nak("a", 0, 0.0, delay_s=5.0)
    assert group.next_at() == 5.0
    assert taken(group, 4.9) == []
    assert taken(group, 5.0) == [("a", 0, 1, 2)]


@pytest.mark.parametrize("delay_s", [float("nan"), -1.0, 0.0])
def test_a_delay_that_is_none_does_not_delay(delay_s: float) -> None:
    group = group_of(1, "a")
    group.take(0.0)
    group.nak("a", 0, 0.0, delay_s)
    assert taken(group) == [("a", 0, 1, 2)]


def test_a_delay_is_bounded() -> None:
    group = group_of(1, "a")
    group.take(0.0)
    group.nak("a", 0, 0.0, float("inf"))
    assert group.next_at() == limits.NAK_DELAY_S_MAX


def test_who_does_not_hold_a_record_has_no_say() -> None:
    group = group_of(2, "a", "b", prefetch=1)
    assert taken(group) == [("a", 0, 1, 1), ("b", 1, 2, 1)]
    for member, offset in (("a", 1), ("b", 0), ("nobody", 0), ("a", 2), ("a", -1)):
        assert not group.nak(member, offset, 0.0)
        assert not group.extend(member, offset, 5.0)
        assert not group.reject(member, offset, "no")
    counters = group.counters
    assert [counters[f"late {what}"] for what in ("nak", "extend", "reject")] == [5, 5, 5]
    assert group.in_flight == 2
    assert group.next_at() == WAIT_S
    assert newly_dead(group) == []


# -- Dead letters --------------------------------------------------------------------------------


def test_a_record_is_delivered_no_more_often_than_the_limit() -> None:
    group = group_of(2, "a", max_deliver=3)
    for time in range(1, 4):
        assert offsets_of(group.take(0.0), "a")[0] == 0
        assert newly_dead(group) == []
        assert group.nak("a", 0, 0.0, 0.0), time
    reason = "delivered 3 times, which is the limit (max_deliver)"
    assert newly_dead(group) == [DeadRecord(0, 3, reason)]
    assert newly_dead(group) == [], "each is told of once"
    assert group.counters["dead"] == 1
    group.ack("a", 1, 2)
    assert group.committed == 0
    assert taken(group, 1000.0) == []
    assert group.next_at() is None
    group.buried(0)
    assert group.committed == 2


@pytest.mark.parametrize("how", ["expire", "leave"])
def test_every_way_back_counts_as_a_delivery(how: str) -> None:
    group = group_of(1, "a", max_deliver=1)
    group.take(0.0)
    if how == "expire":
        group.expire(WAIT_S)
    else:
        group.leave("a")
    assert [dead.offset for dead in newly_dead(group)] == [0]


def test_a_rejected_record_is_dead_at_once() -> None:
    group = group_of(3, "a")
    group.take(0.0)
    assert group.reject("a", 1, "x" * 1000)
    assert newly_dead(group) == [DeadRecord(1, 1, "x" * limits.REASON_CHARACTERS_MAX)]
    assert group.in_flight == 2
    group.ack("a", 0, 1)
    group.ack("a", 2, 3)
    assert group.committed == 1
    group.buried(1)
    assert group.committed == 3
    assert taken(group) == []


def test_only_the_dead_are_buried() -> None:
    group = group_of(2, "a")
    group.take(0.0)
    group.buried(0)
    group.buried(7)
    assert group.committed == 0
    assert group.in_flight == 2


def test_an_ack_of_a_dead_record_counts() -> None:
    group = group_of(1, "a", max_deliver=1)
    group.take(0.0)
    group.expire(WAIT_S)
    assert group.ack("a", 0, 1) == 1
    assert newly_dead(group) == []
    group.buried(0)
    assert group.committed == 1


# -- Order by key --------------------------------------------------------------------------------


def keyed(text: str, *members: str, prefetch: int = 10, max_deliver: int = 20) -> Group:
    """Records with one-letter keys; `-` is none."""
    keys = [None if letter == "-" else letter.encode() for letter in text]
    return group_of(
        len(keys), *members, order="key", prefetch=prefetch, max_deliver=max_deliver, keys=keys
    )


def test_records_of_one_key_go_to_one_member_in_order() -> None:
    group = keyed("xyxyxx", "a", "b")
    grants = group.take(0.0)
    assert offsets_of(grants, "a") == [0, 2, 4, 5]
    assert offsets_of(grants, "b") == [1, 3]


def test_a_key_waits_for_the_member_that_has_it() -> None:
    group = keyed("xxx", "a", "b", prefetch=1)
    assert taken(group) == [("a", 0, 1, 1)]
    assert taken(group) == [], "b has room, but x is with a"
    group.ack("a", 0, 1)
    assert len(group.take(0.0)) == 1


def test_a_key_of_which_nothing_is_in_flight_may_go_to_another() -> None:
    group = keyed("xx", "a", prefetch=1)
    group.take(0.0)
    group.join("b", 1)
    group.join("a", 1)
    assert taken(group) == []
    group.ack("a", 0, 1)
    group.leave("a")
    assert taken(group) == [("b", 1, 2, 1)]


def test_a_key_does_not_hold_up_the_others() -> None:
    group = keyed("xxxyzx-", "a", "b", prefetch=2)
    grants = group.take(0.0)
    assert offsets_of(grants, "a") + offsets_of(grants, "b") == [0, 1, 3, 4]
    group.ack("b", 3, 5)
    assert taken(group) == [("b", 6, 7, 1)]


def test_records_without_a_key_have_no_order() -> None:
    group = keyed("----", "a", "b", prefetch=2)
    assert taken(group) == [("a", 0, 2, 1), ("b", 2, 4, 1)]
    group.nak("a", 0, 0.0, 10.0)
    assert group.in_flight == 3


@pytest.mark.parametrize("how", ["nak", "leave", "expire"])
def test_when_a_record_comes_back_those_behind_it_of_its_key_do_too(how: str) -> None:
    group = keyed("xyxyx", "a")
    assert offsets_of(group.take(0.0), "a") == [0, 1, 2, 3, 4]
    group.ack("a", 0, 1)
    group.extend("a", 1, 1.0)
    group.extend("a", 3, 1.0)
    if how == "nak":
        group.nak("a", 2, 0.0)
        assert group.in_flight == 2
    elif how == "expire":
        group.expire(WAIT_S)
        assert group.in_flight == 2
    else:
        group.leave("a")
        group.join("a", 10)
    again = {o: g.deliveries for g in group.take(30.0) for o in range(g.first, g.end)}
    assert again == ({1: 2, 2: 2, 3: 1, 4: 1} if how == "leave" else {2: 2, 4: 1})


def test_those_behind_come_back_without_counting_and_one_before_stays() -> None:
    group = keyed("xxxx", "a", max_deliver=2)
    group.take(0.0)
    group.nak("a", 1, 0.0, 5.0)
    assert group.counters["recalled"] == 2
    assert group.in_flight == 1
    assert taken(group) == [], "nothing of x before the record that is delayed"
    assert taken(group, 5.0) == [("a", 1, 2, 2), ("a", 2, 4, 1)]


def test_what_comes_back_may_go_to_another_member() -> None:
    group = keyed("xx", "a", "b")
    assert taken(group) == [("a", 0, 2, 1)]
    group.leave("a")
    assert taken(group) == [("b", 0, 1, 2), ("b", 1, 2, 1)]


def test_a_late_ack_lets_the_next_of_its_key_go() -> None:
    group = keyed("xx", "a", prefetch=1)
    group.take(0.0)
    group.nak("a", 0, 0.0, 50.0)
    group.ack("a", 0, 1)
    assert taken(group) == [("a", 1, 2, 1)]


def test_the_dead_hold_up_their_key_until_they_are_buried() -> None:
    group = keyed("xxx-", "a", prefetch=2, max_deliver=1)
    group.take(0.0)
    group.nak("a", 0, 0.0)
    assert [dead.offset for dead in newly_dead(group)] == [0]
    assert taken(group) == [("a", 3, 4, 1)]
    group.buried(0)
    assert taken(group) == [("a", 1, 2, 1)]
    group.reject("a", 1, "no")
    assert taken(group) == []
    group.buried(1)
    assert taken(group) == [("a", 2, 3, 1)]


def test_a_reject_leaves_those_behind_where_they_are() -> None:
    group = keyed("xxx", "a")
    group.take(0.0)
    group.reject("a", 0, "no")
    assert group.in_flight == 2
    group.nak("a", 1, 0.0)
    assert group.in_flight == 0
    assert taken(group) == [], "before 0 is buried"
    group.buried(0)
    assert [(g.first, g.deliveries) for g in group.take(0.0)] == [(1, 2), (2, 1)]


def test_every_record_needs_a_key_or_none() -> None:
    group = Group(GroupOptions(order="key"))
    with pytest.raises(ValueError, match="shorter"):
        group.appended(3, [b"x"])


# -- One for all ---------------------------------------------------------------------------------


def exclusive(records: int, *members: str, prefetch: int = 10, max_deliver: int = 20) -> Group:
    return group_of(
        records, *members, order="exclusive", prefetch=prefetch, max_deliver=max_deliver
    )


def test_one_member_has_everything_while_the_others_stand_by() -> None:
    group = exclusive(30, "a", "b", "c")
    assert group.active == "a"
    assert taken(group) == [("a", 0, 10, 1)]
    group.ack("a", 0, 10)
    assert taken(group) == [("a", 10, 20, 1)]


def test_when_the_active_member_leaves_the_next_takes_over_at_once() -> None:
    group = exclusive(4, "a", "b", "c")
    group.take(0.0)
    group.ack("a", 1, 2)
    group.leave("a")
    assert group.active == "b"
    assert taken(group) == [("b", 0, 1, 2), ("b", 2, 4, 1)]
    group.leave("c")
    group.leave("b")
    assert group.active is None
    assert taken(group) == []
    group.join("d", 10)
    assert group.active == "d"
    assert taken(group) == [("d", 0, 1, 3), ("d", 2, 4, 1)]


def test_a_lease_that_is_over_ends_the_turn_of_the_active_member() -> None:
    group = exclusive(4, "a", "b")
    group.take(0.0)
    for offset in (0, 1):
        group.extend("a", offset, 1.0)
    assert group.expire(WAIT_S) == 4, "all of it, extended or not"
    assert group.active == "b"
    assert taken(group, WAIT_S) == [("b", 0, 2, 1), ("b", 2, 3, 2), ("b", 3, 4, 1)]
    assert group.expire(2 * WAIT_S) == 4
    assert group.active == "a", "the one whose lease ended stands by"


def test_a_lease_that_is_over_changes_nothing_while_nobody_stands_by() -> None:
    group = exclusive(3, "a")
    group.take(0.0)
    group.extend("a", 0, 1.0)
    assert group.expire(WAIT_S) == 2
    assert group.active == "a"
    assert taken(group, WAIT_S) == [("a", 1, 2, 2), ("a", 2, 3, 1)]


def test_standing_by_goes_by_turns() -> None:
    group = exclusive(1, "a", "b", "c")
    turns = []
    for turn in range(6):
        group.take(turn * WAIT_S)
        turns.append(group.active)
        group.expire((turn + 1) * WAIT_S)
    assert turns == ["a", "b", "c"] * 2


def test_nothing_overtakes_a_record_that_was_handed_back() -> None:
    group = exclusive(6, "a", prefetch=3)
    group.take(0.0)
    group.nak("a", 1, 0.0, 5.0)
    assert group.in_flight == 1
    group.ack("a", 0, 1)
    assert taken(group) == []
    assert taken(group, 5.0) == [("a", 1, 2, 2), ("a", 2, 4, 1)]


# -- Delayed records -----------------------------------------------------------------------------


def test_a_delayed_record_waits_and_others_do_not() -> None:
    group = group_of(0, "a")
    group.appended(4, delayed={1: 5.0, 3: 7.0, 99: 1.0})
    assert taken(group) == [("a", 0, 1, 1), ("a", 2, 3, 1)]
    assert group.next_at() == 5.0
    assert taken(group, 5.0) == [("a", 1, 2, 1)]
    assert taken(group, 7.0) == [("a", 3, 4, 1)]


def test_a_delayed_record_holds_up_its_key() -> None:
    group = group_of(0, "a", order="key")
    group.appended(4, [b"x", b"x", None, b"y"], {0: 5.0, 2: 1.0})
    assert taken(group) == [("a", 3, 4, 1)]
    assert taken(group, 1.0) == [("a", 2, 3, 1)]
    assert taken(group, 5.0) == [("a", 0, 2, 1)]


def test_a_delayed_record_holds_up_an_exclusive_group() -> None:
    group = group_of(0, "a", order="exclusive")
    group.appended(4, delayed={1: 5.0, 2: 4.0})
    assert taken(group) == [("a", 0, 1, 1)]
    assert taken(group, 4.0) == []
    assert taken(group, 5.0) == [("a", 1, 4, 1)]


# -- Retention -----------------------------------------------------------------------------------


def test_what_retention_took_is_told_as_a_gap() -> None:
    group = group_of(10, "a", prefetch=6)
    group.take(0.0)
    group.ack("a", 0, 1)
    group.ack("a", 3, 5)
    assert group.trimmed(1) is None, "all of it was settled"
    assert group.trimmed(7) == Trimmed(1, 6, 4)
    assert group.counters["trimmed"] == 4
    assert group.committed == 7
    assert group.in_flight == 0
    assert group.next_at() is None
    assert taken(group) == [("a", 7, 10, 1)]
    assert group.trimmed(5) is None


@pytest.mark.parametrize("order", ["any", "key", "exclusive"])
def test_retention_forgets_what_waits_is_delayed_or_dead(order: Order) -> None:
    group = group_of(8, "a", order=order, prefetch=3, keys=[b"x"] * 8)
    group.take(0.0)
    group.reject("a", 2, "no")
    group.nak("a", 0, 0.0, 10.0)
    assert group.trimmed(5) == Trimmed(0, 4, 5)
    assert newly_dead(group) == []
    group.buried(2)
    assert group.next_at() is None
    assert offsets_of(group.take(10.0), "a") == [5, 6, 7]


def test_retention_may_take_what_the_group_never_saw() -> None:
    group = group_of(3, "a")
    assert group.trimmed(100_000_000) == Trimmed(0, 99_999_999, 100_000_000)
    assert group.end == group.committed == 100_000_000
    group.appended(100_000_002)
    assert taken(group) == [("a", 100_000_000, 100_000_002, 1)]


# -- Bounds --------------------------------------------------------------------------------------


def test_a_group_looks_no_further_than_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUP_WINDOW", 10)
    group = group_of(0, "a", prefetch=100)
    assert group.appended(1_000_000) == group.end == group.horizon == 10
    assert taken(group) == [("a", 0, 10, 1)]
    group.ack("a", 1, 10)
    assert group.appended(1_000_000) == 10
    group.ack("a", 0, 1)
    assert group.appended(1_000_000) == 20
    assert taken(group) == [("a", 10, 20, 1)]


def test_keys_beyond_the_window_are_to_be_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUP_WINDOW", 2)
    group = group_of(0, "a", order="key")
    assert group.appended(3, [b"x", b"y", b"z"]) == 2
    group.take(0.0)
    group.ack("a", 0, 2)
    assert group.appended(3, [b"z"]) == 3
    assert taken(group) == [("a", 2, 3, 1)]


# -- The journal ---------------------------------------------------------------------------------


def test_changes_are_told_once() -> None:
    group = group_of(10, "a", prefetch=5)
    assert group.changes() is None
    group.take(0.0)
    group.ack("a", 1, 3)
    assert group.changes() == Progress(((1, 3),), ((0, 1, 1), (3, 5, 1)))
    assert group.changes() is None
    group.nak("a", 0, 0.0)
    group.take(0.0)
    group.ack("a", 3, 4)
    assert group.changes() == Progress(((3, 4),), ((0, 1, 2), (5, 7, 1)))
    assert group.snapshot() == Progress(((1, 4),), ((0, 1, 2), (4, 7, 1)))


def test_a_group_that_starts_late_remembers_where() -> None:
    group = Group(GroupOptions(), start=50)
    assert (group.committed, group.end) == (50, 50)
    assert group.changes() == Progress(((0, 50),))
    assert Group.restore(GroupOptions(), [Progress(((0, 50),))], end=60).committed == 50


def test_a_restored_group_goes_on_where_its_journal_ends() -> None:
    options = GroupOptions()
    group = group_of(10, "a", prefetch=6)
    group.take(0.0)
    group.ack("a", 0, 2)
    group.ack("a", 4, 5)
    restored = Group.restore(options, [group.snapshot()], end=10)
    assert (restored.committed, restored.end, restored.in_flight) == (2, 2, 0)
    assert restored.changes() is None
    restored.appended(10)
    restored.join("b", 100)
    assert taken(restored) == [("b", 2, 4, 2), ("b", 5, 6, 2), ("b", 6, 10, 1)]


def test_the_limit_of_deliveries_holds_across_a_restart() -> None:
    group = group_of(2, "a", max_deliver=2)
    journal = []
    for _ in range(2):
        group.take(0.0)
        change = group.changes()
        assert change is not None
        journal.append(change)
        group = Group.restore(group.options, journal, end=2)
        group.appended(1)
        group.join("a", 10)
    assert taken(group) == []
    assert [(dead.offset, dead.deliveries) for dead in newly_dead(group)] == [(0, 2)]
    assert group.ack("a", 1, 2) == 1, "before the group was told of it"
    group.appended(2)
    assert newly_dead(group) == []
    group.buried(0)
    assert group.committed == 2


def test_pieces_of_a_journal_may_come_twice_and_in_any_order() -> None:
    group = group_of(10, "a")
    pieces = []
    for offset in range(5):
        group.take(0.0)
        group.nak("a", 9, 0.0)
        group.ack("a", offset, offset + 1)
        change = group.changes()
        assert change is not None
        pieces.append(change)
    states = [
        Group.restore(group.options, journal, end=10).snapshot()
        for journal in (pieces, pieces * 2, pieces[::-1], [*pieces, group.snapshot(), pieces[0]])
    ]
    assert states == [group.snapshot()] * 4


def test_an_ack_of_before_the_restart_counts() -> None:
    group = group_of(5, "a")
    group.take(0.0)
    group = Group.restore(group.options, [group.snapshot()], end=5)
    assert group.ack("a", 0, 2) == 2
    group.appended(5)
    group.join("b", 10)
    assert taken(group) == [("b", 2, 5, 2)]


def test_a_journal_that_is_ahead_of_its_log_takes_nothing_from_new_records() -> None:
    group = group_of(10, "a")
    group.take(0.0)
    group.ack("a", 0, 10)
    restored = Group.restore(group.options, [group.snapshot()], end=7)
    assert (restored.committed, restored.end) == (7, 7)
    restored.appended(9)
    restored.join("a", 10)
    assert taken(restored) == [("a", 7, 9, 1)]
    assert restored.snapshot() == Progress(((0, 7),), ((7, 9, 1),))


def test_a_journal_of_nonsense_is_bounded() -> None:
    huge = Progress(((5, 6),), ((0, 1 << 60, 3),))
    restored = Group.restore(GroupOptions(), [huge], end=1 << 60)
    assert sum(end - first for first, end, _ in restored.snapshot().deliveries) < (
        limits.GROUP_WINDOW
    )


# -- Options -------------------------------------------------------------------------------------


def test_options_have_defaults_and_limits() -> None:
    options = GroupOptions()
    assert (options.order, options.ack_wait_s, options.max_deliver) == ("any", 30.0, 20)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"order": "fifo"}, "order must be 'any', 'key' or 'exclusive', not 'fifo'"),
        ({"ack_wait_s": 0}, "ack_wait must be 0.05 to 86,400 s, not 0"),
        ({"ack_wait_s": True}, "ack_wait must be 0.05 to 86,400 s, not True"),
        ({"ack_wait_s": float("nan")}, "ack_wait must be 0.05 to 86,400 s, not nan"),
        ({"max_deliver": 0}, "max_deliver must be an integer from 1 to 1,000,000, not 0"),
        ({"max_deliver": 1.5}, "max_deliver must be an integer from 1 to 1,000,000, not 1.5"),
    ],
)
def test_an_option_that_cannot_work_is_refused(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidOption) as raised:
        GroupOptions(**wrong)  # type: ignore[arg-type]
    assert str(raised.value) == text
