"""How a partition is read on and on: what is asked, and when again; and that nobody else has to
wait for that."""

from __future__ import annotations

import threading
import time

import pytest

from mesh.durable.batch import batch
from mesh.durable.cursor import Gap
from mesh.durable.outcomes import Appended
from mesh.durable.protocol import Query, Read
from mesh.durable.reader import PartitionReader, read
from mesh.durable.route import Ask, LocalRoute
from mesh.durable.sidecar import Sidecar
from tests.durable.test_sidecar import Asking, payloads_in
from tests.support.fake_disk import FakeDisk, FakeFile
from tests.support.partitions import numbered
from tests.support.waiting import until


def test_a_sidecar_that_is_about_to_close_is_asked_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may take as long as its node has time: whoever follows asked thousands of times."""
    monkeypatch.setattr("mesh.durable.reader.ASK_AGAIN_S", 0.05)
    sidecar = Sidecar(FakeDisk())
    Asking(sidecar).append("a")
    sidecar.dismiss()
    route = LocalRoute(sidecar)
    asked: list[Query] = []
    begin = route.begin

    def counted(query: Query) -> Ask:
        asked.append(query)
        return begin(query)

    monkeypatch.setattr(route, "begin", counted)
    reader = PartitionReader(route, "orders", 1 << 26)
    reader.follow, reader.offset = True, 1
    began = time.monotonic()
    assert read(reader, 10, stopped=lambda: len(asked) == 4) == []
    assert time.monotonic() - began >= 0.15
    sidecar.close()


@pytest.mark.parametrize("directly", [True, False])
def test_records_that_nobody_can_read_are_a_gap_and_what_is_behind_them_is_read(
    directly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As some producer of its own making may append, and its log is not damaged."""
    sidecar = Sidecar(FakeDisk())
    asking = Asking(sidecar)
    asking.append("a")
    route = LocalRoute(sidecar)
    odd = numbered(batch([b"\x91\x01"], count=5), 7, asking.epoch, 1)
    appended = route.append("orders", odd)
    until(lambda: route.reply(appended) is not None)
    asking.seq += 5
    asking.append("b")
    reader = PartitionReader(route, "orders", 1 << 26)
    found: list[object] = []
    while reader.offset < 7:
        chunk = (
            reader.direct()
            if directly
            else reader.answered(asking.told(Read("orders", reader.offset)))
        )
        assert chunk
        if isinstance(chunk, Gap):
            found.append(chunk)
        else:
            assert isinstance(chunk, list)
            found += [record.payload for run in chunk for record in run]
    assert found == ["a", Gap(1, 5), "b"]
    assert caplog.text.count("records 1 to 5") == 1
    reader.close()
    sidecar.close()


def test_an_append_does_not_wait_for_who_reads_however_long_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, go_on = threading.Event(), threading.Event()
    read_file = FakeFile.read

    def slow(file: FakeFile, at: int, length: int) -> bytes:
        if not held.is_set():
            held.set()
            assert go_on.wait(30)
        return read_file(file, at, length)

    sidecar = Sidecar(FakeDisk())
    asking, reading = Asking(sidecar), Asking(sidecar)
    asking.append("a")
    monkeypatch.setattr(FakeFile, "read", slow)
    reading.ask(Read("orders", 0))
    assert held.wait(10)
    try:
        for payload in ("b", "c"):
            assert isinstance(asking.append(payload), Appended)
        assert reading.answers.empty()
    finally:
        go_on.set()
    assert payloads_in(reading.answer(), sidecar)[:1] == ["a"]
    sidecar.close()
