"""Whether a process lives: what the kernel says, and what its silence does not say."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mesh import host


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_a_process_that_lives_is_opened_and_its_end_is_told(
    child: subprocess.Popen[bytes],
) -> None:
    fd = host.open_process(child.pid, host.start_ticks(child.pid))
    assert fd is not None
    assert not readable(fd, 0)
    child.kill()
    assert readable(fd, 5)
    os.close(fd)


def test_a_process_that_is_dead_is_told_as_such(child: subprocess.Popen[bytes]) -> None:
    started = host.start_ticks(child.pid)
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        host.open_process(child.pid, started)


def test_another_process_with_its_pid_is_not_it(child: subprocess.Popen[bytes]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError, match="is another since"):
        host.open_process(child.pid, host.start_ticks(child.pid) + 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EPERM, errno.ENOSYS])
def test_what_the_kernel_does_not_say_is_no_death(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def pidfd_open(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    assert host.open_process(os.getpid(), host.start_ticks(os.getpid())) is None


@pytest.mark.parametrize("unknown", ["here", "there"])
def test_a_start_time_that_is_not_known_tells_nothing(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, unknown: str
) -> None:
    """Here /proc hides others' processes (hidepid), or it did so there from the process itself."""
    started = 0 if unknown == "there" else host.start_ticks(child.pid)
    if unknown == "here":
        monkeypatch.setattr(host, "_read", lambda path: "")
    fd = host.open_process(child.pid, started)
    assert fd is not None
    os.close(fd)


def test_a_command_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host, "_read", lambda path: "1 (a) (b 7) S " + " ".join(map(str, range(4, 40)))
    )
    assert host.start_ticks(1) == 22
