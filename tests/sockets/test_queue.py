"""What the queue column of the guarantees table promises, over real sockets and without a node."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from mesh import limits
from mesh.errors import Closed, Timeout
from mesh.message import Message, TasksLost
from mesh.sockets.control import Offer
from mesh.sockets.home import node_text
from mesh.sockets.puller import Puller
from mesh.sockets.pusher import Pusher
from tests.support.queues import (
    PULLING,
    PUSHING,
    QUEUE,
    Crew,
    Net,
    SharedTime,
    core_of,
    outstanding,
    push_together,
)
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up that goes missing must show: a sender would find the room at its next retry."""
    monkeypatch.setattr(limits, "TICK_S", 60.0)


# -- One worker ----------------------------------------------------------------------------------


def test_a_task_arrives_as_it_was_sent(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller()
    before = time.time_ns()
    pusher.send({"path": "a.png", "size": [1, 2]}, headers={"trace": "x"})
    task = puller.recv(timeout=5)
    assert task.payload == {"path": "a.png", "size": [1, 2]}
    assert task.headers == {"trace": "x"}
    assert (task.channel, task.sender, task.seq) == (QUEUE, node_text(PUSHING), 1)
    assert before <= task.time_ns <= time.time_ns()


def test_a_large_payload_arrives(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller()
    large = bytes(range(256)) * 1024
    pusher.send(large, headers={"n": 1})
    task = puller.recv(timeout=5)
    assert (task.payload, task.headers) == (large, {"n": 1})


def test_each_task_goes_to_exactly_one_worker_in_order(net: Net, crew: Crew) -> None:
    pusher = net.pusher()
    for _ in range(3):
        crew.hire(net.puller())
    pusher.send_many(range(300), timeout=5)
    crew.wait_done(300)
    assert sorted(crew.payloads) == list(range(300))  # type: ignore[type-var]
    for tasks in crew.done.values():
        assert [task.payload for task in tasks] == sorted(task.payload for task in tasks)
        assert [task.seq for task in tasks] == list(range(1, len(tasks) + 1))


def test_with_a_prefetch_of_one_the_next_task_comes_when_the_worker_comes_back(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    pusher.send(1)
    with pytest.raises(Timeout, match=r"no worker of queue 'jobs' with room at once \(1 workers\)"):
        pusher.send(2, timeout=0)
    assert puller.recv(timeout=5).payload == 1
    net.tick()
    with pytest.raises(Timeout):
        pusher.send(2, timeout=0)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    pusher.send(2, timeout=5)
    assert puller.recv(timeout=5).payload == 2


def test_recv_many_returns_all_there_are_and_settles_them_together(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=5)
    pusher.send_many(range(5), timeout=0)
    got: list[int] = []
    while len(got) < 5:
        batch = puller.recv_many(timeout=5)
        got += [task.payload for task in batch]
        net.tick()
        assert outstanding(pusher) >= len(batch)
    assert got == list(range(5))
    with pytest.raises(Timeout):
        puller.recv_many(timeout=0)
    net.until(lambda: outstanding(pusher) == 0)
    pusher.send_many(range(5), timeout=0)


def test_recv_many_takes_no_more_than_asked(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=5)
    pusher.send_many(range(5), timeout=0)
    got: list[int] = []
    while len(got) < 5:
        batch = [task.payload for task in puller.recv_many(timeout=5, count_max=2)]
        assert len(batch) <= 2
        got += batch
    assert got == list(range(5))


def test_a_thread_that_ends_is_done_with_its_task(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    for i in range(3):
        pusher.send(i, timeout=5)
        thread = threading.Thread(target=puller.recv, kwargs={"timeout": 5})
        thread.start()
        thread.join(timeout=5)
        net.until(lambda: outstanding(pusher) == 0)


def test_a_worker_that_runs_out_of_tasks_tells_what_it_has_done(net: Net) -> None:
    """At once and not with the next tick, though it is too little to be worth telling before."""
    pusher, puller = net.pusher(), net.puller(prefetch=100)
    push_together(pusher, range(3))
    thread = threading.Thread(target=puller.recv, kwargs={"timeout": 5})
    thread.start()
    thread.join(timeout=5)
    puller.recv(timeout=5), puller.recv(timeout=5)
    assert outstanding(pusher) == 3
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    until(lambda: outstanding(pusher) == 0)


def test_another_thread_coming_for_more_does_not_settle_what_this_one_has(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=2)
    pusher.send(1)
    puller.recv(timeout=5)
    pusher.send(2)
    with ThreadPoolExecutor(1) as other:
        other.submit(puller.recv, timeout=5).result()
        with pytest.raises(Timeout):
            other.submit(puller.recv, timeout=0).result()
        net.until(lambda: outstanding(pusher) < 2)
    net.tick()
    assert outstanding(pusher) == 1


# -- Several workers -----------------------------------------------------------------------------


def test_a_burst_is_shared_evenly_by_equal_workers(
    net: Net, crew: Crew, high_water: dict[int, int]
) -> None:
    """Time passes only while all four work. So one that waits for a task that is there to be had,
    or for its credit to be noticed, would stop the whole."""
    share_a_burst(net, crew, [2, 2, 2, 2])
    assert all(abs(share - 250) <= 4 for share in crew.shares), crew.shares
    assert sorted(high_water.values()) == [4] * 4


def test_of_a_burst_the_others_do_what_a_slow_worker_does_not(
    net: Net, crew: Crew, high_water: dict[int, int]
) -> None:
    """It takes ten times as long, and does a thirty-first of the whole."""
    share_a_burst(net, crew, [2, 2, 2, 20])
    for share, expected in zip(crew.shares, [323, 323, 323, 32], strict=True):
        assert abs(share - expected) <= 4, crew.shares
    assert sorted(high_water.values()) == [4] * 4


def share_a_burst(net: Net, crew: Crew, task_ms: list[int]) -> None:
    """1,000 tasks, over workers that take so long for each."""
    pusher, time = net.pusher(), SharedTime(len(task_ms))
    for ms in task_ms:
        crew.hire(net.puller(), partial(time.work, ms))
    pusher.send_many(range(1000), timeout=10)
    time.over()
    crew.wait_done(1000)


def test_a_slow_worker_hoards_nothing_that_an_idle_one_could_do(
    net: Net, crew: Crew, high_water: dict[int, int]
) -> None:
    """The slow one may do one task for every 30 that the three others have done together."""
    pusher, done = net.pusher(), itertools.count(1)
    may_go_on = threading.Semaphore(0)

    def fast() -> None:
        if next(done) % 30 == 0:
            may_go_on.release()

    for _ in range(3):
        crew.hire(net.puller(), fast)
    crew.hire(net.puller(), lambda: may_go_on.acquire(timeout=10))
    pusher.send_many(range(620), timeout=5)
    crew.wait_done(620 - 4)
    *_, slow = crew.shares
    assert 16 <= slow <= 20, crew.shares
    assert max(high_water.values()) <= 4
    may_go_on.release(4)
    crew.wait_done(4)


def test_a_worker_that_is_stuck_holds_up_nobody(
    net: Net, crew: Crew, high_water: dict[int, int]
) -> None:
    pusher, stuck = net.pusher(), net.puller(prefetch=3)
    crew.hire(net.puller(prefetch=3))
    pusher.send_many(range(100), timeout=5)
    crew.wait_done(97)
    assert high_water[PULLING] == 3
    assert len(stuck.recv_many(timeout=5)) <= 3


def test_of_two_pushers_each_may_have_its_prefetch_in_a_workers_hands(net: Net) -> None:
    first, second, puller = net.pusher(), net.pusher(), net.puller(prefetch=2)
    for pusher in (first, second):
        pusher.send_many(range(2), timeout=0)
        with pytest.raises(Timeout):
            pusher.send(2, timeout=0)
    got = Counter(puller.recv(timeout=5).sender for _ in range(4))
    assert got == {node_text(PUSHING): 2, node_text(PUSHING + 1): 2}


def test_eight_threads_push_and_each_ones_order_is_kept(net: Net, crew: Crew) -> None:
    pusher = net.pusher()
    crew.hire(net.puller())

    def push(thread: int) -> None:
        pusher.send_many([[thread, i] for i in range(50)], timeout=10)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(push, range(8)))
    crew.wait_done(400)
    (tasks,) = crew.done.values()
    for thread in range(8):
        assert [n for t, n in (task.payload for task in tasks) if t == thread] == list(range(50))
    assert [task.seq for task in tasks] == list(range(1, 401))


# -- No worker -----------------------------------------------------------------------------------


def test_without_a_worker_the_sender_times_out_and_nothing_was_sent(net: Net) -> None:
    pusher = net.pusher()
    expected = r"^no worker of queue 'jobs' with room within 0\.05 s \(0 workers\)$"
    with pytest.raises(Timeout, match=expected):
        pusher.send("a", timeout=0.05)
    puller = net.puller()
    with pytest.raises(Timeout, match=r"no task of queue 'jobs' within 0\.02 s"):
        puller.recv(timeout=0.02)
    assert core_of(pusher).counters.sent == 0


def test_a_worker_that_comes_while_the_sender_waits_gets_the_task(net: Net) -> None:
    pusher = net.pusher()
    with ThreadPoolExecutor(1) as other:
        sending = other.submit(pusher.send, "late", timeout=5)
        waiting = core_of(pusher).link
        net.until(lambda: bool(waiting._threads))
        assert net.puller().recv(timeout=5).payload == "late"
        sending.result(timeout=5)


def test_wait_for_returns_once_so_many_workers_are_there(net: Net) -> None:
    pusher = net.pusher()
    assert pusher.workers == 0
    with pytest.raises(Timeout, match=r"no 2 workers of queue 'jobs' within 0\.01 s"):
        pusher.wait_for(2, timeout=0.01)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(pusher.wait_for, 2, timeout=5)
        net.puller(), net.puller()
        waiting.result(timeout=5)
    assert pusher.workers == 2


def test_who_waits_for_workers_takes_no_wake_up_from_who_waits_for_room(net: Net) -> None:
    pusher = net.pusher()
    link = core_of(pusher).link
    with ThreadPoolExecutor(2) as others:
        watching = others.submit(pusher.wait_for, 2, timeout=5)
        net.until(lambda: len(link._threads) == 1)
        sending = others.submit(pusher.send, 1, timeout=5)
        net.until(lambda: len(link._threads) == 2)
        puller = net.puller(prefetch=1)
        sending.result(timeout=5)
        sending = others.submit(pusher.send, 2, timeout=5)
        net.until(lambda: len(link._threads) == 2)
        assert [puller.recv(timeout=5).payload for _ in range(2)] == [1, 2]
        sending.result(timeout=5)
        net.puller()
        watching.result(timeout=5)


# -- Workers that go away ------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["died", "silent", "bye", "withdrawn"])
def test_when_a_worker_goes_each_pusher_is_told_how_many_of_its_own_went_with_it(
    net: Net, reason: str
) -> None:
    first, second, puller = net.pusher(), net.pusher(), net.puller(prefetch=3)
    told: list[TasksLost] = []
    first.on_loss(told.append)
    second.on_loss(told.append)
    first.send_many(range(3))
    second.send(0)
    puller.recv(timeout=5)
    net.lose_worker(0, reason)
    worker = node_text(PULLING)
    assert told == [TasksLost(QUEUE, worker, 3), TasksLost(QUEUE, worker, 1)]
    assert (dict(first.lost), dict(second.lost)) == ({worker: 3}, {worker: 1})
    assert core_of(first).counters.lost == 3
    assert first.workers == 0


def test_what_a_worker_had_settled_before_it_died_is_not_lost(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=3)
    pusher.send_many(range(3))
    for _ in range(3):
        puller.recv(timeout=5)
    until(lambda: outstanding(pusher) == 1)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    until(core_of(pusher).link.readable)
    net.lose_worker(0)
    assert dict(pusher.lost) == {}


def test_a_worker_with_empty_hands_takes_nothing_with_it(net: Net) -> None:
    pusher = net.pusher()
    net.puller()
    net.lose_worker(0)
    assert dict(pusher.lost) == {}
    net.lose_worker(0)


def test_a_task_for_a_dead_worker_goes_to_a_living_one(net: Net) -> None:
    pusher = net.pusher()
    net.puller(), net.puller()
    net.lose_worker(0)
    living = Puller(net.intakes[1][1], None, lambda: None)
    pusher.send_many(range(4), timeout=0)
    assert [living.recv(timeout=5).payload for _ in range(4)] == list(range(4))


def test_one_of_two_workers_in_a_node_may_go(net: Net) -> None:
    pusher, home = net.pusher(), net.homes.make(PULLING)
    net.puller(prefetch=1, home=home)
    other = net.puller(prefetch=1, home=home)
    pusher.send_many("ab")
    net.lose_worker(0)
    assert dict(pusher.lost) == {node_text(PULLING): 1}
    assert pusher.workers == 1
    assert other.recv(timeout=5).payload == "b"


def test_a_worker_that_is_attached_anew_starts_with_full_credit(net: Net) -> None:
    """After a silence: the tasks of before are lost for the pusher, and what the worker settles of
    them counts for nothing in the new account."""
    pusher, puller = net.pusher(), net.puller(prefetch=2)
    pusher.send_many(["old 1", "old 2"])
    assert puller.recv(timeout=5).payload == "old 1"
    (pushing, dispatch), (pulling, intake) = net.dispatches[0], net.intakes[0]
    net.lose_worker(0, "silent")
    assert dict(pusher.lost) == {node_text(PULLING): 2}
    intake.detach(PUSHING, dispatch.key, "silent")
    net.join(pushing, dispatch, pulling, intake)
    pusher.send_many(["new 1", "new 2"], timeout=0)
    got = sorted(puller.recv(timeout=5).payload for _ in range(3))
    assert got == ["new 1", "new 2", "old 2"]
    net.tick()
    assert outstanding(pusher) in (1, 2)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    net.until(lambda: outstanding(pusher) == 0)
    assert dict(pusher.lost) == {node_text(PULLING): 2}
    assert intake.counters.lost == 0


def test_a_worker_that_heard_of_its_pusher_late_tells_it_what_is_done(net: Net) -> None:
    """The first tasks may be faster than the pusher's offer."""
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    (pushing, dispatch), (_, intake) = net.dispatches[0], net.intakes[0]
    intake.detach(PUSHING, dispatch.key, "silent")
    pusher.send(1)
    puller.recv(timeout=5)
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    intake.attach(pushing.node_id, Offer(dispatch.key, "push", QUEUE), dispatch.endpoints()[0])
    until(lambda: outstanding(pusher) == 0)


def test_an_offer_said_twice_is_one_worker(net: Net) -> None:
    pusher = net.pusher()
    net.puller()
    net.join(*net.dispatches[0], *net.intakes[0])
    assert pusher.workers == 1


def test_what_a_pusher_sent_before_it_went_is_delivered(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller()
    pusher.send_many(range(3))
    assert puller.recv(timeout=5).payload == 0
    intake = net.intakes[0][1]
    intake.detach(PUSHING, core_of(pusher).key, "bye")
    assert [puller.recv(timeout=5).payload for _ in range(2)] == [1, 2]


# -- asyncio -------------------------------------------------------------------------------------


def test_both_ends_work_in_asyncio(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=2)

    async def run() -> list[int]:
        await pusher.await_for(1, timeout=5)
        sending = asyncio.ensure_future(pusher.asend_many(range(50), timeout=5))
        got = []
        async for task in puller:
            got.append(task.payload)
            if len(got) == 50:
                break
        assert await sending == 50
        with pytest.raises(Timeout, match=r"\(1 workers\)"):
            await pusher.asend_many(range(3), timeout=0.01)
        got += [task.payload for task in await puller.arecv_many(timeout=5)]
        return got

    assert asyncio.run(run())[:51] == [*range(50), 0]


def test_each_asyncio_task_holds_its_own(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=2)
    pusher.send_many("ab")

    async def run() -> None:
        assert (await puller.arecv(timeout=5)).payload == "a"

        async def other() -> None:
            assert (await puller.arecv(timeout=5)).payload == "b"

        await asyncio.create_task(other())  # is over, so it holds nothing any more
        net.until(lambda: outstanding(pusher) == 1)

    asyncio.run(run())


def test_a_cancelled_recv_loses_no_task(net: Net) -> None:
    """Cancelled when it had one already, which nobody saw yet."""
    pusher, puller = net.pusher(), net.puller(prefetch=2)
    link = net.intakes[0][1].link

    async def run() -> list[str]:
        receiving = asyncio.ensure_future(puller.arecv(timeout=5))
        await asyncio.sleep(0)
        pusher.send_many("ab")
        waiter = link.loops[asyncio.get_running_loop()]
        while waiter._calls:
            waiter._look()
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        net.tick()
        assert outstanding(pusher) == 2
        return [(await puller.arecv(timeout=5)).payload for _ in range(2)]

    assert asyncio.run(run()) == ["a", "b"]
    net.until(lambda: outstanding(pusher) == 0)


def test_a_cancelled_recv_leaves_its_task_to_whoever_waits(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller()
    link = net.intakes[0][1].link

    async def run(threads: ThreadPoolExecutor) -> Future[Message]:
        receiving = asyncio.ensure_future(puller.arecv(timeout=5))
        await asyncio.sleep(0)
        pusher.send("a")
        waiter = link.loops[asyncio.get_running_loop()]
        while waiter._calls:
            waiter._look()
        waiting = threads.submit(puller.recv, timeout=5)
        until(lambda: link._threads)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        return waiting

    with ThreadPoolExecutor(1) as threads:
        assert asyncio.run(run(threads)).result(timeout=5).payload == "a"


def test_room_that_somebody_else_took_notice_of_wakes_a_waiting_coroutine(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    pusher.send(1)
    puller.recv(timeout=5)

    async def run() -> None:
        sending = asyncio.ensure_future(pusher.asend(2, timeout=5))
        await asyncio.sleep(0)
        with pytest.raises(Timeout):
            puller.recv(timeout=0)
        until(lambda: outstanding(pusher) == 0)  # this reads the credit, before the loop polls
        await sending

    asyncio.run(run())


# -- Closing -------------------------------------------------------------------------------------


def test_closing_wakes_who_waits(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller()
    net.lose_worker(0)
    with ThreadPoolExecutor(2) as others:
        sending = others.submit(pusher.send, 1, timeout=5)
        receiving = others.submit(puller.recv, timeout=5)
        links = core_of(pusher).link, net.intakes[0][1].link
        net.until(lambda: all(link._threads for link in links))
        pusher.close()
        puller.close()
        for waiting in (sending, receiving):
            with pytest.raises(Closed):
                waiting.result(timeout=5)
    with pytest.raises(Closed, match="pusher 'jobs' is closed"):
        pusher.send(1)
    with pytest.raises(Closed, match="puller 'jobs' is closed"):
        puller.recv()
    assert list(puller) == []


def test_closing_one_handle_of_a_queue_leaves_the_others(net: Net) -> None:
    pusher = net.pusher()
    other = Pusher(core_of(pusher), None, lambda: None)
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(other.send, 1, timeout=5)
        net.until(lambda: bool(core_of(pusher).link._threads))
        other.close()
        with pytest.raises(Closed, match="pusher 'jobs' is closed"):
            sending.result(timeout=5)
    puller = net.puller()
    pusher.send(2)
    assert puller.recv(timeout=5).payload == 2


def test_a_puller_that_closes_tells_what_is_settled_and_nothing_more(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=100)
    push_together(pusher, range(10))
    for _ in range(10):
        puller.recv(timeout=5)
    assert outstanding(pusher) == 10
    puller.close()
    net.until(lambda: outstanding(pusher) == 1)
    net.lose_worker(0, "withdrawn")
    assert dict(pusher.lost) == {node_text(PULLING): 1}


def test_closing_does_not_hang_on_workers_that_never_read(net: Net) -> None:
    pusher = net.pusher()
    offer = Offer(1, "pull", QUEUE, prefetch=64)
    core_of(pusher).attach(PULLING, offer, f"ipc://{net.homes.directory}/nobody")
    pusher.send_many(range(64))
    started = time.monotonic()
    home, core = net.dispatches[0]
    core.close(linger_ms=20)
    home.transport.close()
    assert time.monotonic() - started < 1
