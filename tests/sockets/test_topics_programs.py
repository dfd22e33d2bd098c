"""Topics between real processes: dead, stopped, forked and interrupted ones."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import pytest

from mesh import Node
from mesh.errors import Timeout
from tests.support.processes import Program, Programs
from tests.support.topics import fill
from tests.support.waiting import until

FORKING = """
    import os, sys, threading
    from mesh import Node
    node = Node("subscriber", buffer_messages=10)
    subscriber = node.subscriber("a")
    subscriber.recv()
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    print(child)
    if sys.argv[1] == "closes its subscriber":
        subscriber.close()
    elif sys.argv[1] == "closes its node":
        node.close()
    threading.Event().wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["is killed", "closes its node", "closes its subscriber"])
def test_a_child_that_holds_its_parents_connection_holds_up_no_publisher(
    programs: Programs, how: str
) -> None:
    with Node("publisher", buffer_messages=10) as node:
        publisher = node.publisher("a", when_full="wait")
        program = programs.start(FORKING, how)
        publisher.wait_for(1, timeout=15)
        publisher.send("fork")
        assert int(program.line()) > 0
        if how == "is killed":
            fill(publisher)
            sending = threading.Thread(target=publisher.send, args=("released",))
            sending.start()
            program.kill()
            sending.join(5)
            assert not sending.is_alive()
        until(lambda: publisher.subscribers == 0)
        for _ in range(1000):
            publisher.send(bytes(10_000), timeout=1)


SENDING = """
    from mesh import Node
    with Node("publisher") as node:
        publisher = node.publisher("a")
        print("up")
        count = 0
        while True:
            try:
                publisher.wait_for(1, timeout=0.05)
            except TimeoutError:
                pass
            publisher.send(count)
            count += 1
"""


def stopped(program: Program) -> bool:
    """Whether all of its threads are."""
    tasks = Path(f"/proc/{program.pid}/task").glob("*/stat")
    return all(task.read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


@pytest.mark.slow
def test_a_subscriber_that_comes_while_the_publisher_is_stopped_is_served_when_it_goes_on(
    programs: Programs,
) -> None:
    """For longer than ZeroMQ lets a handshake take."""
    with Node("subscriber") as node:
        program = programs.start(SENDING)
        program.expect("up")
        node.wait_for_peers(1, timeout=15)
        program.kill(signal.SIGSTOP)
        until(lambda: stopped(program), "the stop")
        subscriber = node.subscriber("a")
        with pytest.raises(Timeout):
            subscriber.recv(timeout=3.4)
        program.kill(signal.SIGCONT)
        assert subscriber.recv(timeout=15).channel == "a"


INTERRUPTED = """
    import sys, threading, time
    from mesh import Node, MeshError
    node = Node("node")
    publisher = node.publisher("a", when_full="wait")
    subscriber = node.subscriber("a")
    publisher.wait_for(1, timeout=15)

    def forever(call):
        try:
            while True:
                call()
        except MeshError:
            pass  # closed

    send, recv = lambda: publisher.send(0), lambda: subscriber.recv()
    busy, other = (send, recv) if sys.argv[1] == "send" else (recv, send)
    threading.Thread(target=forever, args=(other,), daemon=True).start()
    for i in range(int(sys.argv[2])):
        try:
            print("busy")
            while True:
                busy()
        except KeyboardInterrupt:
            pass
    started = time.monotonic()
    node.close(timeout=1)
    print("closed", time.monotonic() - started < 3)
"""
INTERRUPTS = 100


def interrupted(programs: Programs, what: str) -> Program:
    """A program that was interrupted at many moments while it was busy with that."""
    program = programs.start(INTERRUPTED, what, str(INTERRUPTS))
    for i in range(INTERRUPTS):
        assert program.line() == "busy", f"after {i} interrupts"
        threading.Event().wait(random.random() * 0.002)  # anywhere in its loop, not at its start
        program.kill(signal.SIGINT)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("what", ["send", "recv"])
def test_interrupts_leave_no_lock_held_nor_anybody_asleep(programs: Programs, what: str) -> None:
    assert interrupted(programs, what).line() == "closed True"
