"""The way to a sidecar in the same process: nobody who asks holds up who answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mesh.durable.appender import Appender, Pending
from mesh.durable.appending import append, wait
from mesh.durable.records import batch_of
from mesh.durable.route import LocalRoute
from mesh.durable.sidecar import Sidecar
from mesh.sockets.flusher import Flusher
from tests.durable.test_writer import Gate
from tests.support.fake_disk import FakeDisk
from tests.support.partitions import record
from tests.support.waiting import until


@pytest.fixture
def sidecar() -> Iterator[Sidecar]:
    sidecar = Sidecar(FakeDisk())
    yield sidecar
    sidecar.close()


def test_a_producer_that_begins_while_too_much_waits_does_not_hold_up_the_writer(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks has the lock that the writer takes to answer those before."""
    route = LocalRoute(sidecar)

    def producer(number: int) -> Appender:
        return Appender(route, "orders", number, None, flusher=Flusher(0), bytes_max=1 << 20)

    def submitted(appender: Appender) -> Pending:
        return route.link.run(lambda: appender.submit(batch_of([record("x")])))

    first, second = producer(1), producer(2)
    append(first, batch_of([record("x")]), None)
    hosted = sidecar.hosted("orders")
    assert hosted is not None
    assert hosted._writer is not None
    hosted._writer._queue_bytes_max = 100
    gate = Gate(monkeypatch)
    pendings = [submitted(first)]
    until(lambda: gate.waiting == 1)
    pendings += [submitted(first) for _ in range(5)]
    begun = threading.Thread(target=lambda: pendings.append(submitted(second)), daemon=True)
    begun.start()
    begun.join(0.2)
    gate.open()
    begun.join(5)
    assert not begun.is_alive()
    wait(second, pendings[-1], None)
    wait(first, pendings[-2], None)
