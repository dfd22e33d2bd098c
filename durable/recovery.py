"""Opening a log: what is there, what a crash may have left of its last append, and what is damaged.

Only the last segment is read. A torn tail is put aside, cut off and counted: nobody was told that
it had been written. What had been on disk and does not read any more raises `LogDamaged`, which
names it, and nothing is changed: what to do then is for people to decide.

An opening's epoch is at least the seconds of the clock. So one that begins anew where another log
was, or with a copy of it, has none of that one's epochs (docs/log.md has the exceptions).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Final
from zlib import crc32

import msgspec

from mesh.durable import aside
from mesh.durable.batch import HEAD_BYTES, Head, encode_head
from mesh.durable.dedup_ids import NS_PER_S
from mesh.durable.index import Index
from mesh.durable.scan import Damage, Found, Walk, end_of_use, torn
from mesh.durable.segment import Segment, bases, begin, name_of, read_head
from mesh.durable.storage import File, Storage
from mesh.errors import LogDamaged

logger = logging.getLogger(__name__)

STATE: Final = "state"
"""The name of its file, which is written once there is a segment."""
_CHECK_BYTES: Final = 4
_EPOCH_BY_CLOCK_MAX: Final = 3 << 30
"""The year 2072. A clock that is a century ahead leaves room for many epochs after it."""


class State(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a log besides its segments: it had at least so many records."""

    log_epoch: int
    end: int


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(State).decode


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """A log that may be appended to."""

    segments: tuple[Segment, ...]
    file: File
    """The last of them."""
    index: Index
    """Its index, which says where the log ends."""
    time_ns: int
    """Of the last batch."""
    log_epoch: int
    """Of this opening: higher than any so far."""
    torn_bytes: int


def read_state(storage: Storage) -> State | None:
    """None if there is none, or it is damaged: less is known then, and nothing is lost."""
    try:
        file = storage.open_to_read(STATE)
    except FileNotFoundError:
        return None
    with contextlib.closing(file):
        data = file.read(0, file.size())
    stored = data[_CHECK_BYTES:]
    if crc32(stored).to_bytes(_CHECK_BYTES, "little") == data[:_CHECK_BYTES]:
        with contextlib.suppress(msgspec.MsgspecError):
            return _decode(stored)
    logger.warning("the file %r of a log is damaged: how far it reached is not known", STATE)
    return None


def write_state(storage: Storage, state: State) -> None:
    stored = _encode(state)
    storage.replace(STATE, crc32(stored).to_bytes(_CHECK_BYTES, "little") + stored)


def recover(
    storage: Storage, partition: int, now_ns: int, observe: Callable[[Found], object]
) -> Recovered:
    """Open the log in that folder, or begin one. `observe` is told each batch of the last segment.

    Raises `LogDamaged`, `LogFormat`, `OSError`.
    """
    state = read_state(storage) or State(0, 0)
    by_clock = min(now_ns // NS_PER_S, _EPOCH_BY_CLOCK_MAX)
    all_bases = bases(storage.names())
    if not all_bases:
        if state.end:
            raise LogDamaged(name_of(0), 0, 0, f"no segment is left of {state.end:,} records")
        first = Head(partition=partition, offset=0, time_ns=now_ns, log_epoch=state.log_epoch)
        begin(storage, first).close()
        all_bases = [0]
    sealed = [Segment(partition, base, _size(storage, name_of(base))) for base in all_bases[:-1]]
    base = all_bases[-1]
    name = name_of(base)
    with contextlib.ExitStack() as undo:
        file = storage.open(name)
        undo.callback(file.close)
        # After a SIGKILL what was written is in memory, and perhaps nowhere else; after a sync that
        # failed it is in memory for ever, and the disk has something else.
        file.sync()
        file.forget()
        size = file.size()
        head = read_head(file, name, partition)
        last = Segment(partition, base, size, Index(base, HEAD_BYTES))
        walk = last.walk(file, HEAD_BYTES, base, 0 if head is None else head.time_ns)
        if head is None:
            walk.position, walk.fault = 0, "the head of the segment is damaged"
        index = last.index(storage)
        log_epoch = max(state.log_epoch, 0 if head is None else head.log_epoch)
        for found in () if head is None else walk:
            index.note(found.header)
            log_epoch = max(log_epoch, found.header.log_epoch)
            observe(found)
        used = size
        if walk.fault and head is not None:
            used = end_of_use(file.read, walk.position, size)
        damage = torn(walk, file.read, used, partition) if walk.position < used else None
        _check_whole(name, walk, damage, state.end)
        if walk.position < used:
            _keep_torn(storage, file, name, walk.position, used - walk.position)
        if walk.fault:
            file.truncate(walk.position)
        if head is None:
            if sealed:
                now_ns = max(now_ns, sealed[-1].index(storage).time_ns)
            head = Head(partition=partition, offset=base, time_ns=now_ns, log_epoch=log_epoch)
            file.append([encode_head(head)])
            walk.time_ns = now_ns
        if walk.fault:
            file.sync()
        last.size = index.size
        undo.pop_all()
    return Recovered(
        segments=(*sealed, last),
        file=file,
        index=index,
        time_ns=walk.time_ns,
        log_epoch=max(log_epoch + 1, by_clock),
        torn_bytes=used - walk.position,
    )


def _check_whole(name: str, walk: Walk, damage: Damage | None, end: int) -> None:
    """Raise `LogDamaged` unless all is there that is known to have been: records up to `end`."""
    if damage is None and walk.offset < end:
        text = walk.fault or "the file ends"
        damage = Damage(walk.position, walk.offset, f"{text}; there were {end:,} records")
    if damage is not None:
        raise LogDamaged(name, damage.position, damage.offset, damage.reason)


def _size(storage: Storage, name: str) -> int:
    with contextlib.closing(storage.open_to_read(name)) as file:
        return file.size()


def _keep_torn(storage: Storage, file: File, name: str, position: int, torn_bytes: int) -> None:
    """Put a torn tail aside, where there is room for it, before it is cut off."""
    logger.warning("%s: a torn append of %d bytes is cut off at %d", name, torn_bytes, position)
    try:
        aside.put(storage, file, name, position, torn_bytes)
    except OSError as error:
        logger.warning("%s: its torn tail cannot be put aside: %s", name, error)
