"""Offers that lead nowhere, peers that are held up, handles that come and go: the others go on,
and nothing is left behind."""

from __future__ import annotations

import asyncio
import socket as kernel
from pathlib import Path

import pytest
import zmq

from mesh import limits
from mesh.errors import Closed
from mesh.message import TasksLost
from mesh.options import PullerOptions
from mesh.sockets import transport
from mesh.sockets.control import Offer
from mesh.sockets.dispatch import Dispatch
from mesh.sockets.frame import Kind, encode, wire_name
from mesh.sockets.home import node_text
from mesh.sockets.parts import has_input
from mesh.sockets.puller import Intake, Puller
from mesh.sockets.pusher import Pusher
from mesh.wiring import Wiring
from tests.support.homes import Homes
from tests.support.queues import PULLING, PUSHING, QUEUE, Net, core_of, outstanding
from tests.support.waiting import until

# -- Offers that lead nowhere --------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["ipc:///" + "a" * 150, "tcp://127.0.0.1:none"])
def test_a_worker_whose_endpoint_is_refused_keeps_no_task_from_the_others(
    net: Net, endpoint: str
) -> None:
    pusher, puller = net.pusher(), net.puller()
    core_of(pusher).attach(77, Offer(9, "pull", QUEUE, (endpoint,), 4), endpoint)
    assert pusher.workers == 1
    assert core_of(pusher).counters.dropped == {"offer out of reach": 1}
    for i in range(8):
        pusher.send(i, timeout=5)
        assert puller.recv(timeout=5).payload == i
    core_of(pusher).detach(77, 9, "withdrawn")
    assert not pusher.lost


def test_a_pusher_whose_endpoint_is_refused_gets_no_credit_and_others_do(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=2)
    intake = net.intakes[0][1]
    intake.attach(77, Offer(9, "push", QUEUE), "ipc:///" + "a" * 150)
    assert intake.counters.dropped == {"offer out of reach": 1}
    for i in range(5):
        pusher.send(i, timeout=5)
        assert puller.recv(timeout=5).payload == i
    intake.detach(77, 9, "withdrawn")
    assert list(intake._sockets) == [PUSHING]


def test_a_worker_for_whom_there_is_no_socket_keeps_no_task_from_the_others(net: Net) -> None:
    home = net.homes.make(PUSHING)
    home.transport.context.set(zmq.MAX_SOCKETS, 2)
    core = Dispatch(home, QUEUE)
    core.key = 1
    net.dispatches.append((home, core))
    pusher = Pusher(core, None, lambda: None)
    first = net.puller(prefetch=2)
    net.puller(prefetch=2)
    assert core.counters.dropped == {"offer out of reach": 1}
    assert (pusher.workers, core.ledger.room, len(core._sockets)) == (1, 2, 1)
    for i in range(4):
        pusher.send(i, timeout=5)
        assert first.recv(timeout=5).payload == i


def test_a_worker_whose_socket_takes_nothing_is_passed_over(net: Net) -> None:
    """Credit says that it has room, but libzmq has given up its connection."""
    pusher = net.pusher()
    net.puller(prefetch=8), net.puller(prefetch=2)
    core, (_, stuck) = core_of(pusher), net.intakes[0]
    account = core.ledger._find(PULLING, stuck.key)
    assert account is not None
    core._sockets[account.number][0].disconnect(stuck.endpoints()[0])
    living = Puller(net.intakes[1][1], None, lambda: None)
    for i in range(5):
        pusher.send(i, timeout=5)
        assert living.recv(timeout=5).payload == i
    assert account.sent == 0


def test_a_puller_that_was_closed_just_now_keeps_no_offer_from_the_others(net: Net) -> None:
    """The control thread does not know of it yet."""
    pusher = net.pusher()
    closed, _ = net.puller(), net.puller()
    pulling = [core for _, core in net.intakes]
    wiring = Wiring(lambda peer, offer: core_of(pusher).endpoints()[0])
    for core in pulling:
        core.detach(PUSHING, core_of(pusher).key, "withdrawn")
        wiring.add(core)
    closed.close()
    offer = Offer(core_of(pusher).key, "push", QUEUE, core_of(pusher).endpoints())
    wiring.offered(node_text(PUSHING), [offer], [])
    assert list(pulling[1]._sockets) == [PUSHING]
    wiring.gone(node_text(PUSHING), "died")
    assert not pulling[1]._sockets


# -- Peers that are held up ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_was_stopped_during_the_handshake_is_reached_later(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel accepts for it, and nobody answers. What was sent meanwhile arrives then."""
    monkeypatch.setattr(transport, "_HANDSHAKE_MS", 50)
    pusher = net.pusher()
    path = f"{net.homes.directory}/stopped"
    with kernel.socket(kernel.AF_UNIX) as stopped:
        stopped.bind(path)
        stopped.listen()
        offer = Offer(1, "pull", QUEUE, prefetch=4)
        core_of(pusher).attach(PULLING, offer, f"ipc://{path}")
        pusher.send("early", timeout=0)
        stopped.settimeout(5)
        given_up = [stopped.accept()[0] for _ in range(2)]
        for connection in given_up:
            connection.close()
    Path(path).unlink()
    goes_on = net.homes.make(PULLING).transport.context.socket(zmq.PULL)
    net.strangers.append(goes_on)
    goes_on.bind(f"ipc://{path}")
    assert goes_on.poll(5000)
    assert goes_on.recv().endswith(b"early")
    pusher.send("late", timeout=0)
    assert goes_on.poll(5000)


# -- Handles that come and go --------------------------------------------------------------------


def test_a_pusher_that_reopens_often_is_served_like_any_other(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it has another account; those that are over give their places to the new ones."""
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 5)
    puller = net.puller()
    pulling, intake = net.intakes[0]
    home = net.homes.make(PUSHING)
    for key in range(1, 13):
        core = Dispatch(home, QUEUE)
        core.key = key
        net.join(home, core, pulling, intake)
        Pusher(core, None, lambda: None).send(key, timeout=5)
        assert puller.recv(timeout=5).payload == key
        core.close(0)
    assert not intake.counters.dropped
    assert len(intake._pushers._accounts) == 5


def test_each_handle_has_its_own_hook_for_losses_until_it_is_closed(net: Net) -> None:
    first = net.pusher()
    second, closed = (Pusher(core_of(first), None, lambda: None) for _ in range(2))
    told: list[tuple[str, int]] = []

    def hook(name: str, loss: TasksLost) -> None:
        told.append((name, loss.count))

    first.on_loss(lambda loss: hook("replaced", loss))
    for name, handle in (("first", first), ("second", second), ("closed", closed)):
        handle.on_loss(lambda loss, name=name: hook(name, loss))  # type: ignore[misc]
    closed.close()
    net.puller()
    first.send(1, timeout=5)
    net.lose_worker(0)
    assert told == [("first", 1), ("second", 1)]
    with pytest.raises(Closed):
        closed.on_loss(lambda loss: hook("too late", loss))
    assert len(core_of(first).loss_hooks) == 2


def test_a_handle_that_is_forgotten_takes_its_hook_along(net: Net) -> None:
    kept = net.pusher()
    forgotten = Pusher(core_of(kept), None, lambda: None)
    forgotten.on_loss(print)
    del forgotten
    assert not core_of(kept).loss_hooks


def test_tasks_given_back_by_cancelled_receivers_keep_their_order(net: Net) -> None:
    """Whichever of them is cancelled first, and however many tasks each had."""
    pusher, puller = net.pusher(), net.puller(prefetch=8)
    intake = net.intakes[0][1]

    async def run(cancelled_first: int) -> list[int]:
        waiting = [asyncio.ensure_future(puller.arecv(timeout=5)) for _ in range(2)]
        waiting.append(asyncio.ensure_future(puller.arecv_many(timeout=5, count_max=2)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        pusher.send_many(range(6), timeout=5)
        waiter = intake.link.loops[asyncio.get_running_loop()]
        while waiter._calls:
            waiter._look()
        for i in range(3):
            waiting[(cancelled_first + i) % 3].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return [(await puller.arecv(timeout=5)).payload for _ in range(6)]

    for cancelled_first in range(3):
        assert asyncio.run(run(cancelled_first)) == list(range(6))
        net.until(lambda: outstanding(pusher) == 0)


def test_ipc_and_tcp_take_turns(net: Net) -> None:
    """A flood over the one keeps nothing from the other."""
    home = net.homes.make(PULLING, networked=True)
    intake = Intake(home, QUEUE, PullerOptions())
    puller = Puller(intake, None, lambda: None)
    try:
        ipc, tcp = (endpoint.replace("*", "127.0.0.1") for endpoint in intake.endpoints())
        for sender, endpoint in ((1, ipc), (2, tcp)):
            raw = net.stranger(endpoint)
            for seq in range(1, 101):
                raw.send(encode(wire_name(QUEUE), Kind.DATA, b"\x91\x01", sender=sender, seq=seq))
        with intake.link.lock:
            until(lambda: all([has_input(bound.socket) for bound in intake._bound]))
        first = [puller.recv(timeout=5).sender for _ in range(20)]
        assert first.count(node_text(1)) == 10
    finally:
        intake.close(0)


def test_socket_files_go_with_their_handles(net: Net, homes: Homes) -> None:
    files = _files(homes.directory)
    pulling, pushing = net.homes.make(PULLING), net.homes.make(PUSHING)
    pulling.transport._remove_path = pushing.transport._remove_path = _unlink
    cores = Intake(pulling, QUEUE, PullerOptions()), Dispatch(pushing, QUEUE)
    assert len(_files(homes.directory) - files) == 2
    for close in [core.close for core in cores] * 2:
        close(0)
    assert _files(homes.directory) == files


def _files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _unlink(path: str) -> None:
    Path(path).unlink()
