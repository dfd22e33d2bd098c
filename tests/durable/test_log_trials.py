"""That what a log is put through finds the faults that it is for: each is planted here once."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest

from mesh.durable import scan
from mesh.durable.log import Log
from mesh.durable.storage import Poison
from mesh.errors import LogDamaged
from tests.support.fake_disk import FakeDisk, FakeFile
from tests.support.trials import ended_at_every_operation, failed_every_time

pytestmark = pytest.mark.slow


def is_found_out(trial: Callable[[], object]) -> None:
    with pytest.raises((AssertionError, LogDamaged)):
        trial()


class Hasty(Log):
    """Acknowledges what it has not synced."""

    def sync(self) -> None:
        self._show()


class Forgetful(FakeDisk):
    """Does not sync the directory."""

    def sync(self) -> None:
        self.faults.alive()


def test_an_acknowledgement_before_the_sync_is_found_out() -> None:
    is_found_out(lambda: ended_at_every_operation("crash", kind=Hasty))


def test_a_sync_that_is_repeated_after_it_failed_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync = FakeFile.sync

    def hopeful(file: FakeFile) -> None:
        try:
            sync(file)
        except OSError:
            file._poison = Poison("as if anew")
            sync(file)

    monkeypatch.setattr(FakeFile, "sync", hopeful)
    is_found_out(lambda: failed_every_time("sync"))


def test_a_directory_that_is_not_synced_is_found_out() -> None:
    is_found_out(lambda: ended_at_every_operation("crash", disk_kind=Forgetful))


def test_bodies_that_are_not_checked_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "crc32", lambda _: mock.ANY)
    is_found_out(lambda: ended_at_every_operation("crash"))


@pytest.mark.damages
def test_memory_that_is_believed_after_a_failed_sync_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a SIGKILL, by whoever opens the log next."""
    monkeypatch.setattr(FakeFile, "forget", lambda _: None)
    is_found_out(lambda: failed_every_time("sync"))
