"""A stream on a disk that is full: appends are refused, or wait; all else goes on, and what that
makes room for is taken."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import Node
from mesh.durable.consumer import Consumer
from mesh.durable.storage import Disk
from mesh.durable.stream import Stream
from mesh.errors import LogFull, Timeout
from mesh.options import StreamOptions
from tests.support.faults import filled, loop_disk, small_disk
from tests.support.integrity import sound_sidecar
from tests.support.processes import Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

pytestmark = pytest.mark.slow

DISK_BYTES = 40 << 20
"""Room for two segments and a half: retention gives up whole ones."""
PAD = b"x" * 100_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, DISK_BYTES) as disk:
        yield disk
        sound_sidecar(Disk(disk / "log"))


@pytest.fixture(params=["embedded", "sidecar"])
def node(request: pytest.FixtureRequest, disk: Path, programs: Programs) -> Iterator[Node]:
    """One whose streams are in its own process, or in another."""
    if request.param == "embedded":
        with Node("writer", durable=disk / "log") as node:
            yield node
    else:
        sidecar = programs.start(SIDECAR, str(disk / "log"))
        sidecar.expect("ready")
        with Node("writer") as node:
            yield node
        sidecar.tell()
        assert sidecar.finish()[0] == 0  # it has to let go of the disk


def test_who_cannot_join_for_want_of_room_is_told_so_and_comes_in_when_there_is(
    node: Node, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A group's journal takes some."""
    orders = node.stream("orders")
    orders.append("first")
    with orders.consumer("shipping") as consumer:
        with filled(disk):
            text = "no record within 0.5 s: group 'shipping': .* No space left on device"
            with pytest.raises(Timeout, match=text):
                consumer.recv(timeout=0.5)
            until(lambda: "consumer 'shipping' of stream 'orders' waits: group" in caplog.text)
        assert consumer.recv(timeout=10).payload == "first"


def test_letters_that_cannot_be_had_for_want_of_room_are_not_taken_for_none(
    node: Node, disk: Path
) -> None:
    orders = node.stream("orders")
    orders.append("bad")
    with orders.consumer("billing") as consumer:
        consumer.recv(10).reject()
        with node.stream("orders.dead").replay(follow=True) as letters:
            assert next(iter(letters)).payload == "bad"
    redrive = [sys.executable, "-m", "mesh", "log", "redrive", "orders", "--timeout", "1"]
    with filled(disk):
        run = subprocess.run(redrive, capture_output=True, text=True, timeout=30, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    text = "mesh: 0 dead letters of orders are appended again, and 1 are left: no record within 1 s"
    said = run.stderr.splitlines()[-1]
    assert said.startswith(f"{text}: group 'mesh-redrive': ")
    assert said.endswith("No space left on device")


def append_on(orders: Stream, appended: list[int]) -> None:
    for number in range(DISK_BYTES // len(PAD)):
        orders.append([number, PAD])
        appended.append(number)


def fill(orders: Stream) -> int:
    """Append until that is refused. How many it were."""
    appended: list[int] = []
    with pytest.raises(LogFull, match="No space left on device"):
        append_on(orders, appended)
    return len(appended)


def numbers(orders: Stream) -> list[int]:
    return [record.payload[0] for record in orders.replay()]


def take(consumer: Consumer, count: int) -> list[int]:
    taken = []
    for _ in range(count):
        record = consumer.recv(10)
        taken.append(record.payload[0])
        record.ack()
    return taken


def test_what_was_acknowledged_makes_room_on_a_full_disk_for_what_waits(
    node: Node, disk: Path
) -> None:
    orders = node.stream("orders", options=StreamOptions(retention="acked"))
    waiting = node.stream("orders", when_full="wait")
    with orders.consumer("billing", prefetch=1000) as consumer:
        orders.append([-1])
        assert take(consumer, 1) == [-1]
        consumer.flush(timeout=10)
        count = fill(orders)
        with filled(disk):  # not even a page is left
            with pytest.raises(LogFull):
                orders.append([-2, PAD])
            with pytest.raises(Timeout):
                waiting.append([count, PAD], timeout=0.2)
            assert numbers(orders) == [-1, *range(count)], "each is there, and none in part"
            assert take(consumer, count) == [*range(count)]
            consumer.flush(timeout=10)
            waiting.flush(timeout=20)
            assert orders.append([count + 1, PAD]).offset == count + 2
            ((start, end),) = orders.bounds().values()
            assert (start > 100, end) == (True, count + 3)
            assert numbers(orders) == [*range(start - 1, count + 2)]
            assert take(consumer, 2) == [count, count + 1]
    (stats,) = orders.stats().values()
    assert set(stats.refused) == {"full"}


def test_a_full_disk_takes_appends_again_once_somebody_makes_room(node: Node, disk: Path) -> None:
    orders = node.stream("orders")
    waiting = node.stream("orders", when_full="wait")
    orders.append([-1])
    with filled(disk, room_bytes=1 << 20):
        count = fill(orders)
        assert count > 2
        under_way = waiting.append_nowait([count, PAD])
        with pytest.raises(Timeout):
            under_way.wait(0.2)
        assert numbers(orders) == [-1, *range(count)]
    assert under_way.wait(20).offset == count + 1
    assert orders.append([count + 1, PAD]).offset == count + 2
    assert numbers(orders) == [*range(-1, count + 2)]


def test_a_work_queue_of_small_records_that_has_filled_its_disk_goes_on(tmp_path: Path) -> None:
    """On a file system that has no room for the group's journal either, till something goes."""
    with loop_disk(tmp_path, 8 << 20) as disk:
        options = StreamOptions(retention="acked", bytes_max=16 << 20)  # in segments of 4 MiB
        with Node("one", durable=disk.path / "log") as node:
            orders = node.stream("orders", options=options)
            orders.append(-1)
            with orders.consumer("billing", prefetch=4096) as consumer:
                consumer.recv(10).ack()
                consumer.flush()
                count = 1
                for many in (500, 1):
                    with contextlib.suppress(LogFull):
                        while True:
                            orders.append_many([bytes(100)] * many)
                            count += many
                with pytest.raises(LogFull):
                    orders.append(bytes(100))
                for _ in range(count - 1):
                    consumer.recv(10).ack()
                consumer.flush()
                waiting = node.stream("orders", when_full="wait")
                assert waiting.append(bytes(5000), timeout=30).offset == count
                ((start, _),) = orders.bounds().values()
                assert 0 < start < count
        with Node("one", durable=disk.path / "log") as node:
            orders = node.stream("orders")
            with orders.consumer("billing") as consumer:
                assert consumer.recv(10).offset >= start
                assert consumer.gaps == []
            assert orders.append(0).offset == count + 1
        sound_sidecar(Disk(disk.path / "log"))
