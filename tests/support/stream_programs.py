"""What the processes of a run do in which everything is killed: each writes down what it sees.

A producer repeats, after a restart, what it has no outcome for, with the same dedup ids; a consumer
acknowledges what it was given, and notes what was confirmed; a reader follows. Run as
``python -c "from tests.support.stream_programs import …"``.
"""

from __future__ import annotations

import hashlib
import random
import sys
import threading
import time
from pathlib import Path

from mesh import Node
from mesh.durable.appending import Appending
from mesh.durable.consumed import ConsumedRecord
from mesh.errors import Closed, OutcomeUnknown, ProducerFenced, Timeout
from tests.support.history_events import (
    Ack,
    Acked,
    Appended,
    Committed,
    Delivered,
    Drained,
    Invoked,
    Read,
    Recorder,
    Replayed,
    Unknown,
    load,
)

STREAM = "orders"
KEYS = 7
_UNDER_WAY = 20


def digest_of(payload: dict[str, str]) -> str:
    return hashlib.sha1(f"{payload['id']} {payload['pad']}".encode()).hexdigest()


def payload_of(append_id: str) -> dict[str, str]:
    luck = random.Random(append_id)
    return {"id": append_id, "pad": "x" * luck.randint(0, 400)}


def end_with_input() -> threading.Event:
    """Set when the standard input ends: the run is over."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return ended


def produce(folder: str, name: str, run: str, partition: str) -> None:
    ended = end_with_input()
    seq, owed = _what_is_owed(Path(folder), name)
    with Recorder(Path(folder) / f"{name}-{run}.jsonl") as recorder, Node(name) as node:
        stream = node.stream(STREAM, producer=name, home=partition)
        under_way: list[tuple[str, Appending]] = []
        while not ended.is_set() or under_way:
            if not ended.is_set() and len(under_way) < _UNDER_WAY:
                number = owed.pop(0) if owed else seq
                seq = max(seq, number + 1)
                append_id = f"{name}:{number}"
                payload = payload_of(append_id)
                key = f"{name}/{number % KEYS}"
                recorder.note(
                    Invoked(
                        id=append_id,
                        producer=name,
                        seq=number,
                        digest=digest_of(payload),
                        key=key,
                    )
                )
                try:
                    one = stream.append_nowait(payload, key=key, dedup_id=append_id, timeout=60)
                except (ProducerFenced, Closed):
                    recorder.note(Unknown(id=append_id))
                    return
                under_way.append((append_id, one))
                continue
            append_id, one = under_way[0]
            try:
                receipt = one.wait(60)
            except (OutcomeUnknown, Timeout, Closed, ProducerFenced):
                return  # the next run says them all again
            assert receipt.offset is not None
            recorder.note(
                Appended(id=append_id, partition=receipt.partition, offset=receipt.offset)
            )
            del under_way[0]


def _what_is_owed(folder: Path, name: str) -> tuple[int, list[int]]:
    """The next number of that producer, and those without an outcome, which come before it."""
    invoked, known = set(), set()
    for event in load(folder):
        if isinstance(event, Invoked) and event.producer == name:
            invoked.add(event.seq)
        elif isinstance(event, Appended) and event.id.startswith(f"{name}:"):
            known.add(int(event.id.rpartition(":")[2]))
    return max(invoked, default=-1) + 1, sorted(invoked - known)


def consume(folder: str, name: str, run: str, group: str, order: str) -> None:
    ended = end_with_input()
    who = f"{name}-{run}"
    with Recorder(Path(folder) / f"{who}.jsonl") as recorder, Node(name) as node:
        options = {"order": order, "ack_wait": 5.0, "max_deliver": 1000}
        with node.stream(STREAM).consumer(group, prefetch=20, **options) as consumer:  # type: ignore[arg-type]
            while not ended.is_set():
                held: list[ConsumedRecord] = []
                try:
                    held.append(consumer.recv(0.2))
                    while len(held) < 10:
                        held.append(consumer.recv(0.0))
                except Timeout:
                    pass
                for record in held:
                    recorder.note(_delivered(record, who, group))
                for record in held:
                    recorder.note(
                        Ack(
                            consumer=who,
                            group=group,
                            partition=record.partition,
                            offset=record.offset,
                        )
                    )
                    record.ack()
                try:
                    consumer.flush(timeout=0.2)  # what waits here meanwhile may be done elsewhere
                except (Timeout, Closed):
                    continue
                for record in held:
                    recorder.note(
                        Acked(
                            consumer=who,
                            group=group,
                            partition=record.partition,
                            offset=record.offset,
                        )
                    )
                for partition, offset in consumer.committed.items():
                    recorder.note(
                        Committed(observer=who, group=group, partition=partition, offset=offset)
                    )


def _delivered(record: ConsumedRecord, who: str, group: str) -> Delivered:
    return Delivered(
        consumer=who,
        group=group,
        partition=record.partition,
        offset=record.offset,
        id=record.payload["id"],
        digest=digest_of(record.payload),
        deliveries=record.deliveries,
    )


def follow(folder: str, name: str, run: str) -> None:
    ended = end_with_input()
    who = f"{name}-{run}"
    with Recorder(Path(folder) / f"{who}.jsonl") as recorder, Node(name) as node:
        replay = node.stream(STREAM).replay(follow=True, timeout=60)

        def close() -> None:
            ended.wait()
            replay.close()

        threading.Thread(target=close, daemon=True).start()
        for record in replay:
            recorder.note(
                Read(
                    reader=who,
                    partition=record.partition,
                    offset=record.offset,
                    id=record.payload["id"],
                    digest=digest_of(record.payload),
                )
            )


def settle(folder: str, groups: list[str], partitions: int) -> None:
    """At the end, with nobody killed any more: read all, and have each group drained."""
    with Recorder(Path(folder) / "last.jsonl") as recorder, Node("last") as node:
        stream = node.stream(STREAM)
        since = time.monotonic_ns()
        replay = stream.replay(partitions=partitions, timeout=30)
        for record in replay:
            recorder.note(
                Read(
                    reader="last",
                    partition=record.partition,
                    offset=record.offset,
                    id=record.payload["id"],
                    digest=digest_of(record.payload),
                )
            )
        for partition in replay.partitions:
            recorder.note(Replayed(reader="last", partition=partition, since=since))
        ends = {partition: end for partition, (_, end) in stream.bounds().items()}
        for group in groups:
            deadline = time.monotonic() + 60
            with stream.consumer(group, prefetch=200) as consumer:
                while any(consumer.committed.get(p, 0) < end for p, end in ends.items()):
                    assert time.monotonic() < deadline, (group, consumer.committed, ends)
                    try:
                        record = consumer.recv(1.0)
                    except Timeout:
                        consumer.flush()
                        continue
                    recorder.note(_delivered(record, "last", group))
                    record.ack()
            for partition in ends:
                recorder.note(Drained(group=group, partition=partition, since=since))
