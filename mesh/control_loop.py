"""The control thread of a node: it does what membership decides, and tells it what happened.

One loop over the control link, discovery, the deaths of processes, timers, and requests from other
threads. Messages of channels never pass through here. Nothing in it blocks but the one poll.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from mesh import host, limits
from mesh.discovery.source import Announcement, Source
from mesh.errors import Closed
from mesh.membership import Membership
from mesh.message import PeerEvent
from mesh.peering import (
    Acknowledged,
    Dial,
    Effect,
    HangUp,
    Peer,
    PeerDown,
    PeerMoved,
    PeerOffers,
    PeerUp,
    Send,
)
from mesh.sockets.control import Card, ControlMessage, Marked, Offer
from mesh.sockets.control_link import ControlLink
from mesh.sockets.home import Core, node_number
from mesh.sockets.link import Waker
from mesh.sockets.subscription import Subscription
from mesh.sockets.topics import Topics
from mesh.wiring import Wiring

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AFTER_ERROR_S = 0.05
"""A fault that repeats must not become a busy loop, nor fill a disk with its log."""


class ControlLoop:
    """Runs in a daemon thread from `start` to `stop`. Other threads use `post` and `call` only;
    what else is public belongs to the loop's own thread."""

    def __init__(
        self,
        *,
        name: str,
        membership: Membership,
        control: ControlLink,
        topics: tuple[Topics, ...],
        sources: Iterable[Source],
        card: Callable[[], Card],
        on_peer: Callable[[PeerEvent], None],
    ) -> None:
        self.membership = membership
        self.wiring = Wiring(self._endpoint_of)
        self.errors = 0
        """Exceptions that should not have happened; each was logged."""
        self._name = name
        self._control = control
        self._topics = topics
        self._sources = list(sources)
        self._card = card
        self._own = card()
        self._on_peer = on_peer
        self._inbox: deque[Callable[[], object]] = deque()
        self._bell = Waker()  # open for as long as anybody can still ring it
        self._poll = select.epoll()
        self._watched: dict[int, Callable[[], object]] = {}
        self._processes: dict[str, int] = {}
        self._running = True
        self._next_tick = 0.0
        self._looked_at: dict[Source, float] = {}
        self.finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mesh control {name}", daemon=True)
        self._watch(self._bell.fileno(), self._read_inbox)
        self._watch(control.fileno(), self._hear)
        for each in topics:
            self._watch(each.link.fileno(), each.look)

    # -- From other threads ------------------------------------------------------------------

    def start(self) -> None:
        """Announce the node, and start the thread. Raises what a source's `start` raises."""
        for source in self._sources:
            source.start(self.membership.announcement(self._own))
            if (fd := source.fileno()) >= 0:
                self._watch(fd, lambda source=source: self._look_at(source))  # type: ignore[misc]
        self._thread.start()

    def post(self, action: Callable[[], object]) -> None:
        """Have `action` run in the control thread, unless that has ended. Takes no lock, so a
        finalizer may call it."""
        if not self.finished.is_set():
            self._inbox.append(action)
            self._bell.wake()

    def call(self, action: Callable[[], T], timeout: float) -> T:
        """Run `action` in the control thread and return its result. Raises `Closed`."""
        if threading.current_thread() is self._thread:
            return action()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001  handed to the thread that asked
                future.set_exception(error)

        self.post(run)
        try:
            # What was put there before the thread ended is run by it, what comes later by nobody.
            return future.result(0.0 if self.finished.is_set() else timeout)
        except TimeoutError:
            raise Closed(f"node {self._name!r} is closing") from None

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread; False if it still runs."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- Own thread: cores and offers --------------------------------------------------------

    def add_core(self, core: Core) -> None:
        self.wiring.add(core)
        self._read_ahead(core)

    def remove_core(self, core: Core, linger_ms: int) -> None:
        self.wiring.remove(core)
        if isinstance(core, Subscription):
            self._unwatch(core.link.fileno())
        core.close(linger_ms)

    def offer(self, *offers: Offer) -> None:
        """This node offers that from now on: to its peers, and to itself."""
        self.wiring.offered(self._own.id, offers, ())
        self._apply(self.membership.offer(offers, ()))
        self._read_ahead()

    def send(self, peer_id: str, message: ControlMessage) -> None:
        """To a peer that is up, over its link; to oneself what one's own subscriber says."""
        if peer_id == self._own.id:
            if isinstance(message, Marked):
                self._marked(peer_id, message.address, message.waits)
        elif (peer := self.membership.peers.get(peer_id)) is not None:
            self._control.send(peer.link, message)

    def withdraw(self, *keys: int) -> None:
        self.wiring.offered(self._own.id, (), keys)
        self._apply(self.membership.offer((), keys))

    def leave(self, linger_ms: int) -> None:
        """Say goodbye, close everything, and end the loop."""
        self._running = False
        self._control.linger_ms = max(50, min(linger_ms, self._control.linger_ms))
        for core in self.wiring.cores:
            self._guarded(core.close, linger_ms)
        for topics in self._topics:
            self._guarded(topics.close, linger_ms)
        self._guarded(lambda: self._apply(self.membership.leave("", time.monotonic())))
        for source in self._sources:
            self._guarded(source.close)
        self._guarded(self._control.close)

    # -- The loop ----------------------------------------------------------------------------

    def _run(self) -> None:
        for source in self._sources:
            self._guarded(self._look_at, source)
        while self._running:
            for fd, _ in self._poll.poll(self._sleep_s()):
                if (handler := self._watched.get(fd)) is not None:
                    self._guarded(handler)
                if not self._running:
                    break
            else:
                self._guarded(self._on_time)
        self.finished.set()
        for fd in self._processes.values():
            os.close(fd)
        self._poll.close()
        self._read_inbox_rest()

    def _sleep_s(self) -> float:
        now = time.monotonic()
        due = self._next_tick
        if (deadline := self.membership.next_deadline()) is not None:
            due = min(due, deadline)
        return max(0.0, due - now) + 0.0005

    def _on_time(self) -> None:
        now = time.monotonic()
        self._guarded(lambda: self._apply(self.membership.tick(now)))
        if now < self._next_tick:
            return
        self._next_tick = now + limits.TICK_S
        self._guarded(self._announce_if_moved)
        for topics in self._topics:
            self._guarded(topics.tick)
        for core in self.wiring.cores:
            if core.link.closed:
                self.wiring.remove(core)
            else:
                self._guarded(core.tick)
        for source in self._sources:
            if now - self._looked_at.get(source, 0.0) >= source.interval_s:
                self._guarded(self._look_at, source)

    def _guarded(self, action: Callable[..., object], *arguments: Any) -> None:
        """The one boundary that must survive anything: without this thread a node is deaf."""
        try:
            action(*arguments)
        except Closed:
            return  # a core was closed while it was being told something
        except Exception:
            self.errors += 1
            logger.exception("node %r: unexpected error in its control thread", self._name)
            time.sleep(_AFTER_ERROR_S)

    # -- What happens ------------------------------------------------------------------------

    def _hear(self) -> None:
        if not self._running:
            return
        while heard := self._control.receive():
            now = time.monotonic()
            for each in heard:
                self._apply(
                    self.membership.received(each.link, each.message, now, address=each.address)
                )
            if not self._running:
                return
        self._report_failed()

    def _report_failed(self) -> None:
        while self._control.failed:
            link, reason = self._control.failed.pop()
            self._apply(self.membership.link_failed(link, reason, time.monotonic()))

    def _look_at(self, source: Source) -> None:
        now = time.monotonic()
        self._looked_at[source] = now
        for sighting in source.sightings():
            self._apply(self.membership.sighted(sighting, now))

    def _announce_if_moved(self) -> None:
        card = self._card()
        if card == self._own:
            return
        self._own = card
        self._apply(self.membership.moved(card))
        announcement: Announcement = self.membership.announcement(card)
        for source in self._sources:
            self._guarded(source.update, announcement)

    def _process_died(self, peer: str) -> None:
        self._forget_process(peer)
        self._apply(self.membership.process_died(peer, time.monotonic()))

    def _read_inbox(self) -> None:
        self._bell.drain()
        self._read_inbox_rest()

    def _read_inbox_rest(self) -> None:
        while self._inbox:
            self._guarded(self._inbox.popleft())

    # -- What is to be done ------------------------------------------------------------------

    def _apply(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(link, message):
                    self._control.send(link, message)
                case Dial(link, endpoint):
                    self._control.dial(link, endpoint)
                case HangUp(link):
                    self._control.hang_up(link)
                case PeerUp(peer):
                    self._peer_up(peer)
                case PeerDown(peer, reason):
                    self._peer_down(peer, reason)
                case PeerOffers(peer_id, add, drop):
                    self.wiring.offered(peer_id, add, drop)
                    self._read_ahead()
                case PeerMoved(peer):
                    self.wiring.moved(peer.id)
                case Acknowledged(peer_id, address, waits):
                    self._marked(peer_id, address, waits)
                case _:
                    pass
        if self._running and (self._control.noticed or self._control.failed):
            self.post(self._hear)

    def _marked(self, peer_id: str, address: str, waits: bool) -> None:
        for topics in self._topics:
            if topics.waits == waits:
                topics.marked(node_number(peer_id), address)

    def _peer_up(self, peer: Peer) -> None:
        if peer.same_host and peer.card.pid_space == self._own.pid_space and peer.card.pid:
            fd = host.open_process(peer.card.pid, peer.card.started)
            if fd is None:
                self.post(lambda: self._process_died(peer.id))
            else:
                self._processes[peer.id] = fd
                self._watch(fd, lambda: self._process_died(peer.id))
        logger.info("node %r: %s joined (%s)", self._name, peer.card.name, peer.id)
        self._on_peer(PeerEvent("joined", peer.info, ""))

    def _peer_down(self, peer: Peer, reason: str) -> None:
        self._forget_process(peer.id)
        self.wiring.gone(peer.id, reason)
        if reason in ("died", "silent"):
            for topics in self._topics:
                topics.lost(node_number(peer.id))
        logger.info("node %r: %s left (%s): %s", self._name, peer.card.name, peer.id, reason)
        self._on_peer(PeerEvent("left", peer.info, reason))

    def _endpoint_of(self, peer_id: str, offer: Offer) -> str | None:
        if peer_id == self._own.id:
            endpoints = offer.endpoints or self._own.topics
            return endpoints[0]  # one's own channels over ipc
        peer = self.membership.peers.get(peer_id)
        if peer is None:
            return None
        return peer.data_endpoint(offer.endpoints or peer.card.topics)

    def _read_ahead(self, core: Core | None = None) -> None:
        """Watch the subscriptions that expect a mark, until it has come."""
        for each in self.wiring.cores if core is None else (core,):
            if not isinstance(each, Subscription) or each.link.closed:
                continue
            each.read_ahead()  # libzmq signals only a reader that has found its pipes empty once
            if each.expects_mark:
                self._watch(each.link.fileno(), lambda each=each: self._reading_ahead(each))  # type: ignore[misc]

    def _reading_ahead(self, core: Subscription) -> None:
        if not core.link.closed:
            core.read_ahead()
            if not core.expects_mark:
                self._unwatch(core.link.fileno())

    # -- Descriptors -------------------------------------------------------------------------

    def _watch(self, fd: int, handler: Callable[[], object]) -> None:
        if fd not in self._watched:
            self._poll.register(fd, select.EPOLLIN)
        self._watched[fd] = handler

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _forget_process(self, peer: str) -> None:
        fd = self._processes.pop(peer, None)
        if fd is not None:
            self._unwatch(fd)
            os.close(fd)

    def abandon(self) -> None:
        """In a forked child: there is no thread here, and the descriptors are the parent's."""
        self._running = False
        self._inbox.clear()
        self.finished.set()

    def dropped(self) -> Counter[str]:
        return self._control.dropped + Counter(self.membership.dropped)
