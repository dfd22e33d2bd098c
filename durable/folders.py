"""What the directory of a sidecar has beside the logs.

    DIR/identity               who this is: 16 hexadecimal digits, the partition of all its streams
    DIR/streams/NAME/options   of the stream
    DIR/streams/NAME/…         its log: see `mesh.durable.log`

NAME is that of the stream, with all but letters, digits, ``_``, ``-`` and ``~`` as ``%XX``.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Final
from urllib.parse import quote

import msgspec

from mesh.durable.storage import Storage
from mesh.errors import InvalidName, LogDamaged
from mesh.names import check_name
from mesh.options import StreamOptions

STREAMS: Final = "streams"
DEAD: Final = ".dead"
"""Behind the name of a stream: that of its dead letters."""
_IDENTITY: Final = "identity"
_OPTIONS: Final = "options"
_NAME_BYTES_MAX: Final = 255
"""Of a file, on Linux."""


def identity(storage: Storage) -> int:
    """Who this directory is; made up when it is new. Raises `LogDamaged`, `OSError`."""
    try:
        file = storage.open_to_read(_IDENTITY)
    except FileNotFoundError:
        number = secrets.randbits(63) | 1
        storage.replace(_IDENTITY, f"{number:016x}\n".encode())
        return number
    with contextlib.closing(file):
        text = file.read(0, 64)
    try:
        return int(text.decode("ascii").strip(), 16)
    except ValueError:
        raise LogDamaged(_IDENTITY, 0, 0, f"{text[:32]!r} is no identity") from None


def folder_name(stream: str) -> str:
    """Of a stream. Raises `InvalidName`."""
    name = quote(check_name(stream), safe="").replace(".", "%2E")
    if len(name) > _NAME_BYTES_MAX:
        text = f"{len(name):,} bytes as a folder, over the limit of {_NAME_BYTES_MAX:,}"
        raise InvalidName(f"stream {stream!r} has a name of {text}")
    return name


def check_new_name(stream: str) -> None:
    """It, and its dead letters, have to have a place: these would wait for ever. Raises
    `InvalidName`."""
    folder_name(stream)
    if stream.endswith(DEAD):
        return
    try:
        folder_name(f"{stream}{DEAD}")
    except InvalidName as error:
        text = f"leaves no room for {DEAD!r}, where its dead letters go"
        raise InvalidName(f"the name of stream {stream!r} {text}: {error}") from None


def read_options(folder: Storage, stream: str) -> StreamOptions:
    """Raises `LogDamaged`, `OSError`."""
    try:
        with contextlib.closing(folder.open_to_read(_OPTIONS)) as file:
            return msgspec.json.decode(file.read(0, 1 << 16), type=StreamOptions)
    except (FileNotFoundError, msgspec.MsgspecError) as error:
        reason = f"the options of stream {stream!r} cannot be read: {error}"
        raise LogDamaged(_OPTIONS, 0, 0, reason) from None


def write_options(folder: Storage, options: StreamOptions) -> None:
    """Raises `OSError`."""
    folder.replace(_OPTIONS, msgspec.json.encode(options))
