"""Torn tails that were cut off a log, kept aside for people to look at.

    OFFSET.log.AT.torn   what stood in that segment from byte AT on

Guarantee: they are no more, in number and bytes, than `mesh.limits` says: the earliest in the log
goes first. They go with the segment that they were cut off.
"""

from __future__ import annotations

import contextlib
import re
from typing import Final

from mesh import limits
from mesh.durable.storage import File, Storage

_NAME: Final = re.compile(r"(\d{20}\.log)\.(\d+)\.torn")


def kept(storage: Storage) -> dict[str, int]:
    """Their names and bytes, the earliest in the log first. Raises `OSError`."""
    found = {}
    places = [match for match in map(_NAME.fullmatch, storage.names()) if match]
    for match in sorted(places, key=lambda match: (match[1], int(match[2]))):
        with (
            contextlib.suppress(FileNotFoundError),  # given up meanwhile
            contextlib.closing(storage.open_to_read(match[0])) as file,
        ):
            found[match[0]] = file.size()
    return found


def put(storage: Storage, file: File, segment: str, position: int, size: int) -> None:
    """Put aside what that segment has from there on: of a huge tail the first part. Raises
    `OSError`."""
    data = file.read(position, min(size, limits.TORN_BYTES_MAX))
    others = kept(storage)
    while others and (
        len(others) >= limits.TORN_FILES_MAX
        or sum(others.values()) + len(data) > limits.TORN_BYTES_MAX
    ):
        earliest = next(iter(others))
        storage.remove(earliest)
        del others[earliest]
    storage.replace(f"{segment}.{position}.torn", data)
