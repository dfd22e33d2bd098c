"""The machine of a whole sidecar: producers and consumers of one stream, with any options, in any
order, life after life.

Promises, besides what each of these does, that in the end, on a disk that is well, everything is
delivered and settled; that what may go goes; and that then there is room.

Must not know how any of that is done: it puts together `tests.support.sidecar_producers` and
`sidecar_consumers`, which stand on `sidecar_lives`; what they are held to is in `sidecar_records`
and `sidecar_groups`.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from mesh.durable.waiting import Order
from mesh.options import StreamOptions
from tests.support.sidecar_consumers import ACK_WAIT_S, GROUPS, NODE, Consumers
from tests.support.sidecar_groups import Followed
from tests.support.sidecar_lives import SEEDS
from tests.support.sidecar_producers import PRODUCERS, Producers

OPTIONS = st.builds(
    StreamOptions,
    durability=st.sampled_from(["fsync", "fsync", "interval", "os"]),
    retention=st.sampled_from(["limits", "acked", "acked"]),
    keep_bytes=st.sampled_from([None, None, 1500]),
    keep_s=st.sampled_from([None, None, 20.0]),
    keep_count=st.sampled_from([None, None, 5]),
    bytes_max=st.sampled_from([None, None, None, 1400, 4000]),
    dedup_window_s=st.sampled_from([15.0, 1e6]),
)


class SidecarMachine(Producers, Consumers):
    """See above."""

    @initialize(options=OPTIONS, groups=st.lists(GROUPS, max_size=2, unique=True))
    def begin(self, options: StreamOptions, groups: list[Order]) -> None:
        self.records.options = options
        self.append([1, 2], [[10], [60, 1], [250], [1, 1, 1], [250]], 0)
        for name in groups:
            self.join(name, f"{NODE}-a", 4)

    @rule(producer=PRODUCERS, seed=SEEDS)
    def read_what_is_lost(self, producer: int, seed: int) -> None:
        """With the power, where nothing is synced: any order of rules seldom comes to that."""
        self.append([producer], [[10]], 0)
        before = None
        while before != self.reader != (self.records.end, self.records.log_epoch):
            before = self.reader
            self.read_on(10_000, 0)
        self.end_now(True, seed)
        self.read_on(10_000, 0)

    def teardown(self) -> None:
        try:
            if not self.unfinished:
                self.comes_to_rest()
        finally:
            super().teardown()

    def comes_to_rest(self) -> None:
        """On a disk that is well everything is delivered, and settled; what may go does, and then
        there is room."""
        self.mend_disk()
        self.set_clock(self.set_back_s)
        self.wait(2)
        if self.hosted_now is None:
            return
        for name, group in self.groups.by_name.items():
            self.wait(int(ACK_WAIT_S) + 2)
            for member in list(group.members):
                self.leave(name, member)
            for _ in range(20):
                self.drain(name, group)
                if self.stats().groups[name].committed == self.records.end:
                    break
                self.wait(15)
            assert self.stats().groups[name].committed == self.records.end, "not settled"
        self.wait(25)
        to = self.may_go_to()
        assert to is None or to <= self.records.start, "it may go"
        if self.options.bytes_max and self.options.retention == "acked" and self.groups.by_name:
            self.runs.clear()
            self.append([1], [[500]], 0)
            self.wait(3)
            self.send(self.runs[1])
            assert not self.runs[1].owed, "there is room"
        self.close()

    def drain(self, name: Order, group: Followed) -> None:
        member = f"{NODE}-last"
        self.join(name, member, 1000)
        while True:
            self.fetch(name, member, 0, False)
            who = group.members.get(member)
            if who is None or not who.holding:
                break
            self.say(name, member, "ack", len(who.holding), 0)
