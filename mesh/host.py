"""This host and its processes: what tells one host from another, and a living process from a dead.

Linux: /proc and pidfd. Reads, never writes.
"""

from __future__ import annotations

import functools
import os


@functools.lru_cache(maxsize=1)
def boot_id() -> str:
    """Equal for all processes of one host until it is booted again; empty if unknown."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def pid_space() -> str:
    """The pid namespace in which this process' pids mean something; empty if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if that cannot be known: there is no
    such process, or /proc does not show those of others (``hidepid``).

    Field 22 of /proc/PID/stat (proc(5)), counted behind the command's closing parenthesis, since a
    command may hold spaces.
    """
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0


def open_process(pid: int, started: int) -> int | None:
    """A pidfd, readable once the process is dead; None if the kernel gives none, which says nothing
    of the process. Raises `ProcessLookupError` if it is dead already.

    `started` tells a process from another that got its pid since, where both are known (not 0).
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # no descriptors left, or an old kernel
        return None
    now = start_ticks(pid)
    if started and now and now != started:
        os.close(fd)
        raise ProcessLookupError(f"process {pid} is another since")
    return fd


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
