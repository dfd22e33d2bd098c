"""What the processes of a run write down: events, and the files that hold them.

Each run of a process has a file of its own, of JSON lines, which ends wherever the process was
killed. It notes what it is about to do before it does it, and what came of it afterwards.

An append is identified by an `id` that its payload carries, and `digest` stands for all its bytes.
An application that repeats an append (the same dedup id, the same derivation) invokes the same id
again. `producer` orders its appends by `seq`, over all its runs; `consumer`, `reader` and
`observer` name one run of one. `at` is the machine's monotonic clock, in nanoseconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

import msgspec


class Event(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    gc=False,
    tag_field="event",
    tag=str.lower,
    forbid_unknown_fields=True,
):
    """Something that one process saw or is about to do."""

    at: int = msgspec.field(default_factory=time.monotonic_ns)


class Invoked(Event, frozen=True, kw_only=True, gc=False):
    """An append is about to be sent."""

    id: str
    producer: str
    seq: int
    digest: str
    key: str | None = None


class Appended(Event, frozen=True, kw_only=True, gc=False):
    """The append got a receipt."""

    id: str
    partition: str
    offset: int


class Failed(Event, frozen=True, kw_only=True, gc=False):
    """The append was refused, and is not in the log."""

    id: str


class Unknown(Event, frozen=True, kw_only=True, gc=False):
    """Nobody can tell what became of it: the same as if nothing had been written down."""

    id: str


class Delivered(Event, frozen=True, kw_only=True, gc=False):
    """A consumer of a group was given a record, for the `deliveries`-th time."""

    consumer: str
    group: str
    partition: str
    offset: int
    id: str
    digest: str
    deliveries: int


class Ack(Event, frozen=True, kw_only=True, gc=False):
    """A consumer is about to acknowledge or reject a record."""

    consumer: str
    group: str
    partition: str
    offset: int


class Acked(Event, frozen=True, kw_only=True, gc=False):
    """The sidecar confirmed it."""

    consumer: str
    group: str
    partition: str
    offset: int


class Buried(Event, frozen=True, kw_only=True, gc=False):
    """The record was found among the group's dead letters."""

    group: str
    partition: str
    offset: int


class Drained(Event, frozen=True, kw_only=True, gc=False):
    """A group has had everything from `start` on that was acknowledged before `since`."""

    group: str
    partition: str
    start: int = 0
    since: int


class Read(Event, frozen=True, kw_only=True, gc=False):
    """A reader, which follows a partition or replays it, was given a record."""

    reader: str
    partition: str
    offset: int
    id: str
    digest: str


class Replayed(Event, frozen=True, kw_only=True, gc=False):
    """A reader that began at `since` has read the whole partition, which begins with `start`."""

    reader: str
    partition: str
    start: int = 0
    since: int


class Trimmed(Event, frozen=True, kw_only=True, gc=False):
    """A reader or a group (`receiver`) was told that retention took `first` to `last` from it."""

    receiver: str
    partition: str
    first: int
    last: int


class Committed(Event, frozen=True, kw_only=True, gc=False):
    """An observer was told that everything of a group below `offset` is settled."""

    observer: str
    group: str
    partition: str
    offset: int


AnyEvent = (
    Invoked
    | Appended
    | Failed
    | Unknown
    | Delivered
    | Ack
    | Acked
    | Buried
    | Drained
    | Read
    | Replayed
    | Trimmed
    | Committed
)
Sighting = Appended | Delivered | Read
"""Says that an append is at a place."""

_decode_lines = msgspec.json.Decoder(AnyEvent).decode_lines
_decode = msgspec.json.Decoder(AnyEvent).decode
_encode = msgspec.json.Encoder().encode


class Recorder:
    """Writes events into a new file. Safe from several threads: each is one `write`."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def note(self, *events: AnyEvent) -> None:
        """They are in the file when this returns, also if the process is killed then."""
        lines = b"".join(_encode(event) + b"\n" for event in events)
        if os.write(self._descriptor, lines) != len(lines):
            raise OSError("the disk is full: what is missing here would look like a fault")

    def close(self) -> None:
        os.close(self._descriptor)


class MalformedHistory(Exception):
    """A line other than a torn last one is no event; the text names file and line."""


def load(folder: Path) -> list[AnyEvent]:
    """All events of the ``*.jsonl`` in `folder`. A process that was killed may have left a last
    line without its end, which is ignored; it did nothing after that."""
    events: list[AnyEvent] = []
    for path in sorted(folder.glob("*.jsonl")):
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        lines = whole.count(b"\n")
        try:
            found = _decode_lines(whole)
        except msgspec.MsgspecError:
            found = []
        if len(found) != lines:
            raise MalformedHistory(_first_malformed(path, whole))
        events += found
    return events


def _first_malformed(path: Path, whole: bytes) -> str:
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            _decode(line)
        except msgspec.MsgspecError as error:
            return f"{path.name}, line {number:,}: {error}"
    return f"{path.name}: some line holds more than one event"
