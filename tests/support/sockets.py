"""Bare sockets of ZeroMQ, for what is below links."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import zmq

Pair = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]


@contextlib.contextmanager
def pipe(hwm: int) -> Iterator[Pair]:
    """One that pushes, and one that pulls, with room for so many messages each."""
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    for socket in (push, pull):
        socket.set_hwm(hwm)
    pull.rcvtimeo = 5000
    pull.bind("inproc://queue")
    push.connect("inproc://queue")
    yield push, pull
    push.close(linger=0)
    pull.close(linger=0)
    context.term()
