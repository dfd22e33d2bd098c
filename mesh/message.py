"""What users are handed: messages, peers and their comings and goings, statistics.

Values that do not change once users have them; whoever makes them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, repeat
from types import MappingProxyType
from typing import Any, Literal, overload

import msgspec

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Array(msgspec.Struct, frozen=True):
    """An array, where the program has not imported NumPy; with it, arrays arrive as
    `numpy.ndarray`. It can be sent as well.

    ``array.data.cast("d", array.shape)`` is a view of items of dtype ``<f8``; so is
    ``numpy.ndarray(array.shape, array.dtype, array.data)`` of any.
    """

    dtype: str
    """As in `numpy.dtype.str`: byte order, kind and size of an item, such as ``<f4``."""
    shape: tuple[int, ...]
    data: memoryview
    """The bytes, in C order: read-only, in memory of their own."""


class Origin(msgspec.Struct, frozen=True, gc=False):
    """What the messages of one frame have in common."""

    channel: str
    sender: str
    seq: int
    """Of the first of them."""
    time_ns: int
    headers: Sequence[Mapping[str, Any]] | None = None
    """Of each of them, if any has some."""
    account: Any = None
    """Of tasks: the receiving node's business."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message of a topic or a queue, as received."""

    payload: Any
    """What the sender sent, through MessagePack: tuples arrive as lists, NumPy arrays as read-only
    arrays over the memory they were received in, with the option `views` large bytes as well."""
    _index: int
    _origin: Origin
    # Of many messages only the payload is ever looked at: the rest is put together when it is.

    @property
    def channel(self) -> str:
        """The topic or queue it came by."""
        return self._origin.channel

    @property
    def sender(self) -> str:
        """Node id of the sender: 16 hexadecimal digits, new for each run of a node."""
        return self._origin.sender

    @property
    def seq(self) -> int:
        """The sender's own counter, from 1: of its messages on this topic, or of its tasks to this
        worker."""
        return self._origin.seq + self._index

    @property
    def time_ns(self) -> int:
        """The sender's wall clock when it was sent, nanoseconds since 1970; of messages that shared
        a frame, when that left."""
        return self._origin.time_ns

    @property
    def headers(self) -> Mapping[str, Any]:
        """What the sender sent beside the payload; empty if there was nothing."""
        headers = self._origin.headers
        return EMPTY if headers is None else headers[self._index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((self.sender, self.channel, self.seq))

    def __repr__(self) -> str:
        return (
            f"Message(payload={self.payload!r}, channel={self.channel!r}, sender={self.sender!r}, "
            f"seq={self.seq}, time_ns={self.time_ns}, headers={dict(self.headers)!r})"
        )

    def _fields(self) -> tuple[Any, ...]:
        return self.sender, self.channel, self.seq, self.time_ns, self.payload, self.headers


class Run(msgspec.Struct, frozen=True, gc=False):
    """Messages of one frame that follow each other, of which none is made yet: not for users."""

    payloads: list[Any]
    first: int
    """Index of the first of them in its frame."""
    origin: Origin

    def __len__(self) -> int:
        return len(self.payloads)

    def __iter__(self) -> Iterator[Message]:
        return map(Message, self.payloads, count(self.first), repeat(self.origin))

    def split(self, length: int) -> tuple[Run, Run | None]:
        """The first `length`, and the others if there are any."""
        payloads, first, origin = self.payloads, self.first, self.origin
        if length >= len(payloads):
            return self, None
        return Run(payloads[:length], first, origin), Run(payloads[length:], first + length, origin)


class Messages(Sequence[Message]):
    """Several messages, in the order they came: what `recv_many` returns.

    Each `Message` is made as it is looked at. Where only payloads are wanted, `payloads` has them
    without that, in half the time.
    """

    __slots__ = ("_length", "_runs")

    def __init__(self) -> None:
        self._runs: list[Run | list[Message]] = []
        self._length = 0

    @property
    def payloads(self) -> list[Any]:
        """The payloads alone, a new list."""
        payloads: list[Any] = []
        for run in self._runs:
            payloads += run.payloads if type(run) is Run else [m.payload for m in run]
        return payloads

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Message]:
        return chain.from_iterable(self._runs)

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return list(self)[index]
        at = range(self._length)[index]
        for run in self._runs:
            if at < len(run):
                if isinstance(run, Run):
                    return Message(run.payloads[at], run.first + at, run.origin)
                return run[at]
            at -= len(run)
        raise AssertionError("the runs are as long as all of it")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Messages | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Messages({list(self)!r})"

    # For those that make them; not for users.

    def origins(self) -> Iterator[Origin]:
        """Of each of them, what it has in common with others."""
        return chain.from_iterable(
            repeat(run.origin, len(run)) if type(run) is Run else [m._origin for m in run]
            for run in self._runs
        )

    def add(self, messages: Run | list[Message]) -> None:
        """More, at the end."""
        self._runs.append(messages)
        self._length += len(messages)


class PeerInfo(msgspec.Struct, frozen=True):
    """Another node, as seen from here."""

    id: str
    name: str
    transport: Literal["ipc", "tcp"]
    """What data links to this peer use."""
    address: str
    """The endpoint of its control link that answered first."""
    pid: int
    same_host: bool


class PeerEvent(msgspec.Struct, frozen=True):
    """A peer arrived or left."""

    kind: Literal["joined", "left"]
    peer: PeerInfo
    reason: str
    """For ``left``: ``bye``, ``died``, ``silent`` or what else ended it; empty for ``joined``."""


class Untrusted(msgspec.Struct, frozen=True):
    """Somebody who does not share this node's realm secret, or its protocol version."""

    id: str
    """The node id it claims; empty if it never told."""
    name: str
    address: str
    reason: str


class Loss(msgspec.Struct, frozen=True):
    """Messages that a subscriber missed: sequences `first` to `last` of one sender and topic."""

    sender: str
    channel: str
    first: int
    last: int

    @property
    def count(self) -> int:
        """How many messages that are."""
        return self.last - self.first + 1


class TasksLost(msgspec.Struct, frozen=True):
    """A worker went away with tasks in its hands; what became of them is not known."""

    channel: str
    worker: str
    """Node id of the worker."""
    count: int


class Stats(msgspec.Struct, frozen=True):
    """A node's counters since it was made: a snapshot that does not change."""

    sent: Mapping[str, int]
    """Messages sent, by kind of channel: ``topic``, ``queue``, ``service``."""
    received: Mapping[str, int]
    bytes_sent: int
    bytes_received: int
    lost: int
    """Messages known to be lost: gaps seen by subscribers, tasks in dead workers' hands."""
    dropped: Mapping[str, int]
    """What was refused or thrown away, by reason."""
    round_trip_s: Mapping[str, float]
    """The last ping's round trip to each peer, by node id."""
    peers: int


class GroupStats(msgspec.Struct, frozen=True):
    """How far a group of consumers has come in one partition of a stream."""

    committed: int
    """All records below that are settled."""
    end: int
    """Of what it was told of: what is beyond waits in the log."""
    lag: int
    """Records from `committed` to the end of the log."""
    in_flight: int
    """Delivered, and not settled yet."""
    members: int
    counters: dict[str, int]
    """Since the sidecar opened the stream: ``redelivered``, ``dead`` (letters), ``expired`` (not
    settled within ``ack_wait``), ``trimmed`` (given up before they were settled), and others."""


class StreamStats(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of a stream, as its sidecar sees it: a snapshot. What is counted, is counted
    since it opened the stream."""

    start: int
    """Offset of the first record that is there still."""
    end: int
    """Behind the last record that may be read."""
    bytes: int
    segments: int
    torn_bytes: int
    """Of an append that a failure had interrupted, cut off when the stream was opened."""
    failures: int
    """Writes and syncs that failed. What was under way was refused."""
    unsynced_lost: int
    """Records that were written, and then lost by such a failure: with ``durability`` other than
    ``fsync`` some of them may have had a receipt."""
    refused: dict[str, int]
    """Batches that were not appended, by reason: ``full``, ``storage``, ``fenced`` and others."""
    forgotten: dict[str, int]
    """What tells repeated appends and was given up for its bounds (docs/log.md), by kind:
    ``producer``, ``dedup id`` before its time, ``derived source`` and ``derived interval``."""
    readers: int
    """Who waits for what comes next."""
    groups: dict[str, GroupStats]
    groups_unread: dict[str, str] = {}
    """Groups whose own files do not read, and why: they stand still, and with
    ``retention="acked"`` nothing is given up meanwhile."""

    @property
    def records(self) -> int:
        """How many are there."""
        return self.end - self.start


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What an append returns: its records are in the log, `count` of them from `offset` on."""

    partition: str
    """Whose log: 16 hexadecimal digits, which stay with the sidecar's directory."""
    offset: int | None
    """Of the first record in that partition, from 0. None for a repeat of which only this is known
    any more, that it is there."""
    count: int
    time_ns: int
    """The log's wall clock when it took them, nanoseconds since 1970; never goes back."""
    durability: Literal["written", "fsynced"]
    """How safe they are: ``written`` survives a crash of the processes, ``fsynced`` also one of the
    machine."""
    repeated: bool = False
    """Whether they had been there before, so that nothing was appended."""
