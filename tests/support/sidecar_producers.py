"""Producers of a stream, as rules for `tests.support.sidecar_machine`: they append, repeat what
they are not sure of or have a receipt for, give up, begin anew, and append out of turn.

Promises that each append gets its receipt, or a refusal for which there is a reason: a fault of the
disk, a stream that is full, or that something before it was refused or lost; and that no two runs
of a producer get the same epoch, nor does a later one get a lower.

Must not know how the sidecar ends, nor its groups, but that there are dead letters.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from mesh.durable.outcomes import Appended, Opened, Refused
from mesh.durable.protocol import Open, Reply
from mesh.durable.records import Derived
from tests.support.sidecar_lives import SEEDS, STREAM, Lives
from tests.support.sidecar_records import Sent

NOTE_BYTES = 88
ELSEWHERE, PUT_BACK = 77, 78
"""Of what is derived: the sources."""
PRODUCERS = st.sampled_from([1, 2, 3])
SIZES = st.lists(st.sampled_from([1, 1, 10, 60, 250, 500]), min_size=1, max_size=3)
"""Of the payloads of a batch."""


class Run(msgspec.Struct, eq=False):
    """Of a producer."""

    producer: int
    epoch: int
    seq: int
    owed: list[Sent] = []
    """What there is no receipt for."""


class Producers(Lives):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[int, Run] = {}
        self.epochs: dict[int, int] = {}
        """The highest that each producer was told."""

    # -- Runs --------------------------------------------------------------------------------

    @rule(producer=PRODUCERS)
    def open_producer(self, producer: int) -> None:
        self.runs.pop(producer, None)
        self.ask(Open(STREAM, producer, self.options), partial(self.opened, producer))

    def opened(self, producer: int, reply: Reply) -> None:
        if isinstance(reply, Refused):
            assert self.faulty_step, reply
            return
        assert isinstance(reply, Opened), reply
        self.made = True
        if self.options.durability == "fsync":
            assert reply.epoch > self.epochs.get(producer, 0), "given before"
        self.epochs[producer] = reply.epoch
        self.runs[producer] = Run(producer, reply.epoch, reply.seq)

    def opened_runs(self, producers: list[int]) -> list[Run]:
        for producer in producers:
            if producer not in self.runs:
                self.open_producer(producer)
        return [self.runs[producer] for producer in producers if producer in self.runs]

    def batch(self, run: Run, records: list[dict[str, Any]], seq: int | None = None) -> Sent:
        seq = run.seq if seq is None else seq
        return self.records.batch(run.producer, run.epoch, seq, records)

    # -- What they append, and hear ----------------------------------------------------------

    def send(self, *runs: Run) -> None:
        """All that they have no receipt for, in order."""
        actions = []
        for run in runs:
            refused: list[Refused] = []
            for sent in run.owed:
                sent.tries += 1
                answer = self.asked(partial(self.appended, run, sent, refused))
                actions.append(partial(self.sidecar.append, STREAM, sent.batch, answer))
        self.done(*actions)

    def appended(self, run: Run, sent: Sent, refused: list[Refused], reply: Reply) -> None:
        if isinstance(reply, Appended):
            self.records.receipt(sent, reply)
            run.owed.remove(sent)
            return
        assert isinstance(reply, Refused), reply
        sent.refusals += reply.code != "unsure"
        match reply.code:
            case "full":
                assert self.faulty_step or self.is_full(sent), "there was room"
            case "storage":
                assert self.faulty_step
            case "unsure":
                assert self.faulty_step
                assert self.failed
            case "large":
                assert sent.batch.header.size > (self.options.bytes_max or 0)
                self.runs.pop(run.producer, None)
            case "gap" | "unknown" | "fenced" if self.options.durability != "fsync":
                if not refused:  # it was lost, and with it how far it had come
                    self.runs.pop(run.producer, None)
            case _:
                assert refused, reply
                assert reply.code == "gap", reply
        refused.append(reply)

    def is_full(self, sent: Sent) -> bool:
        """But for notes that were written with it."""
        log = self.hosted.log
        size = log.size - log.note_bytes + sent.batch.header.size + 12 * NOTE_BYTES
        return self.options.bytes_max is not None and size > self.options.bytes_max

    @rule(
        producers=st.lists(PRODUCERS, min_size=1, max_size=2, unique=True),
        batches=st.lists(SIZES, min_size=1, max_size=4),
        delay_s=st.sampled_from([0, 0, 0, 5, 25]),
    )
    def append(self, producers: list[int], batches: list[list[int]], delay_s: int) -> None:
        due_ns = self.turns.time_ns() + delay_s * 10**9 if delay_s else 0
        runs = self.opened_runs(producers)
        for run in runs:
            for sizes in batches if len(run.owed) < 5 else ():
                new = self.batch(run, [{"size": size, "due_ns": due_ns} for size in sizes])
                run.owed.append(new)
                run.seq += len(sizes)
        self.send(*runs)

    @rule(
        producer=PRODUCERS,
        dedup_ids=st.lists(st.sampled_from([None, b"a", b"b", b"c"]), min_size=1, max_size=3),
        inputs=st.lists(st.none() | st.integers(0, 5), min_size=3, max_size=3),
    )
    def append_unique(
        self, producer: int, dedup_ids: list[bytes | None], inputs: list[int | None]
    ) -> None:
        for run in self.opened_runs([producer]):
            for dedup_id, offset in zip(dedup_ids, inputs, strict=False):
                derived = None if offset is None else Derived(ELSEWHERE, offset, 0)
                new = self.batch(run, [{"dedup_id": dedup_id, "derived": derived}])
                run.owed.append(new)
                run.seq += 1
            self.send(run)

    @rule(producer=PRODUCERS)
    def give_up(self, producer: int) -> None:
        """What was refused: its numbers go to what comes next, unless it may be there."""
        run = self.runs.get(producer)
        if run is not None and run.owed:
            if all(each.refused for each in run.owed):
                run.seq = run.owed[0].batch.header.seq
                run.owed.clear()
            else:
                del self.runs[producer]

    @precondition(lambda self: self.groups.letters)
    @rule(producer=PRODUCERS)
    def put_back(self, producer: int) -> None:
        """Dead letters: as often as one likes, and each is there once."""
        for run in self.opened_runs([producer]):
            for offset in sorted(self.groups.letters)[-3:]:
                new = self.batch(run, [{"derived": Derived(PUT_BACK, offset, 0)}])
                run.owed.append(new)
                run.seq += 1
            self.send(run)

    @precondition(lambda self: self.records.place)
    @rule(seed=SEEDS)
    def repeat(self, seed: int) -> None:
        """What has a receipt gets it again, or its run is over."""
        receipts = [each for each in self.records.sent.values() if each.offset is not None]
        if not receipts:
            return
        sent = Random(seed).choice(receipts)
        header = sent.batch.header
        current = self.runs.get(header.producer)
        is_current = current is not None and current.epoch == header.producer_epoch

        def hear(reply: Reply) -> None:
            if isinstance(reply, Appended):
                self.records.receipt(sent, reply)
            else:
                assert isinstance(reply, Refused), reply
                surely = is_current and self.options.durability == "fsync"
                assert self.faulty_step or not surely, reply

        answer = self.asked(hear)
        self.done(partial(self.sidecar.append, STREAM, sent.batch, answer))

    @rule(producer=PRODUCERS, size=st.integers(1, 900), old=st.booleans())
    def append_out_of_turn(self, producer: int, size: int, old: bool) -> None:
        """For which room is made all the same."""
        if old and self.options.durability != "fsync":
            return  # that there is a later run may be lost
        for run in self.opened_runs([producer]):
            other = Run(producer, run.epoch - 1 if old else run.epoch, 0)
            sent = self.batch(other, [{"size": size}], run.seq + (0 if old else 100))

            def hear(reply: Reply, sent: Sent = sent) -> None:
                assert isinstance(reply, Refused), reply
                sent.refusals += reply.code != "unsure"

            sent.tries += 1
            self.done(partial(self.sidecar.append, STREAM, sent.batch, self.asked(hear)))
