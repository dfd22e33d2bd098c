"""What a sidecar with producers and groups promises on real disks: killed wherever it is, out of
power, or with a disk that fails. Each record is there once, under its first receipt, and what was
confirmed to be settled is; nothing else is, and retention takes nothing else."""

from __future__ import annotations

import errno
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import pytest

from mesh.durable.storage import Disk
from mesh.errors import LogDamaged, StorageFailed
from tests.support.account import Account, Ended, Telling, copy_of, encode_account, heard
from tests.support.faults import (
    JOURNAL_KEPT,
    JOURNAL_LOST,
    LoopDisk,
    before_call,
    fail_at,
    fail_from,
    failing,
    kill_at,
    loop_disk,
    traced,
)
from tests.support.log_process import room_for_work
from tests.support.planted import PLANTED
from tests.support.planted_parts import failed_writes_taken_for_written
from tests.support.sidecar_client import new_account
from tests.support.sidecar_process import OPCODES, WORK
from tests.support.sidecar_trials import holds_and_goes_on, work

pytestmark = pytest.mark.slow

CALLS = ("pwritev2", "fallocate", "fdatasync", "fsync", "ftruncate", "rename", "unlink", "mkdir")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is room: processes that are killed need no better, nor do images of
    disks."""
    with tempfile.TemporaryDirectory(dir=room_for_work() or tmp_path) as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What is torn, failed or given up is logged each time."""
    caplog.set_level(logging.CRITICAL)


def run(path: Path, account: Account, fault: str, planted: str = "") -> int:
    """One process, which works there with that fault. What it said is in the account then."""
    (said := path / "account").write_bytes(encode_account(account))
    ran = traced(WORK, path / "sidecar", said, planted, inject=[fault], watch=CALLS)
    assert ran.status in (0, -signal.SIGKILL), ran.err
    heard(account, ran.out.splitlines(keepends=True))
    return ran.status


# -- Processes that are killed


def killed(path: Path, call: str, nth: int, planted: str = "") -> bool:
    path.mkdir(exist_ok=True)
    account = new_account()
    status = run(path, account, kill_at(call, nth), planted)
    holds_and_goes_on(Disk(path / "sidecar"), account)
    return status != 0


def test_a_sidecar_survives_sigkill_at_a_system_call(path: Path) -> None:
    assert killed(path, "rename", 12)


@pytest.mark.long
@pytest.mark.parametrize("first", range(1, 7))
@pytest.mark.parametrize("call", CALLS)
def test_a_sidecar_survives_sigkill_at_every_system_call(path: Path, call: str, first: int) -> None:
    assert killed_at_calls(path, call, first, 6) > 4


def killed_at_calls(path: Path, call: str, first: int, step: int, planted: str = "") -> int:
    calls = count(first, step)
    return next(nth for nth in calls if not killed(path / str(nth), call, nth, planted))


@pytest.mark.long
def test_a_sidecar_survives_one_sigkill_after_another(path: Path) -> None:
    """At once, while it opens, and later, in one directory that goes on."""
    luck, account = Random(1), new_account()
    for _ in range(40):
        run(path, account, kill_at(luck.choice(CALLS), luck.choice((1, 2, 4, 10, 30))))
        if luck.random() < 0.2:
            holds_and_goes_on(Disk(path / "sidecar"), account)
    holds_and_goes_on(Disk(path / "sidecar"), account)
    assert account.series["goes on"].end > 100


def at_opcodes(path: Path, first: int, step: int, planted: str = "") -> str:
    """What is found, or how many opcodes leave something else than the one before."""
    command = [sys.executable, "-c", OPCODES, str(path), str(first), str(step), planted]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=55)
    return ran.stdout if ran.returncode == 0 else ran.stderr


def test_a_sidecar_survives_sigkill_at_some_opcodes(path: Path) -> None:
    assert int(at_opcodes(path, 7, 90)) > 500


@pytest.mark.long
@pytest.mark.parametrize("first", range(6))
def test_a_sidecar_survives_sigkill_at_every_opcode(path: Path, first: int) -> None:
    """That leaves something else than the one before."""
    assert int(at_opcodes(path, first, 6)) > 500


@pytest.mark.long
@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("settled_before_it_is_written", "forgot"),
        ("delivered_before_it_is_written", "deliveries are forgotten"),
        ("settled_with_its_neighbour", "nobody settled"),
        ("journal_anew_in_place", "is gone"),
        ("trim_before_the_snapshot", "is not known here"),
        ("dedup_in_memory_only", "is not known here"),
        ("no_notes_of_repeats", "is not known here"),
        ("snapshot_not_read", "another receipt"),
        ("snapshot_ahead_of_the_log", "was to be at"),
    ],
)
def test_what_does_not_survive_sigkill_is_found_out(path: Path, planted: str, found: str) -> None:
    assert found in at_opcodes(path, 0, 3, planted)


@pytest.mark.long
@pytest.mark.parametrize(
    ("planted", "call", "first", "found"),
    [
        ("settled_before_it_is_written", "fdatasync", 24, "forgot"),
        ("dedup_in_memory_only", "pwritev2", 10, "is not known here"),
    ],
)
def test_what_does_not_survive_sigkill_at_a_system_call_is_found_out(
    path: Path, planted: str, call: str, first: int, found: str
) -> None:
    with PLANTED[planted](), pytest.raises(AssertionError, match=found):
        killed_at_calls(path, call, first, 1, planted)


# -- Power that fails


def loses_power(disk: LoopDisk, account: Account, nth: int, flag: int) -> bool:
    """Before that call of the work, or behind the last: whether it was before."""
    tell = Telling(account)

    def fail() -> None:
        disk.cut_power(flag)
        tell.ended = True

    with suppress(Ended, OSError, StorageFailed), before_call(nth, fail):
        work(Disk(disk.path / "sidecar"), tell)
    if not (before := tell.ended):
        fail()
    disk.restore_power()
    account.ends("power")
    return before


def at_random(path: Path, seed: int, cycles: int) -> Account:
    """In one directory that goes on, also while it is opened."""
    luck, account = Random(seed), new_account()
    with loop_disk(path) as disk:
        for _ in range(cycles):
            nth = luck.randint(1, luck.choice((60, 500)))
            loses_power(disk, account, nth, luck.choice((JOURNAL_LOST, JOURNAL_KEPT)))
        holds_and_goes_on(Disk(disk.path / "sidecar"), account)
    return account


def at_calls(path: Path, first: int, step: int, flag: int, planted: str = "") -> int:
    """Of the work that begins anew and then of that which goes on."""
    with loop_disk(path) as disk, PLANTED[planted]() if planted else nullcontext():
        account, nth = new_account(), first
        while loses_power(disk, account, nth, flag):
            nth += step
        holds_and_goes_on(Disk(disk.path / "sidecar"), account)
    return nth


def test_a_sidecar_survives_some_power_losses(path: Path) -> None:
    at_random(path, 0, 8)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_a_sidecar_survives_many_power_losses(path: Path, seed: int) -> None:
    assert at_random(path, seed, 60).series["goes on"].end > 100


@pytest.mark.long
@pytest.mark.parametrize("first", range(1, 4))
@pytest.mark.parametrize("flag", [JOURNAL_LOST, JOURNAL_KEPT])
def test_a_sidecar_survives_a_power_loss_at_every_call(path: Path, flag: int, first: int) -> None:
    # Some 435 with the opening of the dead letters, which may be left to who begins the next time.
    assert at_calls(path, first, 3, flag) > 350


@pytest.mark.long
@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("receipt_before_the_sync", "was said, None is there"),
        ("journal_anew_without_its_directory", "is gone"),
    ],
)
def test_what_does_not_survive_a_power_loss_is_found_out(
    path: Path, planted: str, found: str
) -> None:
    with pytest.raises(AssertionError, match=found):
        at_calls(path, 50, 1, JOURNAL_LOST, planted)


# -- Disks that fail


def failed(path: Path, fault: str, planted: str = "") -> Account:
    path.mkdir(exist_ok=True)
    account = new_account()
    assert run(path, account, fault, planted) == 0
    holds_and_goes_on(Disk(path / "sidecar"), copy_of(account))
    return account


def test_a_sync_that_fails_costs_nothing_that_was_confirmed(path: Path) -> None:
    assert failed(path, fail_at("fdatasync", 30)).series["goes on"].end > 10


@pytest.mark.long
@pytest.mark.parametrize("fault", [fail_at, fail_from, partial(fail_at, error="ENOSPC")])
@pytest.mark.parametrize("call", ["pwritev2", "fdatasync", "fsync", "rename"])
def test_system_calls_that_fail_cost_nothing_that_was_confirmed(
    path: Path, call: str, fault: Callable[[str, int], str]
) -> None:
    failed_at_calls(path, call, fault)


def failed_at_calls(
    path: Path, call: str, fault: Callable[[str, int], str], planted: str = ""
) -> None:
    for nth in (1, 4, 11, 18, 30, 38):
        failed(path / str(nth), fault(call, nth), planted)


@pytest.mark.long
@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(
    "name", ["pwritev", "fdatasync", "fsync", "rename", "unlink", "ftruncate", "mkdir"]
)
def test_each_call_that_fails_costs_nothing_that_was_confirmed(
    path: Path, name: str, error: int, for_ever: bool
) -> None:
    fails_each_time(path, name, error, for_ever)


def fails_each_time(path: Path, name: str, error: int, for_ever: bool) -> None:
    for nth in count(1):
        if not fails(disk := path / str(nth), name, nth, error, for_ever):
            break
        shutil.rmtree(disk)


def fails(path: Path, name: str, nth: int, error: int, for_ever: bool) -> bool:
    """Whether that call did."""
    account = new_account()
    with suppress(OSError, StorageFailed), failing(name, nth, error, for_ever=for_ever) as calls:
        work(Disk(path), Telling(account))
    holds_and_goes_on(Disk(path), account)
    return bool(calls)


def test_a_write_that_failed_and_is_taken_for_written_is_missed(path: Path) -> None:
    found = pytest.raises((AssertionError, LogDamaged), match="is damaged")
    with failed_writes_taken_for_written(), found:
        fails_each_time(path, "pwritev", errno.EIO, for_ever=False)


@pytest.mark.long
def test_a_system_call_that_failed_and_is_taken_for_done_is_missed(path: Path) -> None:
    planted = failed_writes_taken_for_written.__name__
    with pytest.raises(AssertionError, match="is damaged"):
        failed_at_calls(path, "pwritev2", fail_at, planted)
