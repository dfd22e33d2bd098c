"""Consumers of a stream, as rules for `tests.support.sidecar_machine`: members of groups that get
records, have done with some of them, in time or late, and leave; and a reader that keeps its place
across all that happens.

Promises that what is delivered is what is in the log, not too often, and not again after it was
done; that what is read is, too, and in order; and that both are told what is missing, which only
retention took, or an end without fsync.

Must not know how the sidecar ends, nor who appends.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Literal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.outcomes import Refused
from mesh.durable.protocol import (
    Batches,
    Delivered,
    Fetch,
    Join,
    Joined,
    Read,
    Reply,
    Settle,
    Settled,
    read_batch,
)
from mesh.durable.records import payloads_of
from mesh.durable.waiting import Order
from tests.support.sidecar_groups import MAX_DELIVER, ORDERS, Followed, Member
from tests.support.sidecar_lives import SEEDS, STREAM, Lives

NODE = "0123456789abcdef"
ACK_WAIT_S = 10.0
GROUPS = st.sampled_from(ORDERS)
MEMBERS = st.sampled_from([f"{NODE}-a", f"{NODE}-b"])
How = Literal["ack", "nak", "reject", "extend", "leave"]
HOWS: st.SearchStrategy[How] = st.sampled_from(
    ["ack", "ack", "ack", "ack", "nak", "reject", "extend"]
)


class Consumers(Lives):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = 0, 0
        """Next offset, log epoch."""

    # -- What members get --------------------------------------------------------------------

    @rule(name=GROUPS, member=MEMBERS, prefetch=st.integers(1, 8))
    def join(self, name: Order, member: str, prefetch: int) -> None:
        options = AskedOptions(order=name, ack_wait_s=ACK_WAIT_S, max_deliver=MAX_DELIVER)

        def hear(reply: Reply) -> None:
            if isinstance(reply, Refused):
                assert self.faulty_step or not self.made, reply
                return
            assert isinstance(reply, Joined), reply
            members = self.groups.by_name[name].members
            known = members.get(member)
            new = members[member] = Member(reply.log_epoch)
            if known is not None:
                new.number = known.number
                new.holding = known.holding if known.log_epoch == reply.log_epoch else []

        self.ask(Join(STREAM, name, member, prefetch, options), hear)

    @rule(name=GROUPS, member=MEMBERS, wait_s=st.sampled_from([0, 0, 3, 30]), again=st.booleans())
    def fetch(self, name: Order, member: str, wait_s: int, again: bool) -> None:
        """`again`: the answer to the last one was lost."""
        group = self.groups.by_name.get(name)
        if group is None or member not in group.members:
            self.join(name, member, 4)
            group = self.groups.by_name.get(name)
        if group is None or (who := group.members.get(member)) is None:
            return
        if not again or not who.number:
            who.number += 1
        self.ask(
            Fetch(STREAM, name, member, who.number, wait_s * 1000),
            partial(self.delivered, group, member, again),
            wait_s,
        )

    def delivered(self, group: Followed, member: str, again: bool, reply: Reply) -> None:
        if isinstance(reply, Refused):
            assert reply.code in ("unknown", "closed") or self.faulty_step, reply
            group.members.pop(member, None)
            return
        assert isinstance(reply, Delivered), reply
        shown, payloads = self.records.shown, {}
        for data in reply.delivery.batches:
            header, body = read_batch(memoryview(data), self.sidecar.number)
            for n, payload in enumerate(payloads_of(header, body)):
                payloads[header.offset + n] = payload[0]
        who = group.members.get(member)
        for first, end, deliveries in reply.delivery.grants:
            assert deliveries <= MAX_DELIVER, "too often"
            for offset in range(first, end):
                if self.options.durability == "fsync":
                    assert payloads[offset] == shown[offset], "another is there"
                    assert again or offset not in group.settled, "it was done"
                if who is not None and shown.get(offset) == payloads[offset]:
                    who.holding.append(offset)
        for _, last, _ in reply.gaps:
            assert last < self.records.gone, "taken too soon"
            may_go = self.options.retention != "acked" or self.records.has_limits
            assert may_go, "taken too soon"

    # -- What they say -----------------------------------------------------------------------

    @rule(
        names=st.lists(GROUPS, min_size=1, max_size=3),
        member=MEMBERS,
        how=HOWS,
        count=st.integers(1, 6),
        seed=SEEDS,
    )
    def work(self, names: list[Order], member: str, how: How, count: int, seed: int) -> None:
        """A member gets something, and has done with some of that."""
        for name in names:
            self.fetch(name, member, 0, again=False)
            self.say(name, member, how, count, seed)

    @precondition(lambda self: self.holders())
    @rule(how=HOWS, count=st.integers(1, 6), seed=SEEDS)
    def settle(self, how: How, count: int, seed: int) -> None:
        """However late."""
        name, member = Random(seed).choice(self.holders())
        self.say(name, member, how, count, seed)

    @rule(name=GROUPS, member=MEMBERS)
    def leave(self, name: Order, member: str) -> None:
        self.say(name, member, "leave", 0, 0)

    def holders(self) -> list[tuple[Order, str]]:
        return [
            (name, member)
            for name, group in self.groups.by_name.items()
            for member, who in group.members.items()
            if who.holding
        ]

    def say(self, name: Order, member: str, how: How, count: int, seed: int) -> None:
        """Of so many records that it got, in any order."""
        group = self.groups.by_name.get(name)
        who = None if group is None else group.members.get(member)
        if group is None or who is None or not (who.holding or how == "leave"):
            return
        offsets = Random(seed).sample(sorted(set(who.holding)), min(count, len(set(who.holding))))
        said = {
            "ack": Settlements(acks=tuple((each, each + 1) for each in offsets)),
            "nak": Settlements(naks=tuple((each, seed % 3 * 2.0) for each in offsets)),
            "reject": Settlements(rejects=tuple((each, "bad") for each in offsets)),
            "extend": Settlements(extends=tuple(offsets)),
            "leave": Settlements(),
        }[how]
        who.holding = [o for o in who.holding if how == "extend" or o not in offsets]
        if how == "ack":
            group.said.update(offsets)
        elif how == "reject":
            group.rejected.update(offsets)
        elif how == "leave":
            del group.members[member]

        def hear(reply: Reply) -> None:
            if isinstance(reply, Refused):
                assert self.faulty_step, reply
                return
            assert isinstance(reply, Settled), reply
            epoch = self.records.log_epoch
            counts = self.options.durability == "fsync" or who.log_epoch == epoch
            if how == "ack" and counts:
                group.confirmed({each for each in offsets if each in self.records.shown})

        self.ask(Settle(STREAM, name, member, who.log_epoch, said, how == "leave"), hear)

    # -- The reader --------------------------------------------------------------------------

    @rule(bytes_max=st.sampled_from([1, 300, 10_000]), wait_s=st.sampled_from([0, 3, 30]))
    def read_on(self, bytes_max: int, wait_s: int) -> None:
        """From a place that is kept across all that happens."""
        offset, log_epoch = self.reader
        query = Read(STREAM, offset, bytes_max, wait_s * 1000, log_epoch)
        self.ask(query, partial(self.read, self.reader), wait_s)

    def read(self, reader: tuple[int, int], reply: Reply) -> None:
        if isinstance(reply, Refused):
            assert reply.code == "closed" or self.faulty_step or not self.made, reply
            return
        assert isinstance(reply, Batches), reply
        if reader != self.reader or not self.made:
            return
        offset = reader[0]
        if reply.cut_at is not None:
            assert self.options.durability != "fsync"
            assert reply.cut_at < offset
            offset = reply.cut_at
        else:
            now = reply.log_epoch or self.records.log_epoch
            is_cut = reader[1] and self.records.is_cut(offset, reader[1], now)
            assert not is_cut, "it was not told what was lost"
        if reply.gap_end:
            assert offset < reply.gap_end <= self.records.gone
            offset = reply.gap_end
        for data in reply.batches:
            header, body = read_batch(memoryview(data), self.sidecar.number)
            assert header.offset <= offset < header.end, "a hole"
            if reply.log_epoch == self.records.log_epoch:
                for n, payload in enumerate(payloads_of(header, body)):
                    assert self.records.shown[header.offset + n] == payload[0], "another"
            offset = header.end
        self.reader = offset, reply.log_epoch
