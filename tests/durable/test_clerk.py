"""What a clerk is given and what is due: each is done, whatever there is of the other."""

from __future__ import annotations

import time
from functools import partial
from threading import Event, Thread

from mesh.durable.clerk import Clerk


def test_what_is_due_is_done_however_much_else_there_is() -> None:
    clerk, done = Clerk("test"), Event()

    def again() -> None:
        if not done.is_set():
            clerk.run(again)

    clerk.run(lambda: clerk.at(time.monotonic(), done.set))
    clerk.run(again)
    try:
        assert done.wait(5)
    finally:
        done.set()
        clerk.close()


def test_what_comes_when_it_has_ended_is_told_so_and_what_came_before_is_done() -> None:
    clerk, told = Clerk("test"), list[str]()
    clerk.run(lambda: told.append("done"), lambda: told.append("too late"))
    assert clerk.close()
    clerk.run(lambda: told.append("done too late"))
    clerk.run(lambda: told.append("done too late"), lambda: told.append("too late"))
    assert told == ["done", "too late"]


def test_each_who_asks_as_it_ends_is_told_one_thing_once() -> None:
    for _ in range(50):
        clerk, told = Clerk("test"), list[int]()
        asks = [
            Thread(target=clerk.run, args=(partial(told.append, n), partial(told.append, n)))
            for n in range(4)
        ]
        for each in asks[:2]:
            each.start()
        clerk.close(0)
        for each in asks[2:]:
            each.start()
        for each in asks:
            each.join()
        assert clerk.close()
        assert sorted(told) == [0, 1, 2, 3]
