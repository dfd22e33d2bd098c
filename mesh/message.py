"""What users are handed: messages, peers and their comings and goings, statistics.

Immutable values without behaviour; whoever makes them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

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


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message of a topic or a queue, as received."""

    payload: Any
    """What the sender sent, through MessagePack: tuples arrive as lists, NumPy arrays as read-only
    arrays over the memory they were received in."""
    channel: str
    sender: str
    """Node id of the sender: 16 hexadecimal digits, new for each run of a node."""
    seq: int
    """The sender's own counter, from 1: of its messages on this topic, or of its tasks to this
    worker."""
    time_ns: int
    """The sender's wall clock when it was sent, nanoseconds since 1970."""
    headers: Mapping[str, Any] = EMPTY


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
