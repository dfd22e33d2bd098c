"""A stream that shows records before they are on disk, and a host whose failure takes the last of
them: who had them is told, and gets what took their place."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from mesh import Node
from mesh.durable.consumed import ConsumedRecord
from mesh.durable.replay import Replay
from mesh.durable.stream import Stream
from mesh.errors import Timeout
from mesh.options import StreamOptions
from tests.mesh.test_streams import sound
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

pytestmark = pytest.mark.slow


class Host:
    """One with a sidecar, which fails as machines do."""

    def __init__(self, directory: Path, programs: Programs) -> None:
        self._directory = directory
        self._programs = programs
        self._sidecar: Program = self._start()

    def _start(self) -> Program:
        sidecar = self._programs.start(SIDECAR, str(self._directory))
        sidecar.expect("ready")
        return sidecar

    @property
    def _segment(self) -> Path:
        return max((self._directory / "streams" / "orders").glob("*.log"))

    @property
    def size(self) -> int:
        """Of what was appended so far."""
        return self._segment.stat().st_size

    def fails(self, at: int) -> None:
        """The machine stops, and of what was appended so much had got to the disk."""
        self._sidecar.kill()
        self._sidecar.finish()
        os.truncate(self._segment, at)

    def comes_back(self) -> None:
        self._sidecar = self._start()


@pytest.fixture
def host(tmp_path: Path, programs: Programs) -> Host:
    return Host(tmp_path / "log", programs)


def orders_of(node: Node) -> Stream:
    """A new handle: the one that had appended what is lost is told that its outcome is unknown."""
    return node.stream("orders", options=StreamOptions(durability="os"))


def kept_and_lost(orders: Stream, host: Host) -> int:
    """Records 0 to 2, and then 3 and 4, which are about to be lost; where they begin."""
    for n in range(3):
        orders.append(n)
    size = host.size
    for n in range(3, 5):
        orders.append(n)
    return size


def test_who_follows_is_told_what_is_lost_and_reads_what_took_its_place(host: Host) -> None:
    with Node("writer") as writer, Node("reader") as reader:
        size = kept_and_lost(orders_of(writer), host)
        replay = reader.stream("orders").replay(follow=True)
        read: list[tuple[int, object, int]] = []

        def follow() -> None:
            for record in replay:
                read.append((record.offset, record.payload, record.log_epoch))

        thread = threading.Thread(target=follow)
        thread.start()
        until(lambda: len(read) == 5)
        host.fails(size)
        host.comes_back()
        receipts = [orders_of(writer).append(text) for text in ("other 3", "other 4", "other 5")]
        until(lambda: len(read) == 8)
        replay.close()
        thread.join(10)
        assert [each[:2] for each in read] == [
            *((n, n) for n in range(5)),
            *((n, f"other {n}") for n in range(3, 6)),
        ]
        assert replay.cuts == [(receipts[0].partition, 3, 4)]
        assert read[4][2] < read[5][2]
        assert [r.payload for r in reader.stream("orders").replay()][3:] == [
            "other 3",
            "other 4",
            "other 5",
        ]


def test_a_replay_keeps_the_latest_cuts_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.durable.replay._GAPS_MAX", 1)
    with Node("writer") as writer:
        size = kept_and_lost(orders_of(writer), host)
        replay = writer.stream("orders").replay(follow=True)
        records = iter(replay)
        for _ in range(5):
            next(records)
        for last in (4, 3):
            host.fails(size)
            host.comes_back()
            receipt = orders_of(writer).append("other")
            assert next(records).offset == 3
            assert replay.cuts == [(receipt.partition, 3, last)]
        replay.close()


def test_who_follows_in_asyncio_is_told_the_same(host: Host) -> None:
    async def main(orders: Stream, again: Stream) -> None:
        size = kept_and_lost(orders, host)
        replay = orders.replay(follow=True)
        read: list[object] = []
        async for record in replay:
            read.append(record.payload)
            if len(read) == 5:
                host.fails(size)
                host.comes_back()
                await again.aappend("other")
            if read[-1] == "other":
                break
        replay.close()
        assert read == [0, 1, 2, 3, 4, "other"]
        assert [cut[1:] for cut in replay.cuts] == [(3, 4)]

    with Node("writer") as writer:
        asyncio.run(asyncio.wait_for(main(orders_of(writer), orders_of(writer)), 15))


@pytest.mark.parametrize("read_before", [1, 4])
def test_a_finite_replay_ends_where_what_it_had_before_it_is_lost(
    host: Host, monkeypatch: pytest.MonkeyPatch, read_before: int
) -> None:
    monkeypatch.setattr("mesh.limits.READ_BYTES", 1)

    def rest_of(replay: Replay) -> list[object]:
        records = iter(replay)
        for _ in range(read_before):
            next(records)
        host.fails(size)
        host.comes_back()
        return [record.payload for record in records]

    with Node("writer") as writer:
        orders = orders_of(writer)
        size = kept_and_lost(orders, host)
        orders.append(5)
        replay = writer.stream("orders").replay()
        ahead = max(4, read_before + 1)  # one is asked for beforehand, and may have come
        assert rest_of(replay) in ([*range(read_before, 3)], [*range(read_before, ahead)], [])
        assert replay.cuts
        assert {cut[1] for cut in replay.cuts} == {3}
        assert max(cut[2] for cut in replay.cuts) == 5


def test_a_finite_replay_in_asyncio_ends_there_as_well(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.READ_BYTES", 1)

    async def main(orders: Stream) -> None:
        size = kept_and_lost(orders, host)
        replay = orders.replay()
        read: list[object] = []
        async for record in replay:
            if not read:
                host.fails(size)
                host.comes_back()
            read.append(record.payload)
        assert read in ([0, 1, 2], [0, 1, 2, 3])
        assert replay.cuts

    with Node("writer") as writer:
        asyncio.run(asyncio.wait_for(main(orders_of(writer)), 15))


def test_what_is_said_of_a_lost_record_is_not_said_of_the_one_in_its_place(host: Host) -> None:
    with Node("writer") as writer, Node("reader") as reader:
        size = kept_and_lost(orders_of(writer), host)
        with reader.stream("orders").consumer("billing") as consumer:
            records = [consumer.recv(10) for _ in range(5)]
            for record in records[:3]:
                record.ack()
            consumer.flush()
            host.fails(size)
            host.comes_back()
            partition = orders_of(writer).append("other 3").partition
            orders_of(writer).append("other 4")
            others = [consumer.recv(10), consumer.recv(10)]
            assert [each.payload for each in others] == ["other 3", "other 4"]
            assert consumer.cuts == [(partition, 3, 4)]
            for record in records:
                record.ack()
            records[3].reject("never")
            consumer.flush()
            assert consumer.committed == {partition: 3}
            others[1].nak()
            again = consumer.recv(10)
            assert (again.payload, again.deliveries) == ("other 4", 2)
            others[0].ack()
            again.ack()
            consumer.flush()
            assert consumer.committed == {partition: 5}


def test_what_was_made_of_a_lost_record_hides_nothing_of_the_one_in_its_place(
    host: Host,
) -> None:
    with Node("writer") as writer:
        size = kept_and_lost(orders_of(writer), host)
        bills = writer.stream("bills")

        def billed(record: ConsumedRecord) -> bool:
            return bills.append(record.payload, derived_from=record).repeated

        with writer.stream("orders").consumer("billing") as consumer:
            records = [consumer.recv(10) for _ in range(5)]
            assert [billed(each) for each in records] == [False] * 5
            assert billed(records[4])
            host.fails(size)
            host.comes_back()
            orders_of(writer).append("other 3")
            others = [consumer.recv(10) for _ in range(4)]
            with pytest.raises(Timeout):
                consumer.recv(0.2)
            assert [each.payload for each in others] == [0, 1, 2, "other 3"]
            assert [billed(each) for each in others] == [True, True, True, False]


def test_a_log_that_has_lost_its_end_is_sound(host: Host, tmp_path: Path) -> None:
    with Node("writer") as writer:
        size = kept_and_lost(orders_of(writer), host)
        host.fails(size + 5)
        host.comes_back()
        assert orders_of(writer).append("other").offset == 3
    host.fails(host.size)
    sound(tmp_path / "log")
