"""The control thread of a node: it does what membership decides, and tells it what happened.

One loop over the control link, discovery, the deaths of processes, timers, and requests from other
threads. Messages of channels do not pass through here, except that a subscription is read ahead
until its marks have come (docs/decisions/003). It also ends the node, wherever the wish came from:
nobody else has to live on for that, and whoever waits for it may stop waiting.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from mesh import host, limits
from mesh.discovery.source import Announcement, Sighting, Source
from mesh.loop import Loop
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
from mesh.presence import Presence
from mesh.sockets.control import Card, ControlMessage, Marked, Offer
from mesh.sockets.control_link import ControlLink, Heard, LinkKey
from mesh.sockets.home import Core, Counters, Unhurried, node_number
from mesh.sockets.subscription import Subscription
from mesh.sockets.topics import Topics
from mesh.sockets.transport import Transport
from mesh.wiring import Wiring

logger = logging.getLogger(__name__)

_LINGER_MS_MIN = 50
"""What was sent gets at least this long to leave, whatever else took the time."""
_LINGER_MS_MAX = (1 << 31) - 1
_REMOVED_LINGER_MS = 1000
_DYING_S = 0.1
"""A process that dies closes its connections a little before the kernel tells of its death."""
_LEAVING_S = 0.005
"""How often to look whether the last handlers have answered."""
_ANSWERING_S = 0.05
"""The goodbye takes another connection than the last answers, and must not overtake them."""


class ControlLoop(Loop):
    """The loop of a node: starts, with the node's announcement, in `start`, and ends the node after
    `leave`."""

    def __init__(
        self,
        *,
        name: str,
        membership: Membership,
        control: ControlLink,
        topics: tuple[Topics, ...],
        sources: Iterable[Source],
        card: Callable[[], Card],
        presence: Presence,
        transport: Transport,
        on_end: Callable[[], object],
    ) -> None:
        super().__init__(name)
        self.membership = membership
        self._own = card()
        self.wiring = Wiring(self._endpoint_of, self._own.id)
        self._control = control
        self._topics = topics
        self._sources = list(sources)
        self._card = card
        self._presence = presence
        self._transport = transport
        self._on_end = on_end
        self._cores: dict[Core, tuple[Offer, ...]] = {}
        """With what is offered for them; those that are still in the inbox included."""
        self._past: defaultdict[str, Counters] = defaultdict(Counters)
        """What cores that are gone have counted, by kind."""
        self._processes: dict[str, int] = {}
        self._suspects: dict[LinkKey, tuple[float, str]] = {}
        """Links that failed to processes that may be dying: until when the kernel may say so."""
        self._next_tick = 0.0
        self._looked_at: dict[Source, float] = {}
        self._leave_by: float | None = None
        self._linger_until = math.inf
        """When what was sent, and was not read, is given up."""
        self._answered_at = 0.0
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
        super().start()

    def give_up(self) -> None:
        """End a node that was not completed, whether or not the thread has started."""
        self.post(lambda: self.leave(0))
        self.run()
        self._presence.wait_until(lambda: self.ended, 2.0)

    def add(self, core: Core, *offers: Offer) -> None:
        """A core that a handle was made for, with what it offers to others. Takes no lock."""
        self._cores[core] = offers
        self.post(lambda: self._add(core, offers))

    def remove(self, core: Core) -> None:
        """Its handle was given back. Takes no lock."""
        self.post(lambda: self._remove(core))

    def abandon(self) -> None:
        super().abandon()
        for core in self._cores:
            core.link.abandon()
        for topics in self._topics:
            topics.link.abandon()

    # -- Own thread: cores and offers --------------------------------------------------------

    def _add(self, core: Core, offers: tuple[Offer, ...]) -> None:
        self.wiring.add(core)
        self._read_ahead(core)
        if offers:
            self.offer(*offers)

    def _remove(self, core: Core) -> None:
        """It is closed, or is to be: nothing of it is offered any more, but what it counted stays.
        Idempotent."""
        offers = self._cores.pop(core, None)
        if offers is None:
            return
        if isinstance(core, Subscription):
            self._unwatch(core.link.fileno())
        if offers:
            self.withdraw(*(offer.key for offer in offers))
        self.wiring.remove(core)
        self._guarded(core.close, _REMOVED_LINGER_MS)
        self._past[core.kind].add(core.counters)

    def offer(self, *offers: Offer) -> None:
        """This node offers that from now on: to its peers, and to itself."""
        self.wiring.offered(self._own.id, offers, ())
        self._apply(self.membership.offer(offers, ()))
        self._read_ahead()

    def withdraw(self, *keys: int) -> None:
        self.wiring.offered(self._own.id, (), keys)
        self._apply(self.membership.offer((), keys))

    def send(self, peer_id: str, message: ControlMessage) -> None:
        """To a peer that is up, over its link; to oneself what one's own subscriber says."""
        if peer_id == self._own.id:
            if isinstance(message, Marked):
                self._marked(peer_id, message.address, message.waits)
        elif (peer := self.membership.peers.get(peer_id)) is not None:
            self._control.send(peer.link, message)

    def counters(self) -> dict[str, Counters]:
        """What all cores have counted, those that are gone included, by kind."""
        total: defaultdict[str, Counters] = defaultdict(Counters)
        for kind, counters in self._past.items():
            total[kind].add(counters)
        for part in (*tuple(self._cores), *self._topics):
            with part.link.lock:  # what has left and is not counted yet is under it
                total[part.kind].add(part.counters)
        return total

    def dropped(self) -> Counter[str]:
        """What was refused or thrown away other than by cores, by reason."""
        dropped = self._control.dropped + self.membership.dropped + self.wiring.dropped
        dropped["internal error"] += self.errors
        for source in self._sources:
            for what in ("ignored", "unresolved", "failures"):
                dropped[f"{source.name} {what}"] += getattr(source, what, 0)
        return dropped

    # -- The loop ----------------------------------------------------------------------------

    def _begin(self) -> None:
        for source in self._sources:
            self._guarded(self._look_at, source)

    def _sleep_s(self) -> float:
        if self._control.noticed or self._control.failed:
            return 0.0
        now = time.monotonic()
        due = min([self._next_tick, *(at for at, _ in self._suspects.values())])
        if self._leave_by is not None:
            due = min(due, now + _LEAVING_S)
        if (deadline := self.membership.next_deadline()) is not None:
            due = min(due, deadline)
        return max(0.0, due - now) + 0.0005

    def _on_time(self) -> None:
        if self._control.noticed or self._control.failed:
            self._guarded(self._hear)
        self._guarded(self._clear_up, time.monotonic())
        self._guarded(lambda: self._apply(self.membership.tick(time.monotonic())))
        self._guarded(self._leave_once_answered)
        now = time.monotonic()
        if now < self._next_tick or not self._running:
            return
        self._next_tick = now + limits.TICK_S
        self._guarded(self._announce_if_moved)
        for topics in self._topics:
            self._guarded(topics.tick)
        for core in self.wiring.cores:
            self._guarded(partial(self._remove, core) if core.link.closed else core.tick)
        self._guarded(self.wiring.retry)
        for source in self._sources:
            if now - self._looked_at.get(source, -math.inf) >= source.interval_s:
                self._guarded(self._look_at, source)

    # -- Its end -----------------------------------------------------------------------------

    def leave(self, timeout: float) -> None:
        """Have services take no more requests; say goodbye and end once those that are running are
        answered, or `timeout` seconds have passed. Said again, the earlier deadline counts."""
        leave_by = time.monotonic() + timeout
        if self._leave_by is not None:
            self._leave_by = min(self._leave_by, leave_by)
            return
        self._leave_by = leave_by
        for core in self._unhurried():
            self._guarded(_finish, core, min(round(timeout * 1000), _LINGER_MS_MAX))
        self._presence.tell(None)
        self._leave_once_answered()

    def hurry(self, timeout: float) -> None:
        """Give up what was sent and not read by then, also if the loop reads nothing any more that
        is posted. From any thread; neither locks nor blocks."""
        by = time.monotonic() + max(timeout, _LINGER_MS_MIN / 1000)
        self._linger_until = min(self._linger_until, by)

    def _unhurried(self) -> list[Core]:
        return [core for core in tuple(self._cores) if isinstance(core, Unhurried)]

    def _leave_once_answered(self) -> None:
        if self._leave_by is None or not self._running:
            return
        now = time.monotonic()
        for core in self._unhurried():
            self._guarded(self._go_on, core, now)
        if now >= min(self._answered_at, self._leave_by):
            self._leave(now, self._leave_by)

    def _go_on(self, core: Unhurried, now: float) -> None:
        if not core.go_on():
            self._answered_at = now + _ANSWERING_S

    def _leave(self, now: float, leave_by: float) -> None:
        self._running = False
        left_ms = min(round((leave_by - now) * 1000), _LINGER_MS_MAX)
        linger_ms = max(_LINGER_MS_MIN, left_ms)
        self._linger_until = min(self._linger_until, now + linger_ms / 1000)
        self._control.linger_ms = min(linger_ms, self._control.linger_ms)
        for core in tuple(self._cores):
            self._guarded(core.close, 0 if isinstance(core, Unhurried) else linger_ms)
        for topics in self._topics:
            self._guarded(topics.close, linger_ms)
        self._guarded(lambda: self._apply(self.membership.leave("")))
        self._guarded(self._control.close)

    def _conclude(self) -> None:
        for fd in self._processes.values():
            os.close(fd)
        # After the sockets, whose files are removed by whoever finds a dead node's own.
        for source in self._sources:
            self._guarded(source.close)
        self._transport.close()
        # Only now has libzmq given all that was sent to the kernel.
        for topics in self._topics:
            self._guarded(topics.wait_drained, lambda: self._linger_until)

    def _told(self) -> None:
        self._on_end()
        self._presence.tell(None)

    # -- What happens ------------------------------------------------------------------------

    def _hear(self) -> None:
        """One round of what was said; if there is more, the loop comes back for it."""
        for each in self._control.receive():
            self._guarded(self._heard, each)
        while self._control.failed and self._running:
            link, reason = self._control.failed.pop()
            if self._is_watched(link):
                self._suspects.setdefault(link, (time.monotonic() + _DYING_S, reason))
            else:
                self._apply(self.membership.link_failed(link, reason, time.monotonic()))

    def _is_watched(self, link: LinkKey) -> bool:
        """Whether the kernel will tell of the death of the process at the other end."""
        peers = self.membership.peers.values()
        return any(peer.link == link and peer.id in self._processes for peer in peers)

    def _clear_up(self, now: float) -> None:
        """The kernel has had its time: who is suspected still has lost the link, not its life."""
        for link, (at, reason) in list(self._suspects.items()):
            if now >= at:
                del self._suspects[link]
                self._apply(self.membership.link_failed(link, reason, now))

    def _heard(self, heard: Heard) -> None:
        if self._running:
            now = time.monotonic()
            self._apply(
                self.membership.received(heard.link, heard.message, now, address=heard.address)
            )

    def _look_at(self, source: Source) -> None:
        self._looked_at[source] = time.monotonic()
        for sighting in source.sightings():
            self._guarded(self._sighted, sighting)

    def _sighted(self, sighting: Sighting) -> None:
        self._apply(self.membership.sighted(sighting, time.monotonic()))

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

    # -- What is to be done ------------------------------------------------------------------

    def _apply(self, effects: Iterable[Effect]) -> None:
        """Carry out each of them, whatever becomes of the others: membership says it once."""
        for effect in effects:
            self._guarded(self._do, effect)

    def _do(self, effect: Effect) -> None:
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

    def _marked(self, peer_id: str, address: str, waits: bool) -> None:
        for topics in self._topics:
            if topics.waits == waits:
                topics.marked(node_number(peer_id), address)

    def _peer_up(self, peer: Peer) -> None:
        self._guarded(self._watch_process, peer)
        logger.info("node %r: %s joined (%s)", self._name, peer.card.name, peer.id)
        self._presence.changed(PeerEvent("joined", peer.info, ""))

    def _peer_down(self, peer: Peer, reason: str) -> None:
        self._guarded(self._forget_process, peer.id)
        self.wiring.gone(peer.id, reason)
        if reason in ("died", "silent"):
            for topics in self._topics:
                self._guarded(topics.lost, node_number(peer.id))
        logger.info("node %r: %s left (%s): %s", self._name, peer.card.name, peer.id, reason)
        self._presence.changed(PeerEvent("left", peer.info, reason))

    def _endpoint_of(self, peer_id: str, offer: Offer) -> str | None:
        if peer_id == self._own.id:
            endpoints = offer.endpoints or self._own.topics
            return endpoints[0]  # one's own channels over ipc
        peer = self.membership.peers.get(peer_id)
        if peer is None:
            return None
        return peer.data_endpoint(offer.endpoints or peer.card.topics)

    # -- Descriptors -------------------------------------------------------------------------

    def _watch_process(self, peer: Peer) -> None:
        """Where the kernel can tell of its death, have it do so; elsewhere silence tells."""
        if not (peer.same_host and peer.card.pid_space == self._own.pid_space and peer.card.pid):
            return
        try:
            fd = host.open_process(peer.card.pid, peer.card.started)
        except ProcessLookupError:
            self.post(lambda: self._process_died(peer.id))
            return
        if fd is not None:
            self._processes[peer.id] = fd
            self._watch(fd, lambda: self._process_died(peer.id))

    def _forget_process(self, peer: str) -> None:
        fd = self._processes.pop(peer, None)
        if fd is not None:
            self._unwatch(fd)
            os.close(fd)

    def _read_ahead(self, core: Core | None = None) -> None:
        """Watch the subscriptions that expect a mark, until it has come."""
        for each in self.wiring.cores if core is None else (core,):
            if isinstance(each, Subscription) and not each.link.closed:
                self._guarded(self._reading_ahead, each)
                if each.expects_mark:
                    self._watch(each.link.fileno(), lambda each=each: self._reading_ahead(each))  # type: ignore[misc]

    def _reading_ahead(self, core: Subscription) -> None:
        """libzmq signals only a reader that has found its pipes empty once."""
        if not core.link.closed:
            core.read_ahead()
            if not core.expects_mark:
                self._unwatch(core.link.fileno())


def _finish(core: Core, linger_ms: int) -> None:
    # At the interpreter's end a server can start no timer; its deadline is kept here.
    with contextlib.suppress(RuntimeError):
        core.close(linger_ms)
