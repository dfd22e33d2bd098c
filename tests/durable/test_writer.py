"""What the thread that writes a partition promises: all is answered once and in order, and what
waits is written together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue

import pytest

from mesh.durable.log import Log
from mesh.durable.outcomes import Appended, Opened, Outcome, Refused
from mesh.durable.partition import Opening, Partition
from mesh.durable.records import batch_of
from mesh.durable.writer import Writer
from mesh.options import StreamOptions
from tests.support.fake_disk import FakeDisk, FakeFile
from tests.support.logs import sound
from tests.support.partitions import numbered, open_partition, payloads, record
from tests.support.waiting import until


class Answers:
    """What a writer has answered."""

    def __init__(self) -> None:
        self.got: list[tuple[int, Outcome]] = []
        self._more = threading.Condition()

    def take(self, number: int, outcome: Outcome) -> None:
        with self._more:
            self.got.append((number, outcome))
            self._more.notify_all()

    def wait_for(self, count: int) -> list[tuple[int, Outcome]]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.got) >= count, timeout=10), self.got
        return self.got


class Gate:
    """Holds up every sync of a disk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = 0
        self._open = threading.Event()
        sync = FakeFile.sync

        def held_up(file: FakeFile) -> None:
            self.waiting += 1
            assert self._open.wait(10)
            sync(file)

        monkeypatch.setattr(FakeFile, "sync", held_up)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine does meanwhile."""
    monkeypatch.setattr("mesh.durable.writer._QUICK_S", 1000.0)


class Setting:
    """A partition, its writer, and a producer that submits."""

    def __init__(self, disk: FakeDisk, options: StreamOptions | None = None, **more: float) -> None:
        self.partition: Partition = open_partition(disk, options, segment_bytes=1 << 20)
        self.writer = Writer(self.partition, "orders", **more)  # type: ignore[arg-type]
        self.answers = Answers()
        self.seq = 0
        outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self.writer.submit(Opening(1), outcomes.put)
        opened = outcomes.get(timeout=10)
        assert isinstance(opened, Opened)
        self.epoch = opened.epoch

    def submit(self, payload: object = "x", **more: bool) -> Callable[[], None] | None:
        batch = numbered(batch_of([record(payload)]), 1, self.epoch, self.seq)
        self.seq += 1
        return self.writer.submit(batch, partial(self.answers.take, self.seq - 1), **more)

    def rested(self) -> None:
        """Wait until the writer sleeps: whoever submits then may stand in for it."""
        until(lambda: self.writer._asleep)


@pytest.fixture
def setting(disk: FakeDisk) -> Iterator[Setting]:
    setting = Setting(disk)
    yield setting
    assert setting.writer.close()
    sound(disk)


def test_all_are_answered_once_and_in_order(setting: Setting) -> None:
    for n in range(500):
        setting.submit(n)
    answers = setting.answers.wait_for(500)
    assert [(number, outcome.offset) for number, outcome in answers] == [  # type: ignore[union-attr]
        (n, n) for n in range(500)
    ]
    assert payloads(setting.partition) == list(range(500))


def test_what_comes_during_a_sync_shares_the_next(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(disk)
    gate = Gate(monkeypatch)
    setting.submit()
    until(lambda: gate.waiting == 1)
    for _ in range(100):
        setting.submit()
    gate.open()
    setting.answers.wait_for(101)
    assert gate.waiting == 2
    assert setting.writer.close()


def test_nothing_is_answered_before_it_is_on_disk(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(disk)
    gate = Gate(monkeypatch)
    setting.submit()
    until(lambda: gate.waiting == 1)
    assert setting.answers.got == []
    gate.open()
    assert isinstance(setting.answers.wait_for(1)[0][1], Appended)
    assert setting.writer.close()


def test_who_submits_waits_while_too_much_waits(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(disk, queue_bytes_max=1000)
    gate = Gate(monkeypatch)
    submitted = []

    def submit() -> None:
        for n in range(50):
            setting.submit("x" * 100)
            submitted.append(n)

    thread = threading.Thread(target=submit)
    thread.start()
    until(lambda: gate.waiting == 1)
    until(lambda: setting.writer._room._waiters)  # type: ignore[attr-defined]
    assert len(submitted) < 15
    setting.submit(patient=False)
    gate.open()
    thread.join(10)
    setting.answers.wait_for(51)
    assert setting.writer.close()


def test_what_was_submitted_is_written_before_it_closes(setting: Setting, disk: FakeDisk) -> None:
    for n in range(100):
        setting.submit(n)
    assert setting.writer.close()
    assert len(setting.answers.got) == 100
    setting.submit()
    number, outcome = setting.answers.got[-1]
    assert number == 100
    assert isinstance(outcome, Refused)
    assert outcome.code == "closed"
    assert payloads(open_partition(disk.kill(), segment_bytes=1 << 20)) == list(range(100))


def test_who_waits_for_room_is_refused_when_it_closes(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(disk, queue_bytes_max=50)
    gate = Gate(monkeypatch)
    setting.submit()
    until(lambda: gate.waiting == 1)
    setting.submit()
    waiting = threading.Thread(target=setting.submit)
    waiting.start()
    until(lambda: setting.writer._room._waiters)  # type: ignore[attr-defined]
    assert not setting.writer.close(0)
    waiting.join(10)
    assert [number for number, _ in setting.answers.got] == [2]
    gate.open()
    assert setting.writer.close()
    assert len(setting.answers.got) == 3


def test_an_answer_that_raises_costs_nobody_else_theirs(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(outcome: Outcome) -> None:
        raise RuntimeError("the caller's own")

    setting.writer.submit(Opening(2), fail)
    setting.submit()
    setting.answers.wait_for(1)
    assert "the caller's own" in caplog.text


def test_a_failure_nobody_thought_of_is_told_and_the_writer_goes_on(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(setting.partition, "_decide", lambda *_: 1 / 0)
        setting.submit("a")
        ((_, outcome),) = setting.answers.wait_for(1)
    assert isinstance(outcome, Refused)
    assert "ZeroDivisionError" in caplog.text
    setting.seq -= 1
    setting.submit("b")
    assert setting.answers.wait_for(2)[1] == (0, setting.answers.got[1][1])
    assert payloads(setting.partition) == ["b"]


def test_an_interval_stream_is_synced_soon_without_anybody_waiting(disk: FakeDisk) -> None:
    setting = Setting(disk, StreamOptions(durability="interval"), interval_s=0.01)
    setting.submit()
    setting.answers.wait_for(1)
    until(lambda: setting.partition.log.synced_end == 1)
    assert setting.writer.close()


def test_who_waits_is_told_of_what_a_failed_sync_has_cut_off(disk: FakeDisk) -> None:
    log: list[Log] = []
    told = threading.Event()

    def appended() -> None:
        if log and log[0].unsynced_lost:
            told.set()

    setting = Setting(
        disk,
        StreamOptions(durability="interval"),
        interval_s=0.01,
        appended=appended,  # type: ignore[arg-type]
    )
    log.append(setting.partition.log)
    until(lambda: setting.writer._asleep and setting.writer._unsynced_since is None)
    disk.faults.fail("sync")
    setting.submit()
    assert told.wait(10)
    assert setting.writer.close()


def test_what_is_run_between_groups_comes_behind_what_was_submitted(setting: Setting) -> None:
    ends: SimpleQueue[int] = SimpleQueue()
    setting.submit()
    setting.writer.run(lambda: ends.put(setting.partition.log.end))
    setting.submit()
    assert ends.get(timeout=10) == 1
    setting.answers.wait_for(2)


def test_a_log_that_rests_is_marked(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.durable.writer._REST_S", 0.01)
    size = setting.partition.log.size
    setting.submit()
    setting.answers.wait_for(1)
    written = setting.partition.log.size

    def marked() -> bool:
        setting.writer.tick()
        return setting.partition.log.size > written

    until(marked)
    assert size < written


@pytest.mark.usefixtures("quick")
def test_who_submits_alone_writes_itself(setting: Setting) -> None:
    setting.rested()
    write = setting.submit("a", lone=True)
    assert write is not None
    assert setting.answers.got == []
    write()
    assert [number for number, _ in setting.answers.got] == [0]
    setting.submit("b")
    setting.answers.wait_for(2)
    assert payloads(setting.partition) == ["a", "b"]


@pytest.mark.usefixtures("quick")
def test_what_one_left_that_was_to_write_itself_goes_with_the_next(setting: Setting) -> None:
    setting.rested()
    write = setting.submit("a", lone=True)
    setting.submit("b", lone=True)
    assert [number for number, _ in setting.answers.wait_for(2)] == [0, 1]
    assert write is not None
    write()
    write()
    assert payloads(setting.partition) == ["a", "b"]
    assert len(setting.answers.got) == 2


@pytest.mark.usefixtures("quick")
def test_what_one_left_that_was_to_write_itself_is_written_by_and_by(setting: Setting) -> None:
    setting.rested()
    assert setting.submit("a", lone=True) is not None
    setting.writer.tick()
    setting.answers.wait_for(1)


@pytest.mark.usefixtures("quick")
def test_what_was_to_be_written_by_who_submitted_is_written_before_the_end(disk: FakeDisk) -> None:
    setting = Setting(disk)
    setting.rested()
    write = setting.submit("a", lone=True)
    assert setting.writer.close()
    assert isinstance(setting.answers.got[0][1], Appended)
    assert write is not None
    write()
    assert len(setting.answers.got) == 1
    sound(disk)


@pytest.mark.usefixtures("quick")
def test_others_wait_for_who_writes_itself_and_share_the_next_sync(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(disk)
    setting.rested()
    write = setting.submit("a", lone=True)
    gate = Gate(monkeypatch)
    assert write is not None
    thread = threading.Thread(target=write)
    thread.start()
    until(lambda: gate.waiting == 1)
    for _ in range(10):
        assert setting.submit(lone=True) is None
    gate.open()
    thread.join(10)
    assert [number for number, _ in setting.answers.wait_for(11)] == list(range(11))
    assert gate.waiting == 2
    assert setting.writer.close()
    sound(disk)


def test_where_a_disk_is_slow_the_writer_writes(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.durable.writer._QUICK_S", 0.0)
    setting.rested()
    assert setting.submit(lone=True) is None
    setting.answers.wait_for(1)


@pytest.mark.usefixtures("quick")
def test_where_a_sync_is_due_later_the_writer_writes(disk: FakeDisk) -> None:
    setting = Setting(disk, StreamOptions(durability="interval"), interval_s=0.01)
    setting.rested()
    assert setting.submit(lone=True) is None
    setting.answers.wait_for(1)
    until(lambda: setting.partition.log.synced_end == 1)
    assert setting.writer.close()


@pytest.mark.usefixtures("quick")
def test_who_writes_itself_makes_room_for_who_waits(disk: FakeDisk) -> None:
    setting = Setting(disk, queue_bytes_max=50)
    setting.rested()
    write = setting.submit("a", lone=True)
    assert write is not None
    waiting = threading.Thread(target=setting.submit, daemon=True)
    waiting.start()
    until(lambda: setting.writer._room._waiters)  # type: ignore[attr-defined]
    write()
    setting.answers.wait_for(2)
    assert setting.writer.close()
    sound(disk)
