"""What was asked of a sidecar with groups and what it said, across its ends; and whether what its
next opening finds can be what that has left:

- what it gave a receipt for is there, where and as of when the receipt says, and no record is there
  twice, however often it was sent; what it refused is not there;
- what is settled was acknowledged by a member, or is a dead letter, which is there once;
- what it confirmed to be settled is, and committed positions have not gone back: after a kill all
  that was written, after a power loss all that was synced;
- how often a record was delivered is not forgotten by a kill;
- what retention took, each group has settled on disk.

An account can be told to another process (`Telling`), and written to a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

End = Literal["kill", "power"]
Identity = tuple[str, int]
"""A record: its series, and which of that it is."""
Receipt = tuple[int, int]
"""Offset and time."""


class Asked(msgspec.Struct):
    """A batch of a series that is to be appended."""

    seq: int
    first: int
    count: int
    refused: bool = False
    unsure: bool = False
    """Whether an attempt may have been written that was not acknowledged."""


class Series(msgspec.Struct):
    """Records that one program appends, under one name or, being unique, under many."""

    producer: int
    unique: bool = False
    epoch: int = 0
    """0: its producer has to be opened."""
    fenced: int = 0
    """An earlier one."""
    seq: int = 0
    """Of the next record."""
    end: int = 0
    """The next record."""
    pending: list[Asked] = []
    """What there was no receipt for."""
    done: list[Asked] = []
    """The latest others."""
    there: dict[int, Receipt] = {}
    """Of those that are known to be in the log, or to have been."""


class FoundGroup(msgspec.Struct):
    """What a group remembers before anybody has joined it."""

    start: int
    committed: int
    settled: set[int]
    deliveries: dict[int, int]


class Found(msgspec.Struct):
    """What an opening finds."""

    now_s: float
    start: int = 0
    records: list[tuple[str, int, int]] = []
    """Series, number and time of each, from `start` on."""
    groups: dict[str, FoundGroup] = {}
    letters: list[tuple[str, int]] = []
    """Of each dead letter its group and offset."""


class GroupAccount(msgspec.Struct):
    """What the members of a group did and were told."""

    said: set[int] = set()
    """What members acknowledged, whatever became of that."""
    settled: set[int] = set()
    """What was confirmed. All of it is `written`, and what was synced is `synced`, unless the
    journal failed."""
    written: set[int] = set()
    synced: set[int] = set()
    committed: int = 0
    committed_synced: int = 0
    failed: bool = False
    """The journal, and it may not have been begun anew since."""
    delivered: dict[int, int] = {}
    """How often, as the members were told."""


class Account(msgspec.Struct):
    """See above."""

    series: dict[str, Series]
    groups: dict[str, GroupAccount] = {}
    """Those that are there for sure."""
    now_s: float = 1_000.0
    ended: End = "kill"
    """How the opening ended that this is about."""
    runs: int = 0
    letters: int = 0
    """Dead letters that are known to be there."""

    # -- Appends -----------------------------------------------------------------------------

    def asks_to_begin(self, name: str) -> None:
        """Its earlier run ends with that, whether or not it is told."""
        series = self.series[name]
        if series.epoch and not series.unique:
            series.fenced = series.epoch
        series.epoch = 0

    def begins(self, name: str, producer: int, epoch: int, seq: int) -> None:
        """A run of a producer, which goes on at `seq`."""
        series = self.series[name]
        if not series.unique:
            known = max(series.there, default=-1) + 1
            assert known <= seq <= series.end, (known, seq, series.end)
            assert epoch > series.fenced
            landed = [each for each in series.pending if each.first < seq]
            assert not any(each.refused and not each.unsure for each in landed), "it was refused"
            series.end = seq
            series.pending, series.done = [], []
        series.producer, series.epoch, series.seq = producer, epoch, seq
        self.runs += 1
        if series.unique:
            for each in series.pending:
                each.seq, series.seq = series.seq, series.seq + 1
            series.done.clear()

    def attempts(self, name: str, first: int, count: int) -> None:
        """For the first time, or again."""
        series = self.series[name]
        for each in series.pending:
            if each.first == first:
                each.refused = False
                return
        series.pending.append(Asked(series.seq, first, count))
        series.seq += count
        series.end = max(series.end, first + count)

    def refused(self, name: str, first: int) -> None:
        for each in self.series[name].pending:
            if each.first == first:
                each.refused = True

    def unsure(self, name: str, first: int) -> None:
        """Neither: until the log is opened again."""
        for each in self.series[name].pending:
            if each.first == first:
                each.unsure = True

    def receipt(self, name: str, first: int, count: int, offset: int, time_ns: int) -> None:
        series = self.series[name]
        for n in range(count):
            receipt = (offset + n, time_ns)
            assert series.there.setdefault(first + n, receipt) == receipt, "another receipt"
        for each in series.pending:
            if each.first == first:
                series.pending.remove(each)
                series.done = [*series.done[-9:], each]
                break

    def identity_at(self, offset: int) -> Identity | None:
        for name, series in self.series.items():
            for number, (at, _) in series.there.items():
                if at == offset:
                    return name, number
        return None

    # -- Groups ------------------------------------------------------------------------------

    def joined(self, group: str, committed: int) -> None:
        self._committed(self.groups.setdefault(group, GroupAccount()), committed)

    def delivered(self, group: str, first: int, end: int, deliveries: int) -> None:
        told = self.groups[group]
        for offset in range(first, end):
            assert offset not in told.settled, "again, after it was done"
            told.delivered[offset] = deliveries

    def says(self, group: str, offsets: list[int]) -> None:
        self.groups[group].said.update(offsets)

    def journal_failed(self, group: str) -> None:
        told = self.groups[group]
        told.failed = True
        told.written = set(told.synced)

    def settled(self, group: str, offsets: list[int], committed: int) -> None:
        told = self.groups[group]
        told.settled.update(offsets)
        if not told.failed:
            told.written = set(told.settled)
        self._committed(told, committed)

    def synced(self, group: str, committed: int) -> None:
        told = self.groups[group]
        told.failed = False
        told.written, told.synced = set(told.settled), set(told.settled)
        self._committed(told, committed)
        told.committed_synced = committed

    def _committed(self, told: GroupAccount, committed: int) -> None:
        assert committed >= told.committed, "what is committed went back"
        told.committed = committed

    def closes(self) -> None:
        """All is on disk."""
        for name, told in self.groups.items():
            if not told.failed:
                self.synced(name, told.committed)

    # -- The next opening --------------------------------------------------------------------

    def ends(self, how: End) -> None:
        self.ended = how

    def opened(self, found: Found) -> None:
        """That is what there is now, and has to be there from here on."""
        self.now_s = found.now_s
        self._holds_records(found)
        for name in self.groups.keys() | found.groups.keys():
            assert name in found.groups, f"group {name!r} is gone"
            self._holds_group(name, found)
        assert len(set(found.letters)) == len(found.letters), "a dead letter twice"
        assert len(found.letters) >= self.letters, "a dead letter is gone"
        self.letters = len(found.letters)
        self.ended = "kill"

    def _holds_records(self, found: Found) -> None:
        at: dict[Identity, Receipt] = {}
        for n, (name, number, time_ns) in enumerate(found.records):
            assert (name, number) not in at, f"{name} {number} is there twice"
            at[name, number] = found.start + n, time_ns
        for name, series in self.series.items():
            for number, receipt in series.there.items():
                if receipt[0] >= found.start:
                    has = at.get((name, number))
                    assert has == receipt, f"{name} {number}: {receipt} was said, {has} is there"
                else:
                    assert (name, number) not in at, f"{name} {number} is there a second time"
            for each in series.pending:
                if each.refused and not each.unsure and each.first not in series.there:
                    assert (name, each.first) not in at, f"{name} {each.first} was refused"
                each.unsure = False
        for (name, number), receipt in at.items():
            series = self.series[name]
            assert number < series.end, f"nobody appended {name} {number}"
            series.there[number] = receipt

    def _holds_group(self, name: str, found: Found) -> None:
        has, told = found.groups[name], self.groups.setdefault(name, GroupAccount())
        if self.ended == "kill" and not told.failed:
            must, committed = told.written, told.committed
            for offset, deliveries in told.delivered.items():
                if offset not in has.settled:
                    assert has.deliveries.get(offset, 0) >= deliveries, "deliveries are forgotten"
        else:
            must, committed = told.synced, told.committed_synced
        assert must <= has.settled, f"group {name!r} forgot {must - has.settled}"
        assert committed <= has.committed, f"group {name!r} went back"
        assert found.start <= has.committed, f"group {name!r} has not settled what is gone"
        buried = {offset for group, offset in found.letters if group == name}
        invented = {each for each in has.settled - told.said - buried if each >= has.start}
        assert not invented, f"nobody settled {invented} in group {name!r}"
        told.settled, told.written, told.synced = (set(has.settled) for _ in range(3))
        told.committed = told.committed_synced = has.committed
        told.delivered, told.failed = dict(has.deliveries), False


_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


class Ended(Exception):
    """Whoever tells is not there any more."""


class Telling:
    """An account that another process hears of, whatever becomes of this one."""

    def __init__(self, account: Account, fd: int | None = None) -> None:
        self.account = account
        self.ended = False
        """Whether what happens from here on counts for nothing."""
        self._fd = fd

    def alive(self) -> None:
        if self.ended:
            raise Ended

    def __call__(self, word: str, *arguments: Any) -> None:
        self.alive()
        if self._fd is not None:
            os.write(self._fd, _encode((word, arguments)).hex().encode() + b"\n")
        getattr(self.account, word)(*arguments)


def heard(account: Account, lines: Iterable[str]) -> int:
    """What a process told; returns how much it was."""
    count = 0
    for line in lines:
        if line.endswith("\n"):  # else it was killed while it spoke
            word, arguments = _decode(bytes.fromhex(line))
            if word == "opened":
                arguments = [msgspec.convert(arguments[0], Found)]
            getattr(account, word)(*arguments)
            count += 1
    return count


def copy_of(account: Account) -> Account:
    return decode_account(encode_account(account))


def encode_account(account: Account) -> bytes:
    return _encode(account)


def decode_account(data: bytes) -> Account:
    return _decode(data, type=Account)
