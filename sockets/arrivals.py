"""What came to a subscriber: from frames to messages, with what was missed between them counted.

Reads no socket but for the second part of a frame; used under the subscriber's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mesh import limits
from mesh.message import Loss, Message, Messages, Origin, Run
from mesh.names import is_name, matches
from mesh.options import SubscriberOptions
from mesh.sockets import codec
from mesh.sockets.flow import Flow, Flows
from mesh.sockets.frame import (
    SEQ_END,
    Flag,
    Frame,
    Kind,
    Malformed,
    Part,
    channel_name,
    decode,
    is_pad,
    wire_name,
)
from mesh.sockets.home import Counters, Home, node_text
from mesh.sockets.inbox import Inbox
from mesh.sockets.parts import parts_of
from mesh.sockets.sequences import Sequences
from mesh.sockets.single import payload_of
from mesh.sockets.transport import Socket

_SMALL_BYTES = 4096
"""Frames of less are read ahead: they cost less to hold than to be fetched one by one."""
_NAMES_CACHED_MAX = 10_000


def _order(message: Message) -> tuple[object, int]:
    """Whose sequence a message is part of, and its place in it."""
    return (message.sender, message.channel), message.seq


def _owner(frame: Frame) -> int:
    """Whose sequence a frame is part of: a node's topics that wait are apart from its others."""
    return frame.sender << 1 | bool(frame.flags & Flag.WAITS)


class Arrivals:
    """The messages that are there, and where all sequences stand."""

    def __init__(
        self, home: Home, pattern: str, address: bytes, options: SubscriberOptions
    ) -> None:
        """`address`: the subscriber's own, where publishers answer it."""
        self.counters = Counters()
        self.lost: dict[str, int] = {}
        """How many messages, by sender."""
        self.repaired: dict[str, int] = {}
        """How many that had been missed, by sender."""
        self.on_loss: Callable[[Loss], object] | None = None
        self.inbox = Inbox()
        """What is read and was not taken."""
        self.latest: dict[tuple[str, str], Message] = {}
        """That, where only the newest is kept."""
        self.awaiting: set[tuple[int, bool]] = set()
        """Whose marks are to come: peers, and whether it is that of their topics that wait."""
        self.heard = 0
        """Frames of topics that came, those that the pattern does not want included."""
        self.small = False
        """Whether the last frame was small."""
        self.pad: bytes | None = None
        """The last pad that came: most are like it."""
        self._home = home
        self._pattern = pattern
        self._address = address
        self._latest_only = options.latest_only
        self._views = options.views
        self._bytes_max = home.transport.message_bytes_max
        self._sequences = Sequences()
        self._flows = Flows(views=options.views)
        self._channels: dict[bytes, str | None] = {}

    def pop(self) -> Message | None:
        if not self.latest:
            return self.inbox.pop()
        return self.latest.pop(next(iter(self.latest)))

    def pop_latest(self, count_max: int) -> Messages:
        """Up to so many of those of which only the newest is kept."""
        latest: list[Message] = []
        while len(latest) < count_max and (message := self.pop()) is not None:
            latest.append(message)
        messages = Messages()
        messages.add(latest)
        return messages

    def give_back(self, messages: Sequence[Message]) -> None:
        """Their receiver was cancelled before it saw them: they are for somebody else, in order."""
        if not self._latest_only:
            self.inbox.put_back(messages, _order)
            return
        for message in reversed(messages):
            if self.latest.setdefault((message.sender, message.channel), message) is not message:
                self.counters.dropped["superseded"] += 1

    def take_in(self, socket: Socket, first: bytes) -> None:
        """The frame that begins with that part: what comes of it is in the inbox then."""
        message = self.take_one(socket, first)
        if message is not None:
            self.inbox.append(message)

    def take_one(self, socket: Socket, first: bytes) -> Message | None:
        """`take_in` where nothing waits: the message of a plain frame is returned at once."""
        try:
            plain = self._flows.read(socket, first)
            if plain is not None:
                return self._accept_plain(*plain)
            if is_pad(first):
                self.pad = first
            else:
                self._accept(parts_of(socket, first, views=self._views))
        except Malformed as fault:
            self.counters.dropped[fault.reason] += 1
        return None

    def _accept_plain(self, flow: Flow, seq: int, time_ns: int, body: Part) -> Message | None:
        """One message, like the last one of its topic."""
        self.heard += 1
        self.small = len(body) < _SMALL_BYTES
        payload = body
        if not flow.detached:
            assert isinstance(body, bytes)
            payload = payload_of(body, self._bytes_max)
        missed, skip = self._sequences.take(flow.owner, flow.name, seq, 1)
        if missed:
            self._missed(flow.owner, flow.channel, missed, seq - 1)
        counters = self.counters
        counters.bytes_received += len(body)
        if skip:
            return None
        counters.received += 1
        return Message(payload, 0, Origin(flow.channel, flow.sender, seq, time_ns))

    def _accept(self, parts: list[Part]) -> None:
        frame = decode(parts)
        self.small = len(parts) == 1 and len(parts[0]) < _SMALL_BYTES
        if frame.name == self._address:
            self._accept_own(frame)
            return
        self.heard += frame.kind == Kind.DATA
        channel = self._channel(frame.name)
        if channel is None:
            return
        if frame.kind == Kind.MARK:
            missed = self._sequences.falls_quiet_at(_owner(frame), frame.name, frame.seq)
            self._missed(_owner(frame), channel, missed, frame.seq)
        elif frame.kind == Kind.DATA:
            self._accept_data(frame, channel)
            if not self._latest_only:
                self._flows.learn(parts[0], frame, channel, _owner(frame))
        else:
            raise Malformed("malformed")

    def _accept_data(self, frame: Frame, channel: str) -> None:
        payloads, headers = codec.unpack_frame(frame, self._bytes_max)
        owner, seq, count = _owner(frame), frame.seq, frame.count
        missed, skip = self._sequences.compare(owner, frame.name, seq, count)
        self.counters.bytes_received += frame.size
        sender = node_text(frame.sender)
        origin = Origin(channel, sender, frame.seq, frame.time_ns, headers)
        del payloads[:skip]
        if missed:
            self._missed(owner, channel, missed, seq - 1)
            self._sequences.advance(owner, frame.name, seq)
        self._deliver(owner, Run(payloads, skip, origin), frame.size)
        # Last: a batch that a Ctrl-C takes away is a gap then, and no silent loss. (A single
        # message may as well be lost on its way to the caller.)
        self._sequences.advance(owner, frame.name, seq + count)

    def _accept_own(self, frame: Frame) -> None:
        """What a publisher sent to this subscriber alone: a last value, or where it stands."""
        payloads, _ = codec.unpack_frame(frame, self._bytes_max)
        if len(payloads) != 1:
            raise Malformed("malformed")
        if frame.kind == Kind.LAST:
            self._accept_last(frame, payloads[0])
        elif frame.kind == Kind.MARK:
            self._accept_mark(frame, payloads[0])
        else:
            raise Malformed("malformed")

    def _accept_last(self, frame: Frame, item: Any) -> None:
        if type(item) is not list or len(item) != 3 or not is_name(item[0]):
            raise Malformed("malformed")
        channel, payload, flat = item
        headers = codec.read_headers(flat)
        if not matches(self._pattern, channel):
            return
        first, skip = self._sequences.take(_owner(frame), wire_name(channel), frame.seq, 1)
        self._missed(_owner(frame), channel, first, frame.seq - 1)
        if not skip:
            sender = node_text(frame.sender)
            origin = Origin(channel, sender, frame.seq, frame.time_ns, [headers])
            self._deliver(_owner(frame), Run([payload], 0, origin), frame.size)

    def _accept_mark(self, frame: Frame, standing: Any) -> None:
        if type(standing) is not dict:
            raise Malformed("malformed")
        for channel, seq in standing.items():
            if not is_name(channel) or type(seq) is not int or not 0 <= seq < SEQ_END:
                raise Malformed("malformed")
            first = self._sequences.stands_at(_owner(frame), wire_name(channel), seq)
            self._missed(_owner(frame), channel, first, seq)
        if frame.seq == 0:  # no further part of this mark follows
            self._sequences.marked(_owner(frame))
            waits = bool(frame.flags & Flag.WAITS)
            self.awaiting.discard((frame.sender, waits))
            self._home.acknowledge(frame.sender, self._address.decode(), waits)

    def _deliver(self, owner: int, run: Run, size: int) -> None:
        self.counters.received += len(run)
        if not self._latest_only:
            self.inbox.add(run)
            return
        for message in run:
            key = (message.sender, message.channel)
            if key in self.latest:
                self.counters.dropped["superseded"] += 1
            elif len(self.latest) >= limits.TRACKED_CHANNELS_MAX:
                self.counters.dropped["too many channels"] += 1
                continue
            self.latest[key] = message

    def _missed(self, owner: int, channel: str, first: int, last: int) -> None:
        """Those of that topic are missing; none, if `first` is 0."""
        if not first:
            return
        text = node_text(owner >> 1)
        loss = Loss(text, channel, first, last)
        self.counters.lost += loss.count
        if text in self.lost or len(self.lost) < limits.SIGHTINGS_MAX:
            self.lost[text] = self.lost.get(text, 0) + loss.count
        if self.on_loss is not None:
            self._home.run_hook(self.on_loss, loss)

    def _channel(self, name: bytes) -> str | None:
        """The channel in a frame's name if the pattern wants it."""
        try:
            return self._channels[name]
        except KeyError:
            channel = channel_name(name)
            if channel is not None and not (is_name(channel) and matches(self._pattern, channel)):
                channel = None
            if len(self._channels) >= _NAMES_CACHED_MAX:
                self._channels.clear()
            self._channels[name] = channel
            return channel
