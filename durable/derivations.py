"""Derived appends: which inputs have been turned into records of this partition already. No I/O.

Who consumes one stream and appends to another may name, with each append, the position it was
derived from: a source (one number for a stream, partition and group), the input's offset there, and
which output of that input it is, from 0. An input that is delivered again, a second or a year
later, is then not turned into a second record.

Inputs are handled nearly in order, so what has been derived is a few intervals of offsets, kept for
each output number by itself, as ascending bounds::

    derived   0 1 2   4 5 6 7       ─▶   bounds   0  3  4  8       offset is in: an odd number of
              ─────   ───────                                      bounds is at or below it

Inputs without an output leave holes, which are exact, too. Of each output at least
`limits.DERIVED_INTERVALS_KEPT` intervals are kept: as many as a group's window can have, so that
whatever a group still holds is known. Beyond `limits.DERIVED_INTERVALS_EACH` the lowest are
forgotten and a floor rises to their end: what is derived from below the floor may be there or not,
and is called `TooOld`, never new and never a repeat. Where sources are too many, or all their
intervals, the source idle longest is forgotten as a whole, which is counted: its next append is
taken for its first.

Only the latest outputs are remembered with their offset and time: of an older one it is known that
it is there, not where.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

import msgspec

from mesh import limits
from mesh.durable.dedup_ids import Original
from mesh.errors import InvalidOption

OFFSET_END: Final = 1 << 63
"""Below that is every offset."""


class DerivedSomewhere(msgspec.Struct, frozen=True):
    """It is there, though nobody remembers where: its output is not among the latest."""


class TooOld(msgspec.Struct, frozen=True):
    """Whether it is there is not known: the input is below the floor of what is remembered."""

    offset: int
    floor: int

    def __str__(self) -> str:
        return (
            f"derived from offset {self.offset:,}, below {self.floor:,}: "
            "what was derived from there is forgotten"
        )


class DerivedOutputs(msgspec.Struct, frozen=True, array_like=True):
    """Of which inputs one output was derived, as written in a snapshot."""

    source: int
    output: int
    floor: int
    bounds: list[int]


class LatestOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A derived record and where it is, as remembered and as written in a snapshot."""

    source: int
    output: int
    input_offset: int
    offset: int
    time_ns: int


class Inputs:
    """The offsets that one output of one source was derived from."""

    __slots__ = ("bounds", "floor")

    def __init__(self, floor: int = 0, bounds: Iterable[int] = ()) -> None:
        self.floor = floor
        """Of what is below nothing is known."""
        self.bounds = array("Q", bounds)

    def __contains__(self, offset: int) -> bool:
        return bisect_right(self.bounds, offset) & 1 == 1

    @property
    def intervals(self) -> int:
        return len(self.bounds) >> 1

    def add(self, offset: int) -> None:
        bounds = self.bounds
        at = bisect_right(bounds, offset)
        if at & 1 or offset < self.floor:
            return
        follows = at > 0 and bounds[at - 1] == offset
        precedes = at < len(bounds) and bounds[at] == offset + 1
        if follows and precedes:
            del bounds[at - 1 : at + 1]
        elif follows:
            bounds[at - 1] = offset + 1
        elif precedes:
            bounds[at] = offset
        else:
            bounds[at:at] = array("Q", (offset, offset + 1))

    def forget_lowest(self, count: int) -> None:
        self.floor = self.bounds[2 * count - 1]
        del self.bounds[: 2 * count]


class Derivations:
    """All that was derived into one partition. `forgotten` counts what the bounds cost."""

    def __init__(self, forgotten: Counter[str]) -> None:
        self._forgotten = forgotten
        self._inputs: OrderedDict[tuple[int, int], Inputs] = OrderedDict()
        """By source and output; the one idle longest comes first."""
        self._intervals = 0
        """Of all together."""
        self._latest: OrderedDict[tuple[int, int, int], LatestOutput] = OrderedDict()

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def intervals(self) -> int:
        """How many are remembered, of all sources together."""
        return self._intervals

    def seen(
        self, source: int, offset: int, output: int = 0
    ) -> Original | DerivedSomewhere | TooOld | None:
        """What became of that output of the input at `offset` of `source`; None: it is new.

        Raises `InvalidOption` for a position that cannot be one.
        """
        _check(offset, output)
        inputs = self._inputs.get((source, output))
        if inputs is None:
            return None
        if offset < inputs.floor:
            return TooOld(offset, inputs.floor)
        if offset not in inputs:
            return None
        latest = self._latest.get((source, output, offset))
        return DerivedSomewhere() if latest is None else Original(latest.offset, latest.time_ns)

    def add(self, source: int, offset: int, output: int, at_offset: int, time_ns: int) -> None:
        """The record at `at_offset` of this partition, in a batch of that time, is that output of
        that input."""
        _check(offset, output)
        key = source, output
        inputs = self._inputs.get(key)
        if inputs is None:
            inputs = self._inputs[key] = Inputs()
        else:
            self._inputs.move_to_end(key)
        before = inputs.intervals
        inputs.add(offset)
        self._intervals += inputs.intervals - before
        self._bound(inputs)
        self._remember(LatestOutput(source, output, offset, at_offset, time_ns))

    def outputs(self) -> list[DerivedOutputs]:
        """For a snapshot, the one idle longest first."""
        return [
            DerivedOutputs(source, output, inputs.floor, inputs.bounds.tolist())
            for (source, output), inputs in self._inputs.items()
        ]

    def latest(self) -> list[LatestOutput]:
        """For a snapshot, oldest first."""
        return list(self._latest.values())

    def restore(self, outputs: Iterable[DerivedOutputs], latest: Iterable[LatestOutput]) -> None:
        """Take over what a snapshot remembered."""
        for row in outputs:
            inputs = self._inputs[row.source, row.output] = Inputs(row.floor, row.bounds)
            self._intervals += inputs.intervals
            self._bound(inputs)
        self._latest.update(((one.source, one.output, one.input_offset), one) for one in latest)
        self._bound_latest()

    def _bound(self, inputs: Inputs) -> None:
        if inputs.intervals > limits.DERIVED_INTERVALS_EACH:
            # Several at once: each time, all that stay are moved in memory.
            count = inputs.intervals - limits.DERIVED_INTERVALS_KEPT
            inputs.forget_lowest(count)
            self._intervals -= count
            self._forgotten["derived interval"] += count
        while (
            len(self._inputs) > limits.DERIVED_SOURCES_MAX
            or self._intervals > limits.DERIVED_INTERVALS_MAX
        ):
            _, idle = self._inputs.popitem(last=False)
            self._intervals -= idle.intervals
            self._forgotten["derived source"] += 1

    def _remember(self, one: LatestOutput) -> None:
        key = one.source, one.output, one.input_offset
        self._latest[key] = one
        self._latest.move_to_end(key)
        self._bound_latest()

    def _bound_latest(self) -> None:
        while len(self._latest) > limits.DERIVED_LATEST_MAX:
            self._latest.popitem(last=False)


def source_number(stream: str, partition: int, log_epoch: int, group: str) -> int:
    """Of what a stream's partition has of one log epoch, as a group reads it: what outputs are
    derived from. A record that took the offset of one that was cut off is another input."""
    digest = blake2b(digest_size=8, person=b"derived")
    for part in (stream, f"{partition:016x}:{log_epoch}", group):
        digest.update(len(part.encode()).to_bytes(4, "little") + part.encode())
    return int.from_bytes(digest.digest(), "little") & ((1 << 63) - 1)


def _check(offset: int, output: int) -> None:
    if not 0 <= offset < OFFSET_END:
        raise InvalidOption(f"derived from offset {offset:,}, which no record can have")
    if not 0 <= output < limits.DERIVED_OUTPUTS_MAX:
        raise InvalidOption(
            f"output {output:,} of one input is over the limit of {limits.DERIVED_OUTPUTS_MAX:,}"
        )
