"""Queues whose tasks share frames: what the guarantees promise holds all the same. Where time is
not the point, the test says itself when a window is over (`ByHand`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import zmq

from mesh import limits
from mesh.errors import Closed, PayloadTooLarge, Timeout
from mesh.message import Message, TasksLost
from mesh.sockets import codec
from mesh.sockets import dispatch as dispatch_module
from mesh.sockets.batch import Batch, Item
from mesh.sockets.home import node_text
from mesh.sockets.parts import send_parts
from mesh.sockets.puller import Puller
from mesh.sockets.pusher import Pusher
from tests.support.homes import ByHand
from tests.support.queues import PULLING, QUEUE, Crew, Net, core_of, outstanding

WINDOW_S = 0.0005


@pytest.fixture
def net(nets: Callable[..., Net]) -> Net:
    """With batches closed `ByHand`."""
    return nets(window_s=None)


@pytest.fixture(autouse=True)
def nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, one task follows another closely; and a wake-up that goes
    missing shows: a sender would find the room at its next retry."""
    monkeypatch.setattr(dispatch_module, "BUSY_S", 3600.0)
    monkeypatch.setattr(limits, "TICK_S", 60.0)


def hand(net: Net, index: int = 0) -> ByHand:
    flusher = net.dispatches[index][0].flusher
    assert isinstance(flusher, ByHand)
    return flusher


def all_leave(net: Net) -> None:
    """Two windows pass: in one of which something was sent, the rest may stay until the next."""
    hand(net).turn()
    hand(net).turn()


def received(puller: Puller, count: int) -> list[Any]:
    return [puller.recv(timeout=10).payload for _ in range(count)]


def shares(net: Net) -> list[int]:
    """How many tasks the first pusher has sent to each worker."""
    (_, dispatch), *_ = net.dispatches
    accounts = dispatch.ledger._accounts.values()
    sent = {account.peer: account.sent for account in accounts}
    return [sent[home.node_id] for home, _ in net.intakes]


# -- Who gets what


@pytest.mark.parametrize("tasks", [2, 3, 100, 401, 900])
def test_a_batch_is_dealt_out_evenly_over_the_workers(net: Net, tasks: int) -> None:
    pusher = net.pusher()
    pullers = [net.puller(prefetch=1024) for _ in range(4)]
    pusher.send_many(range(tasks), timeout=0)
    all_leave(net)
    assert sum(shares(net)) == tasks
    assert max(shares(net)) - min(shares(net)) <= 1
    assert core_of(pusher)._frames <= 1 + 4 * (1 + tasks // 512)
    got = [received(puller, len_) for puller, len_ in zip(pullers, shares(net), strict=True)]
    assert sorted(chain.from_iterable(got)) == list(range(tasks))
    assert all(each == sorted(each) for each in got)


def test_a_worker_that_has_tasks_in_hand_gets_fewer_of_a_batch(net: Net) -> None:
    pusher = net.pusher()
    net.puller(prefetch=1024)
    pusher.send_many(range(60), timeout=0)
    all_leave(net)
    net.puller(prefetch=1024)
    pusher.send_many(range(100), timeout=0)
    all_leave(net)
    assert shares(net) == [80, 80]


@pytest.mark.slow
def test_no_worker_ever_has_more_than_its_prefetch(
    nets: Callable[..., Net], crew: Crew, high_water: dict[int, int]
) -> None:
    """With eight threads that push at once, two pushers, and workers of all sizes."""
    net = nets(window_s=WINDOW_S)
    pushers = [net.pusher(), net.pusher()]
    prefetches = [200, 64, 30, 1]
    for prefetch in prefetches:
        crew.hire(net.puller(prefetch=prefetch))

    def push(number: int) -> None:
        for i in range(1000):
            pushers[number % 2].send([number, i], timeout=20)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    crew.wait_done(8000)
    for thread in threads:
        thread.join()
    assert Counter(map(tuple, crew.payloads)) == Counter(  # type: ignore[arg-type]
        (number, i) for number in range(8) for i in range(1000)
    )
    for tasks in crew.done.values():
        for number in range(8):
            mine = [task.payload[1] for task in tasks if task.payload[0] == number]
            assert mine == sorted(mine)
    for i, prefetch in enumerate(prefetches):
        assert 0 < high_water[PULLING + i] <= prefetch
    assert sum(core_of(pusher)._frames for pusher in pushers) < 6000, "they shared frames"
    for pusher in pushers:
        core = core_of(pusher)
        with core.link.lock:  # who sent the last may be about to count it
            assert core.counters.sent == 4000
        assert pusher.lost == {}


def test_with_little_room_each_task_leaves_at_once(net: Net) -> None:
    """No idle worker is kept waiting for the sake of a small batch."""
    pusher = net.pusher()
    pullers = [net.puller(prefetch=4) for _ in range(3)]
    pusher.send_many(range(12), timeout=0)
    assert core_of(pusher)._frames == 12
    assert hand(net)._cores == {}
    assert sorted(chain.from_iterable(received(puller, 4) for puller in pullers)) == list(range(12))


def test_a_queue_that_was_busy_falls_back_to_single_tasks(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(3), timeout=0)
    assert core_of(pusher)._frames == 1, "the first after a pause leaves at once"
    assert hand(net).turn() == [True], "sent"
    assert hand(net).turn() == [True], "nothing came meanwhile"
    assert hand(net).turn() == []
    core_of(pusher)._sent_at = -1e9
    pusher.send(3, timeout=0)
    assert received(puller, 4) == [0, 1, 2, 3]


def test_no_more_waits_in_a_batch_than_the_workers_have_room_for(net: Net) -> None:
    """So that a sender knows when there is none."""
    pusher, puller = net.pusher(), net.puller(prefetch=100)
    for i in range(100):
        pusher.send(i, timeout=0)
    with pytest.raises(Timeout):
        pusher.send("over", timeout=0)
    assert received(puller, 100) == list(range(100))
    with pytest.raises(Timeout):
        puller.recv(timeout=0.01)
    net.until(lambda: outstanding(pusher) == 0)
    pusher.send("there is room again", timeout=0)


def test_while_a_batch_is_dealt_out_no_more_is_let_in_than_there_is_room_for(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher = net.pusher()
    for _ in range(3):
        net.puller(prefetch=200)
    core = core_of(pusher)
    rooms: list[tuple[int, int]] = []

    def looking(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        rooms.append((core.batch.room, core.ledger.room))
        return send_parts(socket, parts)

    monkeypatch.setattr(dispatch_module, "send_parts", looking)
    pusher.send_many(range(400), timeout=0)
    pusher.send("alone", headers={"h": 1}, timeout=0)
    pusher.send_many(range(199), timeout=0)
    all_leave(net)
    assert len(rooms) >= 7
    assert all(room <= there_is for room, there_is in rooms)
    assert rooms[-1] == (0, 0)


def test_tasks_of_all_kinds_keep_their_order(net: Net) -> None:
    luck = random.Random(4)
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    kinds: list[Any] = [b"bytes", "text", {"k": [1, None]}, 7, 0.5, bytes(4096), bytes(4097)]
    sent: list[tuple[Any, dict[str, int]]] = []
    for i in range(400):
        payload = luck.choice([*kinds[:5], luck.choice(kinds)]) if i % 90 else bytes(100_000)
        headers = {"n": i} if luck.random() < 0.05 else {}
        pusher.send(payload, headers=headers or None, timeout=0)
        sent.append((payload, headers))
        if luck.random() < 0.05:
            hand(net).turn()
    all_leave(net)
    got = [puller.recv(timeout=5) for _ in range(400)]
    assert [(task.payload, task.headers) for task in got] == sent
    assert [task.seq for task in got] == list(range(1, 401))


def test_where_a_task_leaves_alone_the_batch_keeps_its_room(net: Net) -> None:
    pusher = net.pusher()
    net.puller(prefetch=1024)
    pusher.send_many(range(3), timeout=0)
    pusher.send("alone", headers={"h": 1}, timeout=0)
    assert core_of(pusher).batch.room > 100


# -- Credit that comes and goes


def test_a_batch_without_credit_leaves_when_some_comes_and_nobody_sends(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=100)
    core = core_of(pusher)
    pusher.send_many(range(100), timeout=0)
    core.batch.items.append(b"more than there is room for")  # as of two threads that send at once
    all_leave(net)
    for _ in range(3):
        assert hand(net).turn() == [False], "no worker has room"
    assert core._open
    received(puller, 100)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)  # done with all of them
    while core.batch.items:
        hand(net).turn()
    assert received(puller, 1) == [b"more than there is room for"]
    all_leave(net)
    assert hand(net)._cores == {}


@pytest.mark.parametrize("takes_over", ["a worker that is there", "a worker that comes"])
def test_what_waits_in_a_batch_when_a_worker_goes_is_for_the_others(
    net: Net, takes_over: str
) -> None:
    pusher = net.pusher()
    net.puller(prefetch=1024)
    if takes_over == "a worker that is there":
        other = net.puller(prefetch=4)
    pusher.send_many(range(4), timeout=0)
    pusher.send_many(["a", "b", "c"], timeout=0)
    sent = sum(shares(net))
    net.lose_worker(0)
    if takes_over == "a worker that comes":
        other = net.puller(prefetch=8)
    waiting = 7 - sent
    assert waiting >= 3
    got: list[Any] = []
    while len(got) < waiting:
        hand(net).turn()
        with contextlib.suppress(Timeout):
            got.append(other.recv(timeout=0.01).payload)
    assert got == [0, 1, 2, 3, "a", "b", "c"][-waiting:]
    assert sum(pusher.lost.values()) <= sent


def test_when_the_room_sinks_a_busy_sender_goes_on_with_what_there_is(
    nets: Callable[..., Net], crew: Crew, high_water: dict[int, int]
) -> None:
    """The large worker goes while it holds a lot; a small one stays."""
    net = nets(window_s=WINDOW_S)
    pusher = net.pusher()
    net.puller(prefetch=300)
    crew.hire(net.puller(prefetch=2))
    pusher.send_many(range(200), timeout=5)
    net.until(lambda: not core_of(pusher).batch.items)
    net.lose_worker(0)
    pusher.send_many(range(200, 500), timeout=5)
    done = 500 - sum(pusher.lost.values())
    crew.wait_done(done)
    assert {*range(200, 500)} <= {*crew.payloads}
    assert len(crew.payloads) == done
    assert high_water[PULLING + 1] <= 2


def test_a_worker_that_dies_with_batches_outstanding_is_counted_exactly(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    told: list[TasksLost] = []
    pusher.on_loss(told.append)
    pusher.send_many(range(700), timeout=0)
    all_leave(net)
    received(puller, 10)
    net.tick()  # tells of the nine that are done
    net.until(lambda: outstanding(pusher) == 691)
    pusher.send_many(range(5), timeout=0)  # wait here, and are not lost
    net.lose_worker(0)
    assert pusher.lost == {node_text(PULLING): 691}
    assert told == [TasksLost(QUEUE, node_text(PULLING), 691)]
    assert core_of(pusher).counters.lost == 691
    other = net.puller(prefetch=1024)
    all_leave(net)
    assert received(other, 5) == list(range(5))


# -- Taking tasks without the lock


def standing(net: Net) -> list[str]:
    """Where everything is, for a failure that is rare."""
    lines = []
    for home, core in net.dispatches:
        accounts = [(each.sent, each.settled) for each in core.ledger._accounts.values()]
        waiting, batch = len(core.link._threads), f"{len(core.batch.items)} of {core.batch.room}"
        watched, readable = core in home.flusher._cores, core.link.readable()
        lines.append(f"{core._open=} {watched=} {batch=} {accounts=} {waiting=} {readable=}")
    for _, intake in net.intakes:
        waiting, readable = len(intake.link._threads), intake.link.readable()
        lines.append(f"{len(intake.inbox)=} {intake.counters=} {waiting=} {readable=}")
    return lines


def by_recv(puller: Puller, take: Callable[[Any], object]) -> None:
    while True:
        take([puller.recv()])


def by_recv_many(puller: Puller, take: Callable[[Any], object]) -> None:
    while True:
        take(puller.recv_many(count_max=50))


def by_both(puller: Puller, take: Callable[[Any], object]) -> None:
    while True:
        take([puller.recv()])
        take([puller.recv()])
        take(puller.recv_many(count_max=7))


def by_coroutines(puller: Puller, take: Callable[[Any], object]) -> None:
    async def one() -> None:
        while True:
            take([await puller.arecv()])

    async def many() -> None:
        while True:
            take(await puller.arecv_many(count_max=20))

    async def main() -> None:
        await asyncio.gather(one(), many(), one())

    asyncio.run(main())


WAYS = [by_recv, by_recv_many, by_both, by_coroutines]


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [16, 17, 1024])
@pytest.mark.parametrize("ways", [*([way] for way in WAYS), [by_recv] * 4, WAYS])
def test_a_pusher_never_starves_and_nothing_stays_outstanding(
    nets: Callable[..., Net], prefetch: int, ways: list[Callable[..., None]]
) -> None:
    """Of two pushers, however the worker takes its tasks. No control thread is at work, but in the
    end: of threads that wait for more what they took last is settled already."""
    net = nets(window_s=WINDOW_S)
    pushers = [net.pusher(), net.pusher()]
    puller = net.puller(prefetch=prefetch)
    got: list[list[Message]] = [[] for _ in ways]
    done = threading.Semaphore(0)

    def work(way: Callable[..., None], into: list[Message]) -> None:
        def take(messages: list[Message]) -> None:
            into.extend(messages)
            done.release(len(messages))

        with contextlib.suppress(Closed):
            way(puller, take)

    def push(pusher: Pusher) -> None:
        pusher.send_many(range(3000), timeout=10)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(ways, got, strict=True)]
    senders = [threading.Thread(target=push, args=(pusher,)) for pusher in pushers]
    for thread in workers + senders:
        thread.start()
    for i in range(6000):
        assert done.acquire(timeout=10), f"{i} tasks came: {standing(net)}"
    for thread in senders:
        thread.join()
    try:
        net.until(lambda: not any(outstanding(pusher) for pusher in pushers))
    finally:
        puller.close()
        for thread in workers:
            thread.join()
    for home, _ in net.dispatches:
        mine = [
            [message.payload for message in each if message.sender == node_text(home.node_id)]
            for each in got
        ]
        assert sorted(chain.from_iterable(mine)) == list(range(3000))
        assert all(each == sorted(each) for each in mine) or by_coroutines in ways


def test_who_comes_back_and_finds_nothing_is_done_with_all(net: Net) -> None:
    """The pusher hears of it without a control thread."""
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(300), timeout=0)
    all_leave(net)
    assert received(puller, 300) == list(range(300))
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    core = core_of(pusher)
    core.link.wait(lambda: outstanding_of(pusher) == 0 or None, 5, "credit")


def test_half_of_a_prefetch_is_told_while_there_is_more_to_take(net: Net) -> None:
    """So that the pusher has room again before this worker is out of tasks."""
    pusher, puller = net.pusher(), net.puller(prefetch=100)
    pusher.send_many(range(100), timeout=0)
    all_leave(net)
    received(puller, 60)
    core = core_of(pusher)
    core.link.wait(lambda: outstanding_of(pusher) <= 50 or None, 5, "credit")


def outstanding_of(pusher: Pusher) -> int:
    core = core_of(pusher)
    core.read_credit()
    return sum(account.outstanding for account in core.ledger._accounts.values())


def test_a_thread_at_work_holds_the_task_it_took_last_and_no_other(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(300), timeout=0)
    all_leave(net)
    assert received(puller, 100) == list(range(100))
    net.until(lambda: outstanding(pusher) == 201)
    for _ in range(3):
        net.tick()
    assert outstanding(pusher) == 201


def test_recv_after_recv_many_is_done_with_all_of_them(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(300), timeout=0)
    all_leave(net)
    received(puller, 1)
    assert len(puller.recv_many(timeout=5, count_max=100)) == 100
    net.until(lambda: outstanding(pusher) == 299)
    for _ in range(3):
        net.tick()
    assert outstanding(pusher) == 299, "101 were taken, of which this thread holds the hundred"
    received(puller, 1)
    net.until(lambda: outstanding(pusher) == 199)


def test_a_thread_that_ends_is_done_with_all_it_took(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(300), timeout=0)
    all_leave(net)
    for taken in (50, 100, 150):
        thread = threading.Thread(target=received, args=(puller, 50))
        thread.start()
        thread.join()
        net.until(lambda taken=taken: outstanding(pusher) == 300 - taken)  # type: ignore[misc]
    assert not net.intakes[0][1]._hands._hands, "nothing is kept of threads that are over"


def test_of_coroutines_that_are_over_nothing_is_kept(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(300), timeout=0)
    all_leave(net)

    async def main() -> None:
        await asyncio.gather(*(puller.arecv(timeout=5) for _ in range(300)))

    asyncio.run(main())
    net.until(lambda: outstanding(pusher) == 0)
    assert not net.intakes[0][1]._hands._hands


def test_a_puller_closed_in_the_middle_tells_what_was_done_and_loses_the_rest(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(300), timeout=0)
    all_leave(net)
    received(puller, 100)
    puller.close()
    with pytest.raises(Closed):
        puller.recv(timeout=0)
    core = core_of(pusher)
    core.link.wait(lambda: outstanding_of(pusher) == 201 or None, 5, "credit")
    net.lose_worker(0)
    assert pusher.lost == {node_text(PULLING): 201}


def test_a_cancelled_recv_gives_a_batch_back_in_order(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)

    async def main() -> list[Message]:
        receiving = asyncio.create_task(puller.arecv_many(count_max=100))
        await asyncio.sleep(0)
        pusher.send_many(range(300), timeout=0)
        all_leave(net)
        await asyncio.sleep(0.01)
        receiving.cancel()
        await asyncio.wait([receiving])
        return [] if receiving.cancelled() else list(receiving.result())

    got = [message.payload for message in asyncio.run(main())]
    got += received(puller, 300 - len(got))
    assert got == list(range(300))
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    net.until(lambda: outstanding(pusher) == 0)


# -- Closing


def test_closing_sends_what_the_batch_holds(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    core = core_of(pusher)
    pusher.send_many(range(100), timeout=0)
    core.close(1000)
    assert received(puller, 100) == list(range(100))
    assert not core.counters.dropped
    assert hand(net)._cores == {}, "nothing to look after any more"
    with pytest.raises(Closed):
        pusher.send("too late")


def test_closing_counts_what_no_worker_has_room_for(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    pusher = net.pusher()
    net.puller(prefetch=1024)
    core = core_of(pusher)
    pusher.send_many(range(100), timeout=0)
    net.lose_worker(0)
    with caplog.at_level(logging.WARNING, "mesh.sockets.pusher"):
        core.close(1000)
    assert core.counters.dropped == {"not sent when closed": 99}
    assert core.counters.lost == core.counters.sent == 1
    assert "no worker has room for the last 99 tasks" in caplog.text


def test_closing_looks_for_credit_that_came(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=100)
    core = core_of(pusher)
    pusher.send_many(range(100), timeout=0)
    all_leave(net)
    core.batch.items.append(b"one too many")  # as of two threads that send at once
    received(puller, 100)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    core.link.wait(lambda: core.link.readable() or None, 5, "credit")
    core.close(1000)
    assert received(puller, 1) == [b"one too many"]
    assert not core.counters.dropped


class Hooked(list[Item]):
    """The items of a batch, with something that happens just when a sender has appended one."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def append(self, item: Item) -> None:
        super().append(item)
        self.then()


def packing(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Something happens when a sender has seen that there is room, and before it appends."""
    pack = codec.pack

    def packing(value: Any) -> bytes:
        monkeypatch.setattr(codec, "pack", pack)
        first()
        return pack(value)

    monkeypatch.setattr(codec, "pack", packing)


def test_a_task_appended_just_after_the_close_is_refused(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(3), timeout=0)
    packing(monkeypatch, lambda: core_of(pusher).close(1000))
    with pytest.raises(Closed):
        pusher.send("too late")
    assert received(puller, 3) == [0, 1, 2]
    assert core_of(pusher).batch.items == []


@pytest.mark.parametrize("has_room", [True, False])
def test_a_task_appended_just_before_the_close_is_sent_or_counted_and_not_refused(
    net: Net, has_room: bool
) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    core = core_of(pusher)
    pusher.send_many(range(2), timeout=0)
    hand(net).turn()
    if not has_room:
        for socket, _ in core._sockets.values():
            socket.disconnect(net.intakes[0][1].endpoints()[0])  # credit alone is no room
    core.batch.items = Hooked(lambda: core.close(1000))
    pusher.send("just in time")
    assert core.counters.dropped["not sent when closed"] == (not has_room)
    if has_room:
        assert received(puller, 3) == [0, 1, "just in time"]


def test_a_task_appended_just_after_the_batch_was_shut_leaves_all_the_same(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(2), timeout=0)
    hand(net).turn()
    packing(monkeypatch, lambda: hand(net).turn())  # quiet for a window: it is shut
    pusher.send("late", timeout=0)
    assert core_of(pusher).batch.items == []
    assert received(puller, 3) == [0, 1, "late"]


def test_what_was_appended_late_and_has_no_room_is_looked_after(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher = net.pusher()
    net.puller(prefetch=1024)
    pusher.send_many(range(2), timeout=0)
    hand(net).turn()

    def shut_and_lose_the_worker() -> None:
        hand(net).turn()
        net.lose_worker(0)

    packing(monkeypatch, shut_and_lose_the_worker)
    pusher.send("late", timeout=0)
    assert hand(net).turn() == [False]
    other = net.puller(prefetch=4)
    assert received(other, 1) == ["late"]


@pytest.mark.slow
@pytest.mark.parametrize("worker_dies", [False, True])
def test_a_send_that_races_with_the_close_is_refused_delivered_or_counted(
    nets: Callable[..., Net], worker_dies: bool
) -> None:
    luck = random.Random(5)
    for _ in range(25):
        net = nets(window_s=luck.choice([WINDOW_S, 60]))
        pusher, puller = net.pusher(), net.puller(prefetch=65536)
        core = core_of(pusher)
        sent: list[list[Any]] = [[] for _ in range(4)]

        def send(number: int, pusher: Pusher = pusher, sent: Any = sent) -> None:
            with contextlib.suppress(Closed):
                for i in range(1_000_000):
                    pusher.send([number, i])
                    sent[number].append(i)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while sum(map(len, sent)) < 100:
            pass
        threading.Event().wait(luck.random() * 0.003)
        if worker_dies:
            net.lose_worker(0)
            threading.Event().wait(luck.choice([0, 0.0002, 0.002]))
        core.close(2000)
        for thread in threads:
            thread.join()
        total = sum(map(len, sent))
        assert core.counters.sent + core.counters.dropped["not sent when closed"] == total
        if not worker_dies:
            got: list[Message] = []
            while len(got) < core.counters.sent:
                got += puller.recv_many(timeout=5)
            for number, numbers in enumerate(sent):
                there = [i for n, i in (task.payload for task in got) if n == number]
                assert there == numbers[: len(there)]
        assert core.batch.items == []
        assert net.dispatches[0][0].flusher._cores == {}
        net.dispatches[0][0].flusher.close()
        puller.close()


# -- Interrupted


@pytest.mark.parametrize("when", ["before it is sent", "after it was sent"])
def test_a_batch_whose_dealing_is_interrupted_is_never_repeated_nor_leaks_credit(
    net: Net, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(4), timeout=0)

    def interrupted(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        if when == "after it was sent":
            send_parts(socket, parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dispatch_module, "send_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pusher.send("by itself", headers={"so": "the batch leaves first"}, timeout=0)
    pusher.send_many(["next", "but one"], timeout=0)
    all_leave(net)
    arrived = [0, 1, 2, 3] if when == "after it was sent" else [0]
    assert received(puller, len(arrived) + 2) == [*arrived, "next", "but one"]
    assert net.intakes[0][1].counters.lost == 4 - len(arrived)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    net.until(lambda: outstanding(pusher) == 0)


@pytest.mark.parametrize("put_back_first", [False, True])
def test_an_interrupt_when_a_socket_took_nothing_loses_nothing_silently(
    net: Net, monkeypatch: pytest.MonkeyPatch, put_back_first: bool
) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many(range(4), timeout=0)
    put_back = Batch.put_back

    def interrupted(batch: Batch, items: list[Item]) -> None:
        if put_back_first:
            put_back(batch, items)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dispatch_module, "send_parts", lambda socket, parts: False)
        patch.setattr(Batch, "put_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pusher.send("by itself", headers={"so": "the batch leaves first"}, timeout=0)
    pusher.send("next", timeout=0)
    all_leave(net)
    arrived = [0, 1, 2, 3] if put_back_first else [0]
    assert received(puller, len(arrived) + 1) == [*arrived, "next"]
    assert net.intakes[0][1].counters.lost == 3, "what has left its number shows as a gap"
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    net.until(lambda: outstanding(pusher) == 0)


# -- Bounds, asyncio


def test_no_batch_takes_what_is_over_the_largest_message(nets: Callable[..., Net]) -> None:
    net = nets(window_s=None, message_bytes_max=1024)
    pusher, puller = net.pusher(), net.puller(prefetch=1024)
    pusher.send_many([b"1", b"2"], timeout=0)
    for payload in (bytes(1025), "x" * 1024):
        with pytest.raises(PayloadTooLarge):
            pusher.send(payload, timeout=0)
        with pytest.raises(PayloadTooLarge):
            asyncio.run(pusher.asend(payload, timeout=0))
    pusher.send(bytes(1021), timeout=0)  # 1024 as encoded
    all_leave(net)
    assert list(map(len, received(puller, 3))) == [1, 1, 1021]


def test_coroutines_push_in_batches(nets: Callable[..., Net]) -> None:
    net = nets(window_s=WINDOW_S)
    pusher, puller = net.pusher(), net.puller(prefetch=200)

    async def send(sender: int) -> None:
        for i in range(500):
            await pusher.asend([sender, i], timeout=10)

    async def receive() -> list[Any]:
        return [(await puller.arecv(timeout=10)).payload for _ in range(2000)]

    async def main() -> list[Any]:
        *_, got = await asyncio.gather(*(send(sender) for sender in range(4)), receive())
        return got  # type: ignore[return-value]

    got = asyncio.run(main())
    for sender in range(4):
        assert [i for s, i in got if s == sender] == list(range(500))
    assert core_of(pusher)._frames < 1500
