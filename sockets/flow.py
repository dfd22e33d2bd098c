"""The short way in for a topic's frames of one message: most are like the last one that came.

What a frame begins with, its name and its header up to the sender, is looked up whole. If a frame
of that beginning went the long way before (`mesh.sockets.frame.decode`, `codec.unpack_frame`) and
was plain, what is left to look at is its sequence and its payload. Whatever else it is goes the
long way, and is found out there.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mesh.sockets.frame import (
    HEADER_BYTES,
    NAME_MAX,
    SEQ_AND_TIME,
    SEQ_AT,
    SEQ_END,
    Codec,
    Flag,
    Frame,
    Part,
)
from mesh.sockets.home import node_text
from mesh.sockets.parts import read_announced
from mesh.sockets.transport import Socket

_FLOWS_MAX: Final = 10_000
_unpack_seq_and_time: Final = SEQ_AND_TIME.unpack_from


class Flow(NamedTuple):
    """Frames that begin alike."""

    name: bytes
    channel: str
    sender: str
    owner: int
    """Whose sequence it is, as `mesh.sockets.sequences` knows it."""
    detached: bool
    """Whether the payload is the second part."""


class Flows:
    """The plain ones that came lately."""

    def __init__(self, *, views: bool) -> None:
        self._views = views
        self._flows: dict[bytes, Flow] = {}

    def learn(self, first: Part, frame: Frame, channel: str, owner: int) -> None:
        """That frame went the long way, and nothing was wrong with it."""
        detached = bool(frame.flags & Flag.DETACHED)
        plain = frame.codec == (Codec.RAW if detached else Codec.MSGPACK)
        if frame.count != 1 or frame.flags & (Flag.HEADERS | Flag.LZ4) or not plain:
            return
        if len(self._flows) >= _FLOWS_MAX:
            self._flows.clear()
        beginning = bytes(first[: len(frame.name) + SEQ_AT])
        self._flows[beginning] = Flow(frame.name, channel, node_text(frame.sender), owner, detached)

    def read(self, socket: Socket, first: bytes) -> tuple[Flow, int, int, Part] | None:
        """(flow, sequence, time, body) of the frame that begins with that part, or None if it has
        to go the long way: no more of it was read then. The body of one that is detached is its
        second part."""
        at = first.find(b"\0", 0, NAME_MAX) + 1
        flow = self._flows.get(first[: at + SEQ_AT])
        if flow is None or len(first) < at + HEADER_BYTES:
            return None
        seq, time_ns = _unpack_seq_and_time(first, at + SEQ_AT)
        if seq >= SEQ_END:
            return None
        if not flow.detached:
            return flow, seq, time_ns, first[at + HEADER_BYTES :]
        if len(first) > at + HEADER_BYTES:
            return None
        second = read_announced(socket, view=self._views)
        return None if second is None else (flow, seq, time_ns, second)
