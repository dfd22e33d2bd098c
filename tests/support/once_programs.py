"""Consumers that are killed between any two of their steps, and tell when all is done.

Each takes a `remedy`, with which what it does happens once, or ``none``; and the number of records
after which it is to die where that hurts, or, below 0, to fall asleep, until a line comes. It ends
once its group has settled all that there is. Run as
``python -c "from tests.support import once_programs as p; p.apply(…)"``.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from mesh import Node
from mesh.durable.consumed import ConsumedRecord
from mesh.durable.consumer import Consumer
from mesh.durable.stream import Stream
from mesh.errors import Timeout

if TYPE_CHECKING:
    from _typeshed import TraceFunction

_NAME = "a program of the docs"
DONE = """
    INSERT INTO done VALUES (?, ?) ON CONFLICT (partition)
    DO UPDATE SET last = excluded.last WHERE done.last < excluded.last
"""


def apply(path: str, remedy: str, batch: str, fatal: str) -> None:
    """Add up amounts in a database; die between the commit and the acknowledgement."""
    db = sqlite3.connect(path, timeout=30)
    db.execute("PRAGMA synchronous = OFF")  # the machine stays up
    with Node("billing") as node:
        orders = node.stream("orders")
        consumer = orders.consumer("billing", order="exclusive", ack_wait=1, max_deliver=1000)
        if remedy == "positions":
            consumer.resume_from(db.execute("SELECT partition, last FROM done"))
        count = 0
        for records in _batches(orders, consumer, int(batch)):
            if count == -int(fatal) > 0:
                sys.stdout.write("asleep\n")
                sys.stdin.readline()
            with db:
                for record in records:
                    if remedy == "none" or db.execute(DONE, record.position).rowcount:
                        _pay(db, *record.payload)
            count += len(records)
            _die_at(count, fatal)
            for record in records:
                record.ack()
    sys.stdout.write("drained\n")


def _pay(db: sqlite3.Connection, account: str, cents: int) -> None:
    db.execute("UPDATE accounts SET cents = cents + ? WHERE name = ?", (cents, account))
    db.execute("INSERT INTO effects VALUES (?)", (cents,))


def transform(remedy: str, fatal: str) -> None:
    """Append to another stream; die between the append and the acknowledgement."""
    with Node("pricing") as node:
        orders, invoices = node.stream("orders"), node.stream("invoices")
        consumer = orders.consumer("pricing", ack_wait=5, max_deliver=1000)
        count = 0
        for records in _batches(orders, consumer, 1):
            for record in records:
                origin = record if remedy == "derived_from" else None
                invoices.append(record.payload, derived_from=origin, timeout=30)
                count += 1
                _die_at(count, fatal)
                record.ack()
    sys.stdout.write("drained\n")


def at_line(source: str, line: str, nth: str, number: str) -> None:
    """Run a program that gets a signal as it comes to one of its lines for the `nth` time. A `with`
    is come to again where it ends."""
    left = int(nth)

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        nonlocal left
        if frame.f_code.co_filename != _NAME:
            return None
        if event == "line" and frame.f_lineno == int(line):
            left -= 1
            if not left:
                os.kill(os.getpid(), int(number))
        return trace

    program = compile(source, _NAME, "exec")
    sys.settrace(trace)
    exec(program, {"__name__": "__main__"})


def _batches(orders: Stream, consumer: Consumer, size: int) -> Iterator[list[ConsumedRecord]]:
    while True:
        records: list[ConsumedRecord] = []
        try:
            records.append(consumer.recv(0.3))
            while len(records) < size:
                records.append(consumer.recv(0))
        except Timeout:
            if not records:
                consumer.flush(timeout=30)
                if consumer.committed == {p: end for p, (_, end) in orders.bounds().items()}:
                    return
                continue
        yield records


def _die_at(count: int, fatal: str) -> None:
    if 0 < int(fatal) <= count:
        os.kill(os.getpid(), signal.SIGKILL)
