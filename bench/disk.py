"""Where logs are put to be measured: on a disk. In memory nothing gets durable, and whatever has to
wait for a disk looks fast."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

IN_MEMORY = ("tmpfs", "ramfs")
LASTING = "/var/tmp"
"""For temporary files that outlive the machine's next start, and so not in its memory."""


class NoPlace(Exception):
    """There is no disk to put a log on."""


def place() -> str:
    """A directory on a disk: that for temporary files if it is on one. Raises `NoPlace`."""
    for directory in (tempfile.gettempdir(), LASTING):
        if os.access(directory, os.W_OK) and filesystem(directory) not in IN_MEMORY:
            return directory
    raise NoPlace(f"{tempfile.gettempdir()} is in memory: name a place on a disk in TMPDIR")


def filesystem(directory: str, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Of which kind it is there, by proc_pid_mountinfo(5): ``ext4``."""
    path, kind, depth = os.path.realpath(directory), "unknown", -1
    for line in mounts.read_text().splitlines():
        fields = line.split()
        point = fields[4].replace("\\040", " ")
        inside = os.path.commonpath((path, point)) == point
        if inside and len(point) >= depth:  # the last of those at one point hides the others
            kind, depth = fields[fields.index("-", 6) + 1], len(point)
    return kind


def note() -> str:
    """What stands beside a figure that was taken there."""
    with contextlib.suppress(NoPlace):
        return f"on {filesystem(place())}"
    return ""
