"""Where a log may lose what its readers have seen, others get the offsets of what it has lost: for
a group that had settled those, they are new."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.groups import Groups
from mesh.durable.log import Log
from tests.durable.test_groups import contents, deliver, fill, numbered
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION, sound


class Setting:
    """A log with three records that are on disk and one that is not, and a group that has settled
    all of them, and has that on disk."""

    def __init__(self) -> None:
        self.disk = FakeDisk()
        self.open()
        fill(self.log, *numbered(3))
        self.groups.open("g", AskedOptions(), 0)
        self.groups.join("g", "a", 10)
        fill(self.log, "lost", synced=False)
        assert len(contents(deliver(self.groups, "a"))) == 4
        self.groups.settle("g", "a", Settlements(acks=((0, 4),)), 0.0)
        self.groups.sync()

    def open(self) -> None:
        self.log = Log(self.disk, PARTITION, now_ns=0, shown_when_synced=False)
        self.open_groups()

    def open_groups(self) -> None:
        self.groups = Groups(self.disk.folder("groups"), self.log)

    def end(self, end: Callable[[FakeDisk], FakeDisk]) -> None:
        """Of the process, or the machine; then it begins again."""
        self.disk = end(self.disk)
        sound(self.disk)
        self.disk.faults.mend()
        self.open()

    def lose(self) -> None:
        self.disk.faults.fail("sync")
        with pytest.raises(Exception, match="Input/output"):
            self.log.sync()
        self.log.mend()
        assert self.log.end == 3

    def got(self) -> list[tuple[int, str]]:
        """What a member gets that comes now."""
        self.groups.join("g", "a", 10)
        return contents(deliver(self.groups, "a"))


def no_journals(disk: FakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """That folder takes none any more."""
    replace = FakeDisk.replace

    def refuse(storage: FakeDisk, name: str, data: bytes) -> None:
        if name == "g":
            raise OSError(5, "no journal")
        replace(storage, name, data)

    monkeypatch.setattr(FakeDisk, "replace", refuse)


def test_a_group_begins_again_where_a_log_has_lost_its_tail() -> None:
    setting = Setting()
    setting.lose()
    fill(setting.log, "other")  # by another thread, it may have been
    assert setting.groups.rewind()
    assert not setting.groups.has("g", "a")
    assert setting.got() == [(3, "other")]


@pytest.mark.parametrize("journals", ["written", "refused"])
def test_what_the_machine_has_lost_is_settled_no_more(
    journals: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = 0
    for seed in range(8):
        setting = Setting()
        with monkeypatch.context() as patch:
            if journals == "refused":
                no_journals(setting.disk, patch)
            setting.end(partial(FakeDisk.crash, random=Random(seed)))
            if setting.log.end == 3:
                lost += 1
                fill(setting.log, "other")
                assert setting.got() == [(3, "other")]
                setting.end(FakeDisk.kill)
                assert setting.got() == [(3, "other")]
    assert lost


@pytest.mark.parametrize("journals", ["written", "refused"])
@pytest.mark.parametrize("when", ["before the group knows of it", "after that"])
def test_what_a_failed_sync_has_lost_is_settled_no_more_in_the_next_process(
    when: str, journals: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the group knew of it or not, and could write that down or not: what is there of its
    journal says of which log it is."""
    setting = Setting()
    with monkeypatch.context() as patch:
        if journals == "refused":
            no_journals(setting.disk, patch)
        setting.lose()
        if when == "after that":
            assert setting.groups.rewind()
            assert setting.got() == []
        fill(setting.log, "other", "another")
        if when == "after that":
            assert contents(deliver(setting.groups, "a")) == [(3, "other"), (4, "another")]
        else:
            with contextlib.suppress(OSError):
                setting.groups.sync()
        setting.end(FakeDisk.kill)
        assert setting.groups.committed("g") == 3
        assert setting.got() == [(3, "other"), (4, "another")]


def test_a_group_that_is_opened_after_others_were_appended_knows_that_they_are_others() -> None:
    lost = 0
    for seed in range(8):
        setting = Setting()
        disk = setting.disk.crash(Random(seed))
        log = setting.log = Log(disk, PARTITION, now_ns=0, shown_when_synced=False)
        setting.disk = disk
        if log.end == 3:
            lost += 1
            fill(log, "other")
            setting.open_groups()
            assert setting.got() == [(3, "other")]
    assert lost
