"""The control link's sockets: one bound for whoever dials, one for each link that is dialled.

Used by the control thread alone, never blocks. Says what it heard and which links failed; what
that means is membership's business. A link is known by its key: the number under which it was
dialled, or for an accepted one a byte for the socket it came in by, and its routing id.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import zmq

from mesh import limits
from mesh.sockets.control import ControlMessage, decode_control, encode_control
from mesh.sockets.curve import ZAP_ENDPOINT, answer_zap
from mesh.sockets.frame import Kind, Malformed, decode, encode
from mesh.sockets.parts import has_input
from mesh.sockets.transport import Bound, Socket, Transport

LinkKey = int | bytes

_NAME: Final = b"\0"
_PARTS_MAX: Final = 2
_ROUND_PARTS_MAX: Final = 256
"""Parts read from one socket at a time, whatever they are: everything else gets its turn."""
_HWM: Final = 10_000
_LINGER_MS: Final = 1000
_FRAME_BYTES_MAX: Final = limits.CONTROL_BYTES_MAX + limits.SMALL_FRAME_BYTES_MAX
_HANDSHAKE_FAILED: Final = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class Heard(msgspec.Struct, frozen=True):
    link: LinkKey
    message: ControlMessage
    address: str
    """The remote IP address of an accepted tcp link, else empty."""


class _Dialled(msgspec.Struct):
    socket: Socket
    endpoint: str
    monitor: Any = None


class ControlLink:
    """All control sockets of one node."""

    def __init__(self, transport: Transport, node_id: int, port: int) -> None:
        self.dropped: Counter[str] = Counter()
        self.failed: list[tuple[LinkKey, str]] = []
        """Links that failed since this was last emptied, with the reason."""
        self.noticed = False
        """Whether there is something to `receive` of which the descriptor may not tell: what an
        operation came across, or the last round left."""
        self.linger_ms = _LINGER_MS
        """How long what was sent may still take to leave once a link is closed."""
        self._transport = transport
        self._node_id = node_id
        self._seq = 0
        self._poll = select.epoll()
        self._dialled: dict[int, _Dialled] = {}
        self._skipping: set[Socket] = set()
        """Sockets that are within a message of too many parts."""
        self._gate = self._open_gate() if transport.keys is not None else None
        self._bound: list[Bound] = transport.bind(
            zmq.ROUTER, "control", port=port, hwm=_HWM, bytes_max=_FRAME_BYTES_MAX
        )
        for bound in self._bound:
            self._watch(bound.socket)

    def fileno(self) -> int:
        """Readable while there may be something to `receive`."""
        return self._poll.fileno()

    def endpoints(self) -> tuple[str, ...]:
        """Where others reach this node, as of now: ipc first."""
        tcp = [f"tcp://{address}:{self.port}" for address in self._transport.addresses]
        return (self._bound[0].endpoint, *(tcp if self.port else ()))

    def follow(self) -> None:
        """Bind also to addresses that named interfaces got since."""
        self._transport.follow(self._bound)

    @property
    def port(self) -> int:
        """The tcp port, 0 without a network."""
        return self._bound[-1].port

    def dial(self, link: int, endpoint: str) -> None:
        """Connect; a failure that is known at once is in `failed`."""
        scheme, _, path = endpoint.partition("://")
        if scheme == "ipc" and not os.path.exists(path):
            self.failed.append((link, "no such socket"))
            return
        socket = self._transport.connecting(zmq.DEALER, scheme, hwm=_HWM, stop_if_refused=True)
        dialled = _Dialled(socket, endpoint)
        if scheme == "tcp" and self._transport.keys is not None:
            dialled.monitor = socket.get_monitor_socket(_HANDSHAKE_FAILED)
            self._watch(dialled.monitor)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.failed.append((link, str(error)))
            self._close(dialled, 0)
            return
        self._dialled[link] = dialled
        self._watch(socket)
        self._look(socket)
        if dialled.monitor is not None:
            self._look(dialled.monitor)

    def hang_up(self, link: LinkKey) -> None:
        """Close a dialled link, after what was sent on it. An accepted one is the dialler's."""
        if isinstance(link, int) and (dialled := self._dialled.pop(link, None)) is not None:
            self._close(dialled, self.linger_ms)

    def send(self, link: LinkKey, message: ControlMessage) -> None:
        """Send, or put the link among the `failed`."""
        self._seq += 1
        body = encode_control(message)
        frame = encode(_NAME, Kind.CONTROL, body, sender=self._node_id, seq=self._seq)
        try:
            if isinstance(link, int):
                if (dialled := self._dialled.get(link)) is not None:
                    dialled.socket.send(frame, zmq.NOBLOCK)
                    self._look(dialled.socket)
            else:
                bound = self._bound[link[0]]
                bound.socket.send_multipart([link[1:], frame], zmq.NOBLOCK)
                self._look(bound.socket)
        except zmq.ZMQError as error:  # the other side is gone, or reads nothing any more
            self.dropped["control unsent"] += 1
            self.failed.append((link, str(error)))

    def receive(self) -> list[Heard]:
        """What has come, one round of it; what is left is `noticed`."""
        self.noticed = False
        if self._gate is not None:
            self._answer_gate()
        heard: list[Heard] = []
        for index, bound in enumerate(self._bound):
            for routing_id, *rest in self._messages(bound.socket):
                key = bytes((index,)) + routing_id.bytes
                address = str(rest[0].get("Peer-Address")) if rest and bound.port else ""
                self._hear(heard, key, rest, address)
        for link, dialled in list(self._dialled.items()):
            for parts in self._messages(dialled.socket):
                self._hear(heard, link, parts, "")
            self._look_at_monitor(link, dialled)
        return heard

    def close(self) -> None:
        for link in list(self._dialled):
            self.hang_up(link)
        for bound in self._bound:
            bound.socket.close(linger=self.linger_ms)
        self._transport.release(self._bound)
        if self._gate is not None:
            self._gate.close(linger=0)
        self._poll.close()

    def _hear(
        self, heard: list[Heard], link: LinkKey, parts: list[zmq.Frame], address: str
    ) -> None:
        if len(parts) != 1 or len(parts[0]) > limits.CONTROL_BYTES_MAX:
            self.dropped["malformed"] += 1
            return
        try:
            frame = decode([parts[0].bytes])
        except Malformed as fault:
            self.dropped[fault.reason] += 1
            return
        message = decode_control(frame.body) if frame.kind == Kind.CONTROL else None
        if message is None:
            self.dropped["malformed"] += 1
        else:
            heard.append(Heard(link, message, address))

    def _messages(self, socket: Socket) -> Iterator[list[zmq.Frame]]:
        """One round of whole messages; parts beyond the expected are read and thrown away, all but
        one. Of a message of very many, the rest is thrown away in later rounds."""
        parts: list[zmq.Frame] = []
        for read in itertools.count():
            skipping = socket in self._skipping
            if read >= _ROUND_PARTS_MAX and (skipping or len(parts) in (0, _PARTS_MAX + 1)):
                break
            try:
                part = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(parts) <= _PARTS_MAX:
                parts.append(part)
            if not part.more:
                if not skipping:
                    yield parts
                self._skipping.discard(socket)
                parts = []
        self.noticed = True
        if parts and socket not in self._skipping:
            self._skipping.add(socket)
            yield parts

    def _look_at_monitor(self, link: int, dialled: _Dialled) -> None:
        if dialled.monitor is None:
            return
        try:
            while True:
                dialled.monitor.recv_multipart(zmq.NOBLOCK)
                self.failed.append((link, "handshake"))
        except zmq.Again:
            return

    def _open_gate(self) -> Socket:
        """ZAP has to be there before anything is bound: without it libzmq lets any key in."""
        gate = self._transport.context.socket(zmq.REP)
        gate.bind(ZAP_ENDPOINT)
        self._watch(gate)
        return gate

    def _answer_gate(self) -> None:
        assert self._gate is not None
        assert self._transport.keys is not None
        for _ in range(_ROUND_PARTS_MAX):
            try:
                request = self._gate.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            answer = answer_zap(request, self._transport.keys.public)
            if answer[2] != b"200":
                self.dropped["key refused"] += 1
            self._gate.send_multipart(answer)
        self.noticed = True

    def _look(self, socket: Socket) -> None:
        """After an operation, since it may have swallowed the descriptor's edge; and after
        connecting, since libzmq signals only a reader that has found the pipe empty once."""
        self.noticed = has_input(socket) or self.noticed

    def _watch(self, socket: Any) -> None:
        self._poll.register(socket.fileno(), select.EPOLLIN)

    def _close(self, dialled: _Dialled, linger_ms: int) -> None:
        if dialled.monitor is not None:
            self._poll.unregister(dialled.monitor.fileno())
            dialled.socket.disable_monitor()
            dialled.monitor.close(linger=0)
        with contextlib.suppress(FileNotFoundError):  # never watched: connecting failed
            self._poll.unregister(dialled.socket.fileno())
        self._skipping.discard(dialled.socket)
        dialled.socket.close(linger=linger_ms)
