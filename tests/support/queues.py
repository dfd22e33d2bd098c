"""Queues without nodes: pushing and pulling homes, joined by hand."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import zmq

from mesh.message import Message
from mesh.options import PullerOptions
from mesh.sockets.codec import pack, pack_body
from mesh.sockets.control import Offer
from mesh.sockets.credit import Ledger, WorkerAccount
from mesh.sockets.dispatch import Dispatch
from mesh.sockets.frame import Kind, encode, wire_name
from mesh.sockets.home import Home
from mesh.sockets.puller import Intake, Puller
from mesh.sockets.pusher import Pusher
from mesh.sockets.transport import Socket
from tests.support.homes import Homes

QUEUE = "jobs"
PUSHING, PULLING = 100, 200


class Net:
    """Pushing and pulling homes, joined as nodes would join them."""

    def __init__(self, homes: Homes, **pushing: Any) -> None:
        self.homes = homes
        self.pushing = pushing
        self.dispatches: list[tuple[Home, Dispatch]] = []
        self.intakes: list[tuple[Home, Intake]] = []
        self.strangers: list[Socket] = []

    def pusher(self) -> Pusher:
        """A pusher in a node of its own."""
        home = self.homes.make(PUSHING + len(self.dispatches), **self.pushing)
        core = Dispatch(home, QUEUE)
        core.key = len(self.dispatches) + 1
        self.dispatches.append((home, core))
        for pulling, intake in self.intakes:
            self.join(home, core, pulling, intake)
        return Pusher(core, None, lambda: None)

    def puller(self, prefetch: int = 4, home: Home | None = None, *, views: bool = False) -> Puller:
        """A puller in a node of its own, or in `home`."""
        home = home or self.homes.make(PULLING + len(self.intakes))
        core = Intake(home, QUEUE, PullerOptions(prefetch=prefetch, views=views))
        core.key = len(self.intakes) + 1
        self.intakes.append((home, core))
        for pushing, dispatch in self.dispatches:
            self.join(pushing, dispatch, home, core)
        return Puller(core, None, lambda: None)

    def join(self, pushing: Home, dispatch: Dispatch, pulling: Home, intake: Intake) -> None:
        intake.attach(pushing.node_id, Offer(dispatch.key, "push", QUEUE), dispatch.endpoints()[0])
        offer = Offer(intake.key, "pull", QUEUE, prefetch=intake.prefetch)
        dispatch.attach(pulling.node_id, offer, intake.endpoints()[0])

    def lose_worker(self, index: int, reason: str = "died") -> None:
        home, intake = self.intakes[index]
        for _, dispatch in self.dispatches:
            dispatch.detach(home.node_id, intake.key, reason)

    @property
    def cores(self) -> list[Dispatch | Intake]:
        return [core for _, core in self.dispatches] + [core for _, core in self.intakes]

    def tick(self) -> None:
        for core in self.cores:
            if not core.link.closed:
                core.tick()

    def until(self, condition: Callable[[], bool]) -> None:
        """Do what the control threads do until `condition` holds."""
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "what was waited for never came"
            self.tick()

    def stranger(self, endpoint: str) -> Socket:
        """A PUSH socket of a program that knows nothing of this package."""
        socket: Socket = self.homes.make(300).transport.context.socket(zmq.PUSH)
        socket.connect(endpoint)
        self.strangers.append(socket)
        return socket

    def close(self) -> None:
        for socket in self.strangers:
            socket.close(linger=0)
        for core in self.cores:
            core.close(0)


def core_of(handle: Pusher) -> Dispatch:
    return handle._core


def outstanding(pusher: Pusher) -> int:
    core = core_of(pusher)
    with core.link:
        core.read_credit()
        return sum(account.outstanding for account in core.ledger._accounts.values())


def push_together(pusher: Pusher, payloads: Sequence[object]) -> None:
    """Several tasks in one frame, so that they are there together."""
    core = core_of(pusher)
    with core.link:
        account = core.ledger.choose()
        assert account is not None
        frame = encode(
            wire_name(QUEUE),
            Kind.DATA,
            pack_body([pack(payload) for payload in payloads]),
            count=len(payloads),
            sender=PUSHING,
            seq=account.sent + 1,
            remaining=account.number,
        )
        core._sockets[account.number][0].send(frame)
        for _ in payloads:
            core.ledger.sent(account)


class SharedTime:
    """Milliseconds that pass only while all workers are at work, so that a busy machine holds up
    all of them alike."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._now = 0
        self._until: dict[threading.Thread, int] = {}
        self._over = False
        self._changed = threading.Condition()

    def work(self, ms: int) -> None:
        """Return once `ms` have passed."""
        this = threading.current_thread()
        with self._changed:
            until = self._until[this] = self._now + ms
            while self._now < until and not self._over:
                soonest = min(self._until.values())
                if len(self._until) == self._workers and soonest > self._now:
                    self._now = soonest
                    self._changed.notify_all()
                elif not self._changed.wait(10):
                    raise AssertionError(f"only {len(self._until)} of them have anything to do")
            del self._until[this]

    def over(self) -> None:
        """There may not be work for all any more: what is left takes no time."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


@pytest.fixture
def high_water(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The most tasks that any worker (by node) had in hand of one pusher."""
    highest: dict[int, int] = defaultdict(int)
    sent = Ledger.sent

    def noting(ledger: Ledger, account: WorkerAccount, count: int = 1) -> None:
        sent(ledger, account, count)
        highest[account.peer] = max(highest[account.peer], account.outstanding)

    monkeypatch.setattr(Ledger, "sent", noting)
    return highest


class Crew:
    """Worker threads, one for each puller, that do each task and note who did it."""

    def __init__(self) -> None:
        self.done: dict[Puller, list[Message]] = {}
        self.progress = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def hire(self, puller: Puller, work: Callable[[], object] = lambda: None) -> None:
        self.done[puller] = []
        thread = threading.Thread(target=self._work, args=(puller, work))
        thread.start()
        self._threads.append(thread)

    def _work(self, puller: Puller, work: Callable[[], object]) -> None:
        for task in puller:
            work()
            self.done[puller].append(task)
            self.progress.release()

    def wait_done(self, count: int) -> None:
        for i in range(count):
            assert self.progress.acquire(timeout=10), f"only {i} of {count} tasks were done"

    def dismiss(self) -> None:
        for puller in self.done:
            puller.close()
        for thread in self._threads:
            thread.join(timeout=5)
            assert not thread.is_alive()

    @property
    def shares(self) -> list[int]:
        return [len(tasks) for tasks in self.done.values()]

    @property
    def payloads(self) -> list[object]:
        return [task.payload for tasks in self.done.values() for task in tasks]
