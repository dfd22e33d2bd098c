"""What a clerk is given and what is due: each is done, whatever there is of the other."""

from __future__ import annotations

import time
from threading import Event

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
