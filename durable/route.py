"""The way from a stream to one sidecar: over sockets, or within the process.

A query that was begun is answered once, whatever becomes of the connection meanwhile: it is asked
again, of the same sidecar, in the order in which it came. All but `begin`'s errors are for `reply`
to tell. Both ways have a link (`mesh.sockets.link`), under whose lock everything here is called.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any, Final, Protocol, TypeVar

from mesh.durable.batch import Batch
from mesh.durable.log import Log
from mesh.durable.outcomes import Refused, error_of
from mesh.durable.protocol import (
    Append,
    Query,
    Reply,
    decode_reply,
    encode_message,
    pack_batch,
)
from mesh.durable.sidecar import Sidecar
from mesh.errors import Busy, Closed, MeshError, RemoteError, StorageFailed
from mesh.sockets.calls import Call, Requests
from mesh.sockets.control import Offer
from mesh.sockets.direct import PACKET_BYTES_MAX, DirectLine, NotReceived
from mesh.sockets.frame import Malformed
from mesh.sockets.home import Home, node_text
from mesh.sockets.link import Link, Recipient
from mesh.sockets.single import Message, encode, payload_of
from mesh.sockets.transport import scheme_of

_LATE_S: Final = 0.25
"""Who was to send by the direct line has died in between, of a Ctrl-C."""

R = TypeVar("R")


class Ask(Protocol):
    """A query under way. The link knows by it who waits for the answer."""

    waiter: Recipient | None


class Route(Protocol):
    partition: str
    link: Link

    @property
    def bytes_max(self) -> int:
        """Of what may be asked, as far as the sidecar has said so by now."""

    def begin(self, query: Query) -> Ask:
        """Ask. Raises `Busy`, `PayloadTooLarge`."""

    def append(self, stream: str, batch: Batch) -> Ask:
        """Ask for an append, likewise."""

    def append_alone(self, stream: str, batch: Batch) -> Ask:
        """Likewise, where nothing else is under way: the caller is to have it `travel` then."""

    def travels(self, ask: Ask) -> bool:
        """Whether it is on its way alone: what is asked meanwhile might overtake it."""

    def travel(self, ask: Ask, timeout: float | None) -> None:
        """Have it answered, or under way as others are, after `timeout` seconds at most. Not under
        the lock. Raises `Closed`."""

    def look(self, ask: Ask | None) -> None:
        """Take in what answers have come; of several at least the one to `ask`, and all without
        one."""

    def reply(self, ask: Ask) -> Reply | MeshError | None:
        """What came of it; None: nothing so far."""

    def sent_once(self, ask: Ask) -> bool:
        """Whether the sidecar cannot have it from an earlier connection."""

    def abandon(self, ask: Ask) -> None:
        """Nobody waits for its answer any more. Takes the lock."""


class _Core(Requests):
    """With a direct line, if the sidecar is on this host and has one."""

    def __init__(self, home: Home, partition: str, takes_bytes_max: int) -> None:
        super().__init__(home, partition, kind="stream", seeks="log", patient=True)
        self.link.what = f"log {partition}"
        self.asks_bytes_max = min(self.bytes_max, takes_bytes_max or self.bytes_max)
        """What both sides take, as far as that is known."""
        self.line: DirectLine | None = None
        self._line_of: tuple[int, int] | None = None
        self._path = ""
        """Where that is."""

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        self.asks_bytes_max = min(self.bytes_max, offer.message_bytes_max or self.bytes_max)
        super().attach(peer, offer, endpoint)
        is_of = self._home.transport.is_of
        if scheme_of(endpoint) == "ipc" and is_of(offer.direct, node_text(peer)):
            self._hang_up()
            self._line_of, self._path = (peer, offer.key), offer.direct
            self._connect_line()

    def detach(self, peer: int, key: int, reason: str) -> None:
        if self._line_of == (peer, key):
            self._hang_up()
        super().detach(peer, key, reason)

    def tick(self) -> None:
        """A line that broke, as one does whose answer was late, is there again."""
        super().tick()
        if self._line_of is not None and (self.line is None or self.line.closed):
            self._connect_line()

    def _connect_line(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # then it goes without
            self.line = DirectLine(self._path)

    def close(self, linger_ms: int) -> None:
        self._hang_up()
        super().close(linger_ms)

    def _hang_up(self) -> None:
        line, self.line, self._line_of = self.line, None, None
        if line is not None:
            line.close()


class _RemoteAsk(Call):
    __slots__ = ("answer", "direct", "first_server", "is_back", "result")

    def __init__(self, core: Requests, message: Message) -> None:
        super().__init__(core, message, None, True)
        self.first_server: object | None = None
        """Who got it at once, if anybody did."""
        self.result: Reply | MeshError | None = None
        """The answer, once it was decoded."""
        self.direct: list[tuple[DirectLine, bytes]] = []
        """The line that was claimed for it, and what is to be sent there: until somebody does."""
        self.answer: bytes | None = None
        """What came by the line."""
        self.is_back = False
        """Whether it was sent there, and nobody waits for the answer any more."""


class RemoteRoute:
    """Over sockets."""

    def __init__(self, home: Home, partition: str, takes_bytes_max: int = 0) -> None:
        """`takes_bytes_max`: what the sidecar says that it takes. 0: that is not known yet."""
        self.partition = partition
        self.core = _Core(home, partition, takes_bytes_max)
        self.link = self.core.link
        self._alone: set[_RemoteAsk] = set()
        """What a line was claimed for. More than one, though a line is claimed once at a time: it
        is given back before its answer is taken in here, and may be another one meanwhile."""

    @property
    def bytes_max(self) -> int:
        return self.core.asks_bytes_max

    def begin(self, query: Query) -> Ask:
        return self._begin(self._ask(encode_message(query)))

    def _ask(self, data: bytes) -> _RemoteAsk:
        return _RemoteAsk(self.core, encode(data, None, self.core.asks_bytes_max))

    def _begin(self, ask: _RemoteAsk) -> Ask:
        self.core.begin(ask)
        ask.first_server = ask.server
        return ask

    def append(self, stream: str, batch: Batch) -> Ask:
        return self.begin(Append(stream, memoryview(pack_batch(batch))))

    def append_alone(self, stream: str, batch: Batch) -> Ask:
        data = encode_message(Append(stream, memoryview(pack_batch(batch))))
        ask = self._ask(data)
        line = self.core.line
        if line is None or len(data) > PACKET_BYTES_MAX or not line.claim():
            return self._begin(ask)
        ask.direct.append((line, data))
        ask.first_server = ask.server = _THE_LINE
        self._alone.add(ask)
        return ask

    def travels(self, ask: Ask) -> bool:
        return ask in self._alone

    def travel(self, ask: Ask, timeout: float | None) -> None:
        assert isinstance(ask, _RemoteAsk)
        if ask not in self._alone:
            return
        late = False
        try:
            try:
                line, data = ask.direct.pop()
            except IndexError:
                late = True
            else:
                ask.answer = line.exchange(data, timeout)
        except NotReceived:
            ask.first_server = None
        finally:
            if not late:
                ask.is_back = True  # if a Ctrl-C comes now, the next to look takes it in
                self.link.run(partial(self._take_back, ask))

    def _look_after_alone(self) -> None:
        """What was to travel, or has, and whose thread died of a Ctrl-C."""
        for ask in tuple(self._alone):
            if time.monotonic() - ask.began > _LATE_S:
                with contextlib.suppress(IndexError):  # it travels just now
                    line, _ = ask.direct.pop()
                    ask.first_server = None
                    ask.is_back = True
                    line.give_up()
            if ask.is_back:
                self._take_back(ask)

    def _take_back(self, ask: _RemoteAsk) -> None:
        """It has its answer, or goes the usual way. Done again, if it was interrupted."""
        if ask not in self._alone:
            return
        core, answer = self.core, ask.answer
        if answer is not None:
            try:
                ask.result = decode_reply(answer)
            except Malformed as fault:
                core.counters.dropped[fault.reason] += 1
                ask.result = _not_an_answer(self.partition)
            ask.outcome = b""
            core.counters.sent += 1
            core.counters.bytes_sent += len(ask.message)
            core.counters.received += 1
            core.counters.bytes_received += len(answer)
        elif not ask.seq:
            ask.server = None
            try:
                core.begin(ask)
            except Busy as error:
                ask.outcome = error
            if ask.first_server is None:
                ask.first_server = ask.server
        self._alone.discard(ask)
        if not self.link.alone:
            self.link.wake_all()

    def look(self, ask: Ask | None) -> None:
        if ask is None:
            self._look_after_alone()
            self.core.read()
        else:
            assert isinstance(ask, _RemoteAsk)
            self.core.look(ask)

    def reply(self, ask: Ask) -> Reply | MeshError | None:
        assert isinstance(ask, _RemoteAsk)
        outcome = ask.outcome
        if outcome is None or isinstance(outcome, MeshError):
            return outcome
        if ask.result is None:
            try:
                data = payload_of(outcome, self.core.bytes_max)
                if not isinstance(data, bytes | memoryview):
                    raise Malformed("malformed")
                ask.result = decode_reply(data)
            except Malformed as fault:
                self.core.counters.dropped[fault.reason] += 1
                ask.result = _not_an_answer(self.partition)
        return ask.result

    def sent_once(self, ask: Ask) -> bool:
        assert isinstance(ask, _RemoteAsk)
        return ask.first_server is not None and ask.first_server is ask.server

    def abandon(self, ask: Ask) -> None:
        assert isinstance(ask, _RemoteAsk)
        self.core.abandon(ask)


def _not_an_answer(partition: str) -> RemoteError:
    return RemoteError("Malformed", f"an answer of {partition} is none", "")


_THE_LINE: Any = object()
"""In place of a server: who has it from there has it from nobody else."""


class _LocalAsk:
    __slots__ = ("outcome", "waiter")

    def __init__(self) -> None:
        self.outcome: Reply | None = None
        self.waiter: Recipient | None = None


class LocalRoute:
    """To the sidecar in this process. It is never asked to wait for room: that is under the lock
    that answers take."""

    bytes_max = sys.maxsize
    """Nothing is sent."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.partition = f"{sidecar.number:016x}"
        self.link = Link(f"log {self.partition}")
        self._sidecar = sidecar
        self._asking = 0
        """The thread that asks right now, and may be answered before it has done so."""

    def begin(self, query: Query) -> Ask:
        return self._begin(partial(self._sidecar.ask, query, patient=False))

    def append(self, stream: str, batch: Batch) -> Ask:
        return self._begin(partial(self._sidecar.append, stream, batch, patient=False))

    append_alone = append

    def travels(self, ask: Ask) -> bool:
        return False

    def travel(self, ask: Ask, timeout: float | None) -> None:
        """It is under way as all are."""

    def has(self, stream: str) -> bool:
        """Whether it has that stream."""
        return stream in self._sidecar.streams

    def log(self, stream: str) -> Log | None:
        """The log itself, to be read in this process; None if it is not there."""
        hosted = self._sidecar.hosted(stream)
        return None if hosted is None else hosted.log

    def _begin(self, ask_for: Callable[[Callable[[Reply], object]], object]) -> Ask:
        ask = _LocalAsk()
        self._asking = get_ident()
        try:
            ask_for(partial(self._answer, ask))
        finally:
            self._asking = 0
        return ask

    def _answer(self, ask: _LocalAsk, reply: Reply) -> None:
        if self._asking == get_ident():
            ask.outcome = reply
            return
        with self.link.lock:
            ask.outcome = reply
            if ask.waiter is not None:
                self.link.hand(ask, True)

    def look(self, ask: Ask | None) -> None:
        """Answers come by themselves."""

    def reply(self, ask: Ask) -> Reply | MeshError | None:
        assert isinstance(ask, _LocalAsk)
        return ask.outcome

    def sent_once(self, ask: Ask) -> bool:
        return True

    def abandon(self, ask: Ask) -> None:
        """Nothing is kept of it here."""


def answer(
    route: Route,
    ask: Ask,
    timeout: float | None,
    what: str,
    *,
    stopped: Callable[[], bool] = lambda: False,
    refused: bool = True,
    again: bool = False,
) -> Reply | None:
    """Block until `ask` is answered, and return that; None once it is to be `stopped`, of which the
    link's waiters have to be told. Raises what was answered instead of a reply, of what was
    `refused` as well, if asked to; `Timeout`, after which nobody waits for it `again`, unless it is
    said."""
    link, attempt = route.link, _attempt(route, ask, stopped)
    try:
        result = link.wait(attempt, timeout, what, slot=ask)
    except BaseException:
        if not again:
            route.abandon(ask)
        raise
    return _result(route, ask, result, refused)


async def aanswer(
    route: Route,
    ask: Ask,
    timeout: float | None,
    what: str,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Reply | None:
    """`answer` for asyncio."""
    link, attempt = route.link, _attempt(route, ask, stopped)
    try:
        result = await link.wait_async(attempt, timeout, what, slot=ask)
    except BaseException:
        route.abandon(ask)
        raise
    return _result(route, ask, result)


def wake(route: Route) -> None:
    """Whoever waits for an answer there is to look whether it is `stopped`. From any thread."""
    with contextlib.suppress(Closed):
        route.link.run(route.link.wake_all)


def expected(kind: type[R], reply: object, route: Route) -> R:
    """`reply`, which has to be of that kind. Raises `StorageFailed`."""
    if not isinstance(reply, kind):
        raise StorageFailed(f"sidecar {route.partition} gave an answer to another question")
    return reply


def _attempt(route: Route, ask: Ask, stopped: Callable[[], bool]) -> Callable[[], object]:
    def attempt() -> object:
        if stopped():
            return False
        route.look(ask)
        return route.reply(ask)

    return attempt


def _result(route: Route, ask: Ask, result: object, refused: bool = True) -> Reply | None:
    if result is False:
        route.abandon(ask)
        return None
    reply = route.reply(ask)  # who is handed it, is told no more than that
    if refused and isinstance(reply, Refused):
        raise error_of(reply)
    if isinstance(reply, MeshError):
        raise reply
    return reply
