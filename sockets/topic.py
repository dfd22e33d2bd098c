"""What a node knows of one topic it publishes: state, which `mesh.sockets.topics` works on."""

from __future__ import annotations

import math
from typing import Protocol

import msgspec

from mesh.options import PublisherOptions
from mesh.sockets.batch import Batch
from mesh.sockets.compression import Compression
from mesh.sockets.frame import Part, pad, wire_name
from mesh.sockets.outgoing import Outgoing
from mesh.sockets.transport import Socket


class Tap(Protocol):
    """Who is given what is published on a topic, besides its subscribers. Both are called under the
    lock of its sockets, so they neither block nor raise."""

    def has_room(self) -> bool:
        """Whether more may come. Topics that wait do so until then."""

    def take(
        self, channel: str, waits: bool, seq: int, time_ns: int, message: Outgoing, missed: int
    ) -> None:
        """What has just left under `seq` and those that follow it. `missed`: how many messages
        before it were cut off by a Ctrl-C, so that nobody knows whether they left."""


class Topic(msgspec.Struct, eq=False):
    """One topic as this node publishes it, whatever the number of handles."""

    name: str
    options: PublisherOptions
    batch: Batch
    seq: int = 0
    sent_at: float = -math.inf
    """When a message last left by itself, on the monotonic clock."""
    frames: int = 0
    """How many were sent."""
    handles: list[None] = msgspec.field(default_factory=list)
    """One for each, so that a handle that is collected can be taken off without a lock."""
    last: Outgoing | None = None
    """What the last message was part of, where `keep_last` asks for it."""
    last_time_ns: int = 0
    owed: list[tuple[Socket, list[Part], int]] = msgspec.field(default_factory=list)
    """What one transport took and another had no room for yet, with the number of messages in it;
    paid before anything else."""
    compression: Compression | None = None
    """Of what leaves over tcp."""
    taps: tuple[Tap, ...] = ()
    tapped: int = 0
    """The last sequence that these were told of, or that came before them."""
    dirty: bool = False
    wire: bytes = b""
    pad: bytes = b""

    def __post_init__(self) -> None:
        self.wire = wire_name(self.name)
        self.pad = pad(self.wire)

    def has_room(self) -> bool:
        """Whether all taps have room."""
        return all(tap.has_room() for tap in self.taps)

    def tell(self, before: int, time_ns: int, message: Outgoing, waits: bool) -> None:
        """Tell the taps what has just left behind the sequence `before`."""
        for tap in self.taps:
            tap.take(self.name, waits, before + 1, time_ns, message, before - self.tapped)
        self.tapped = before + message.count

    def standing(self, socket: Socket) -> int:
        """The sequence of the last message that left by `socket`."""
        return self.seq - sum(count for owed, _, count in self.owed if owed is socket)
