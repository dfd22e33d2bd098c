"""Programs that append to a sidecar under a name or with dedup ids, and send again what they have
no receipt for, and members of its groups. What they ask and are told is accounted for
(`tests.support.account`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from mesh.durable.batch import Batch
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.folders import DEAD
from mesh.durable.hosted import Hosted
from mesh.durable.outcomes import Appended, Opened, Refused
from mesh.durable.protocol import (
    Delivered,
    Fetch,
    Join,
    Joined,
    Open,
    Query,
    Reply,
    Settle,
    Settled,
    read_batch,
)
from mesh.durable.records import Derived, NewRecord, batch_of, columns_of, headers_of, payloads_of
from mesh.durable.scan import Found as FoundBatch
from mesh.durable.sidecar import Sidecar
from mesh.durable.storage import Storage
from mesh.errors import StorageFailed
from mesh.options import StreamOptions
from mesh.sockets import codec
from tests.support.account import (
    Account,
    Asked,
    Found,
    FoundGroup,
    Identity,
    Series,
    Telling,
)
from tests.support.one_thread import Turns
from tests.support.partitions import numbered

STREAM = "work"
OPTIONS = StreamOptions(retention="acked", dedup_window_s=100_000.0)
MEMBER = "0123456789abcdef-m"
GROUPS = {
    "any": AskedOptions(order="any", ack_wait_s=10.0, max_deliver=9),
    "keys": AskedOptions(order="key", ack_wait_s=10.0, max_deliver=2),
}
_SEGMENT_BYTES = 1100
_FIRST_RUN = 1000
"""Producers of what is unique have their number from here on, each run another."""
_SOURCE = 77
_PASSING = frozenset({"full", "storage", "unsure", "missing", "gap"})


def new_account() -> Account:
    return Account(
        {
            "goes on": Series(1),
            "begins anew": Series(2),
            "unique": Series(0, unique=True),
        }
    )


def record(name: str, number: int) -> NewRecord:
    """That of a series, which no other has."""
    payload = codec.pack([name, number, "x" * (60 if number % 5 == 2 else 5)])
    key = None if number % 4 == 3 else b"key %d" % (number % 3)
    if name != "unique":
        return NewRecord(payload, key)
    if number % 2:
        return NewRecord(payload, key, dedup_id=b"id %d" % number)
    return NewRecord(payload, key, derived=Derived(_SOURCE, number, 0))


class Client:
    """All the programs, and the sidecar that they talk to."""

    def __init__(self, tell: Telling, turns: Turns, storage: Storage) -> None:
        """Opens what is there, and looks at it. Raises `OSError`, `StorageFailed`."""
        self.tell = tell
        self.account = tell.account
        self.turns = turns
        self._number = 0
        self._failures: dict[str, int] = {}
        self._held: dict[str, list[int]] = {}
        self.sidecar = Sidecar(storage, segment_bytes=_SEGMENT_BYTES)
        try:
            self._look()
        except BaseException:
            self.sidecar.close()
            raise

    # -- What is there -----------------------------------------------------------------------

    def _look(self) -> None:
        found = Found(self.turns.now_s)
        hosted = self._hosted(STREAM)
        if hosted is not None:
            found.start = hosted.log.start
            found.records = [
                (name, number, each.header.time_ns)
                for each in _batches(hosted)
                for name, number, _ in payloads_of(each.header, each.body)
            ]
            for name, held in hosted._with_members()._groups._groups.items():
                tally = held.group._tally
                settled = {n for n in range(hosted.log.end) if n in tally.settled}
                found.groups[name] = FoundGroup(
                    held.start, tally.committed, settled, dict(tally.deliveries)
                )
        found.letters = list(self._letters())
        self.tell("opened", found)
        self._failures = {name: self._failures_of(name) for name in found.groups}

    @property
    def hosted(self) -> Hosted:
        hosted = self._hosted(STREAM)
        assert hosted is not None
        return hosted

    def _hosted(self, stream: str) -> Hosted | None:
        found = self.sidecar._openings.find(stream)
        if isinstance(found, Refused):
            if found.code == "storage":
                raise StorageFailed(found.text)
            assert found.code == "missing", found.text
            return None
        return found

    def _letters(self) -> Iterator[tuple[str, int]]:
        hosted = self._hosted(f"{STREAM}{DEAD}")
        for each in () if hosted is None else _batches(hosted):
            columns = columns_of(each.header, each.body)
            assert columns.headers is not None
            ((name, number, _),) = payloads_of(each.header, each.body)
            headers = headers_of(columns.headers[0])
            offset = headers["mesh-offset"]
            assert self.account.identity_at(offset) in ((name, number), None)
            yield headers["mesh-group"], offset

    # -- Appends -----------------------------------------------------------------------------

    def begins(self, name: str) -> bool:
        """A run of that program."""
        series = self.account.series[name]
        producer = _FIRST_RUN + self.account.runs if series.unique else series.producer
        self.tell("asks_to_begin", name)
        reply = self._ask(Open(STREAM, producer, OPTIONS))
        if isinstance(reply, Opened):
            self.tell("begins", name, producer, reply.epoch, reply.seq)
            return True
        self._refused(reply)
        return False

    def appends(self, **counts: int) -> None:
        """So many records more of each series, after those that there is no receipt for."""
        batches: list[tuple[str, Asked]] = []
        for name, count in ((name.replace("_", " "), count) for name, count in counts.items()):
            series = self.account.series[name]
            if not series.epoch and not self.begins(name):
                continue
            if count:
                self.tell("attempts", name, series.end, count)
            batches += ((name, each) for each in series.pending)
        self._append(batches)

    def appends_again(self) -> None:
        """What there was no receipt for, and the latest that there was one for."""
        batches: list[tuple[str, Asked]] = []
        for name, series in self.account.series.items():
            if series.epoch and not series.unique:
                batches += ((name, each) for each in (*series.done[-6:], *series.pending))
        self._append(batches)
        series = self.account.series["unique"]
        if series.end and self.begins("unique"):
            for number in sorted(series.there)[-6:]:
                self.tell("attempts", "unique", number, 1)
            self._append([("unique", each) for each in series.pending])

    def _append(self, batches: list[tuple[str, Asked]]) -> None:
        """All at one time."""
        replies: dict[int, Reply] = {}
        for n, (name, each) in enumerate(batches):
            series = self.account.series[name]
            if each in series.pending:
                self.tell("attempts", name, each.first, each.count)
            batch = self._batch(series.producer, series.epoch, name, each)
            self.sidecar.append(STREAM, batch, partial(replies.setdefault, n))
        self.turns.go()
        self.tell.alive()
        for n, (name, each) in enumerate(batches):
            reply = replies[n]
            if isinstance(reply, Appended):
                self.tell("receipt", name, each.first, each.count, reply.offset, reply.time_ns)
            else:
                unsure = self._refused(reply).code == "unsure"
                self.tell("unsure" if unsure else "refused", name, each.first)

    def an_earlier_run_is_fenced(self, name: str) -> None:
        series = self.account.series[name]
        if series.fenced and series.epoch:
            replies: list[Reply] = []
            batch = self._batch(series.producer, series.fenced, name, Asked(series.seq, 0, 1))
            self.sidecar.append(STREAM, batch, replies.append)
            self.turns.go()
            self.tell.alive()
            assert isinstance(replies[0], Refused)
            assert replies[0].code in ("fenced", "storage", "full")

    def _batch(self, producer: int, epoch: int, name: str, asked: Asked) -> Batch:
        numbers = range(asked.first, asked.first + asked.count)
        return numbered(batch_of([record(name, n) for n in numbers]), producer, epoch, asked.seq)

    # -- Groups ------------------------------------------------------------------------------

    def joins(self, group: str, prefetch: int = 8) -> None:
        reply = self._ask(Join(STREAM, group, MEMBER, prefetch, GROUPS[group]))
        if isinstance(reply, Joined):
            self._look_at_journal(group)
            self.tell("joined", group, reply.committed)
        else:
            self._refused(reply)

    def fetches(self, group: str) -> list[int]:
        """What its member gets, which it holds then."""
        self._number += 1
        reply = self._ask(Fetch(STREAM, group, MEMBER, self._number), wait_s=0.01)
        if isinstance(reply, Refused):
            if reply.code == "unknown":
                self.joins(group)
            else:
                self._refused(reply)
            return []
        assert isinstance(reply, Delivered), reply
        self._look_at_journal(group)
        records: dict[int, Identity] = {}
        for data in reply.delivery.batches:
            header, body = read_batch(memoryview(data), self.sidecar.number)
            for n, (name, number, _) in enumerate(payloads_of(header, body)):
                records[header.offset + n] = name, number
        got: list[int] = []
        for first, end, deliveries in reply.delivery.grants:
            self.tell("delivered", group, first, end, deliveries)
            got += range(first, end)
        for offset in got:
            known = self.account.identity_at(offset)
            assert known in (records[offset], None), f"{known} was to be at {offset}"
        held = self._held.setdefault(group, [])
        held += got
        return got

    def settles(
        self,
        group: str,
        *,
        acks: list[int] | None = None,
        naks: list[int] | None = None,
        rejects: list[int] | None = None,
    ) -> None:
        """By default it acknowledges all that it holds otherwise."""
        held = self._held.get(group, [])
        others = {*(naks or ()), *(rejects or ())}
        acks = [offset for offset in held if offset not in others] if acks is None else acks
        self._held[group] = [each for each in held if each not in others and each not in acks]
        if (not acks and not others) or group not in self.account.groups:
            return
        self.tell("says", group, acks)
        said = Settlements(
            acks=tuple((offset, offset + 1) for offset in acks),
            naks=tuple((offset, 0.5) for offset in naks or ()),
            rejects=tuple((offset, "cannot be") for offset in rejects or ()),
        )
        reply = self._ask(Settle(STREAM, group, MEMBER, self.hosted.log.log_epoch, said))
        assert isinstance(reply, Settled), reply
        self._look_at_journal(group)
        self.tell("settled", group, acks, reply.committed)

    def acks_late(self, group: str) -> None:
        """Some of what it was given before the sidecar was opened."""
        told = self.account.groups.get(group)
        if told is not None:
            held = sorted(told.delivered.keys() - told.settled)
            self.settles(group, acks=held[::2])

    def ticks(self) -> None:
        """A second passes: journals are synced, and what all groups have settled may go."""
        self.turns.tick()
        for group in self.account.groups:
            failed = self._failures_of(group) > self._failures.get(group, 0)
            self._look_at_journal(group)
            if not failed:
                committed = self.hosted._with_members()._groups.committed(group)
                self.tell("synced", group, committed)

    def _look_at_journal(self, group: str) -> None:
        """Whether it failed meanwhile."""
        failures = self._failures_of(group)
        if failures > self._failures.get(group, 0):
            self.tell("journal_failed", group)
        self._failures[group] = failures

    def _failures_of(self, group: str) -> int:
        stats = self.hosted._with_members()._groups.stats()[group]
        return stats.counters.get("journal failed", 0)

    def waits(self, seconds: float) -> None:
        self.turns.wait(seconds)

    # -- What that takes ---------------------------------------------------------------------

    def _ask(self, query: Query, wait_s: float = 0.0) -> Reply:
        replies: list[Reply] = []
        self.sidecar.ask(query, replies.append)
        self.turns.go()
        self.tell.alive()
        if wait_s and not replies:
            self.turns.wait(wait_s)
            self.tell.alive()
        (reply,) = replies
        return reply

    def _refused(self, reply: Reply) -> Refused:
        assert isinstance(reply, Refused), reply
        assert reply.code in _PASSING, reply
        return reply


def _batches(hosted: Hosted) -> Iterator[FoundBatch]:
    """Those with records, all there are."""
    with contextlib.closing(Cursor(hosted.log, hosted.log.start)) as cursor:
        while found := cursor.read(1 << 20):
            assert not isinstance(found, Gap | Cut), found
            yield from (each for each in found if each.header.count)
