"""What a consumer makes of a sidecar that sends nonsense: it is told, and waits for nothing."""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from mesh.durable.deliveries import AskedOptions, Delivery
from mesh.durable.group import GroupOptions
from mesh.durable.protocol import Delivered, Join, Joined, Query, Reply
from mesh.durable.route import Ask, LocalRoute
from mesh.durable.seat import Seat, Taken
from mesh.durable.sidecar import Sidecar
from mesh.errors import StorageFailed
from mesh.sockets.link import Recipient
from tests.support.fake_disk import FakeDisk


class _Answered:
    waiter: Recipient | None = None

    def __init__(self, reply: Reply) -> None:
        self.outcome = reply


@pytest.mark.parametrize(
    ("delivery", "text"),
    [
        (Delivery(((0, 1, 1),), (b"no batch at all",)), "cannot be decoded"),
        (Delivery(((0, 1, 1),), ()), "granted what it did not send"),
    ],
)
def test_who_consumes_is_told_of_a_sidecar_that_sends_nonsense(
    delivery: Delivery, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = Sidecar(FakeDisk())
    route = LocalRoute(sidecar)

    def begin(query: Query) -> Ask:
        joins = isinstance(query, Join)
        return _Answered(Joined(GroupOptions(), 0, 1) if joins else Delivered(delivery))

    monkeypatch.setattr(route, "begin", begin)
    monkeypatch.setattr(route, "reply", lambda ask: ask.outcome)
    handed: SimpleQueue[Taken] = SimpleQueue()
    seat = Seat(
        route,
        "orders",
        "billing",
        "member",
        prefetch=10,
        options=AskedOptions(),
        from_ns=None,
        resume=None,
        message_bytes_max=1 << 26,
        hand_over=lambda _, taken: handed.put(taken),
    )
    seat.start()
    error = handed.get(timeout=10)
    assert isinstance(error, StorageFailed)
    assert text in str(error)
    seat.close()
    sidecar.close()
