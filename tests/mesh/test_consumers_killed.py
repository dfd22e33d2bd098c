"""The member of an exclusive group that has all of it is killed, and others stand by."""

from __future__ import annotations

import time

import pytest

from mesh import Node
from mesh.durable.consumer import Consumer
from mesh.errors import Timeout
from tests.support.processes import Programs
from tests.support.waiting import until

pytestmark = pytest.mark.slow

AT_ONCE_S = 5.0
"""Of the thirty seconds that a lease has: a killed process is noticed by the kernel's word."""

ACTIVE = """
    import sys
    from mesh import Node

    with Node("active") as node:
        consumer = node.stream("orders").consumer("billing", order="exclusive", prefetch=10)
        for record in consumer:
            if record.payload == int(sys.argv[1]):
                print("holds", record.payload)
                sys.stdin.read()
            record.ack()
            consumer.flush()
"""


def standing_by(node: Node) -> Consumer:
    """A member that has nothing, though there is much to do."""
    consumer = node.stream("orders").consumer("billing", order="exclusive")
    with pytest.raises(Timeout):
        consumer.recv(0.2)
    return consumer


def take(consumer: Consumer, count: int) -> list[object]:
    taken = []
    for _ in range(count):
        record = consumer.recv(10)
        taken.append(record.payload)
        record.ack()
    return taken


def test_who_stands_by_goes_on_at_once_with_all_that_a_killed_member_has_not_done(
    node: Node, programs: Programs
) -> None:
    orders = node.stream("orders")
    orders.append_many(range(20))
    active = programs.start(ACTIVE, "5")
    active.expect("holds 5")
    with standing_by(node) as second, standing_by(node) as third:
        active.kill()
        killed = time.monotonic()
        assert take(second, 15) == [*range(5, 20)], "in order, the one that it held first"
        assert time.monotonic() - killed < AT_ONCE_S
        orders.append("later")
        assert take(second, 1) == ["later"]
        with pytest.raises(Timeout):
            third.recv(0.2)  # one at a time is active


def test_one_after_the_other_is_killed_and_all_is_done_in_order(
    node: Node, programs: Programs
) -> None:
    """Each held a record that it had not done, and some behind that."""
    orders = node.stream("orders")
    orders.append_many(range(40))
    held = [5, 11, 23]
    first = programs.start(ACTIVE, str(held[0]))
    first.expect(f"holds {held[0]}")
    others = []
    for number, members in zip(held[1:], (2, 3), strict=True):
        others.append(programs.start(ACTIVE, str(number)))
        until(lambda members=members: members_of(node) == members)  # type: ignore[misc]
    with standing_by(node) as last:
        for victim, heir, number in zip([first, *others], others, held[1:], strict=False):
            victim.kill()
            heir.expect(f"holds {number}", AT_ONCE_S)
        others[-1].kill()
        killed = time.monotonic()
        assert take(last, 40 - held[-1]) == [*range(held[-1], 40)]
        assert time.monotonic() - killed < AT_ONCE_S
        last.flush()
        assert [*last.committed.values()] == [40], "nothing is left open"


def members_of(node: Node) -> int:
    (stats,) = node.stream("orders").stats().values()
    return stats.groups["billing"].members
