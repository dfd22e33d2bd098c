"""A subscription whose gaps are repaired: ``Node.subscriber(…, repair=True)``.

Guarantee: what `mesh.sockets.subscriber` promises, and a gap is counted only once nothing was found
of it for `repair_timeout_s`. A sender's later messages on the same topic wait for that, those of
others do not. Who looks for what was missed is not known here (`mesh.durable.repairer`): it is told
of gaps, asks what is wanted, and hands in what it found. Gaps are `mesh.sockets.repairs`' business.

Where what waits behind gaps has reached its bound, nothing more is read: libzmq's buffer fills then
as with any subscriber that does not read, and what it drops is a later gap.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from mesh import limits
from mesh.message import Message, Run
from mesh.options import SubscriberOptions
from mesh.sockets.arrivals import Arrivals
from mesh.sockets.codec import DETACH_BYTES_MIN
from mesh.sockets.flow import Flow
from mesh.sockets.frame import Part
from mesh.sockets.home import Home
from mesh.sockets.repairs import FlowKey, Outcome, Passed, Repairs, Want
from mesh.sockets.subscription import Subscription

_AHEAD: Final = 256
"""More is fetched once fewer messages than that are left to be taken."""
_HELD_UP_S: Final = 4 * limits.TICK_S
"""A process that was stopped for so long has looked for nothing meanwhile."""


class RepairingArrivals(Arrivals):
    """What came, with gaps that are open for a while."""

    def __init__(
        self, home: Home, pattern: str, address: bytes, options: SubscriberOptions
    ) -> None:
        super().__init__(home, pattern, address, options)
        self.repairs = Repairs(
            options.repair_timeout_s,
            bytes_max=limits.REPAIR_BYTES_MAX,
            flows_max=limits.REPAIR_FLOWS_MAX,
        )
        self.on_gap: Callable[[], object] = lambda: None
        """Called with every gap, under the lock."""
        self._began_ns = time.time_ns()
        self._times: OrderedDict[FlowKey, int] = OrderedDict()
        """The sender's clock at the last message of each topic; the quietest go first."""

    def _accept_plain(self, flow: Flow, seq: int, time_ns: int, body: Part) -> Message | None:
        message = super()._accept_plain(flow, seq, time_ns, body)
        if message is None:
            return None
        key = flow.owner, flow.channel
        self._note(key, time_ns)
        if key not in self.repairs.flows:
            return message
        self._hold(key, Run([message.payload], 0, message._origin), len(body))
        return None

    def _deliver(self, owner: int, run: Run, size: int) -> None:
        key = owner, run.origin.channel
        self._note(key, run.origin.time_ns)
        if key not in self.repairs.flows:
            super()._deliver(owner, run, size)
        elif run:
            self.counters.received += len(run)
            self._hold(key, run, size)

    def _note(self, key: FlowKey, time_ns: int) -> None:
        self._times[key] = time_ns
        self._times.move_to_end(key)
        if len(self._times) > limits.TRACKED_CHANNELS_MAX:
            self._times.popitem(last=False)

    def _hold(self, key: FlowKey, run: Run, size: int) -> None:
        self.repairs.hold(key, run, _cost(run, size))

    def _missed(self, owner: int, channel: str, first: int, last: int) -> None:
        if not first:
            return
        key = owner, channel
        since_ns = self._times.get(key, self._began_ns)
        if self.repairs.missed(key, first, last, since_ns, time.monotonic()):
            self.on_gap()
        else:
            super()._missed(owner, channel, first, last)

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """Messages whose turn it is, and what was not found."""
        for outcome in outcomes:
            if not isinstance(outcome, Passed):
                super()._missed(*outcome.flow, outcome.first, outcome.last)
                continue
            if outcome.repaired:
                sender, count = outcome.run.origin.sender, len(outcome.run)
                self.counters.received += count
                if sender in self.repaired or len(self.repaired) < limits.SIGHTINGS_MAX:
                    self.repaired[sender] = self.repaired.get(sender, 0) + count
            self.inbox.add(outcome.run)


class RepairingSubscription(Subscription):
    """The core of such a subscriber."""

    arrivals: RepairingArrivals

    def __init__(
        self,
        home: Home,
        pattern: str,
        options: SubscriberOptions,
        wanted: Callable[[RepairingSubscription], object],
        room: Callable[[], object],
    ) -> None:
        """`wanted` is told that this one wants something, `room` that it can take more. Both are
        called under the lock, and do not block."""
        super().__init__(home, pattern, options)
        self._views = options.views
        self._room = room
        self._ticked_at = -math.inf
        self.arrivals.on_gap = lambda: wanted(self)

    def _arrivals(self, options: SubscriberOptions) -> RepairingArrivals:
        return RepairingArrivals(self._home, self.channel, self._address, options)

    # -- Reading: under the lock -------------------------------------------------------------

    def _fill(self, messages: int, frames_max: int, bytes_max: float = math.inf) -> bool:
        if self.arrivals.repairs.flows and len(self.inbox) < _AHEAD:
            self._room()
        return super()._fill(messages, frames_max, bytes_max)

    def _read(self) -> bool:
        if self.arrivals.repairs.full:
            self._drained = False
            self.link.readable()  # or the descriptor would go on saying that there is something
            return False
        return super()._read()

    def take_soon(self) -> Message | None:
        if self.arrivals.repairs.flows:
            return None  # the lock is wanted by whoever finds something
        return super().take_soon()

    def tick(self) -> None:
        now, repairs = time.monotonic(), self.arrivals.repairs
        with self.link:
            if now - self._ticked_at > _HELD_UP_S:
                repairs.extend(now)
            self._ticked_at = now
            self.arrivals.settle(repairs.expire(now))
        super().tick()

    # -- For who repairs: from a thread of the node's ------------------------------------------

    def wants(self) -> list[Want]:
        """What is missing; nothing while no more can be taken. Raises `Closed`."""
        with self.link:
            repairs = self.arrivals.repairs
            if len(self.inbox) >= _AHEAD:
                repairs.extend(time.monotonic())
                return []
            return [] if repairs.crowded else repairs.wants()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing, or it is closed."""
        return not self.arrivals.repairs.flows

    def found(self, runs: Iterable[tuple[FlowKey, Run, int]]) -> None:
        """Those were found, each of a flow, with its bytes. Raises `Closed`."""
        with self.link:
            repairs, now = self.arrivals.repairs, time.monotonic()
            for key, run, size in runs:
                run = self._as_asked(run)
                self.arrivals.settle(repairs.found(key, run, _cost(run, size), now))

    def _as_asked(self, run: Run) -> Run:
        if not self._views:
            return run
        payloads = [
            memoryview(each) if type(each) is bytes and len(each) >= DETACH_BYTES_MIN else each
            for each in run.payloads
        ]
        return Run(payloads, run.first, run.origin)

    def _unsubscribe(self) -> None:
        self.arrivals.repairs.clear()
        super()._unsubscribe()


def _cost(run: Run, size: int) -> int:
    return size + len(run) * limits.REPAIR_MESSAGE_BYTES
