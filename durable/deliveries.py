"""What members of a group ask, get and say. No I/O."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from mesh import limits
from mesh.durable.group import GroupOptions
from mesh.durable.waiting import Order

T = TypeVar("T")
Some = Annotated[tuple[T, ...], msgspec.Meta(max_length=limits.SETTLED_MAX)]
"""Looked at before the first item is decoded."""


class Settlements(msgspec.Struct, frozen=True, array_like=True):
    """What a member says of the records that it was given."""

    acks: Some[tuple[int, int]] = ()
    """Ranges: first, and the end, which is not included."""
    naks: Some[tuple[int, float]] = ()
    """Offset, and seconds before it may be delivered again."""
    extends: Some[int] = ()
    rejects: Some[tuple[int, str]] = ()
    unseen: Some[tuple[int, int]] = ()
    """Ranges of what nobody was shown, from who leaves."""

    def below(self, end: int) -> Settlements:
        """What of it is said of offsets below that."""
        return Settlements(
            tuple((first, min(last, end)) for first, last in self.acks if first < end),
            tuple(each for each in self.naks if each[0] < end),
            tuple(each for each in self.extends if each < end),
            tuple(each for each in self.rejects if each[0] < end),
            tuple((first, min(last, end)) for first, last in self.unseen if first < end),
        )


class AskedOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a consumer asks of its group. None: whatever the group has, or else its default."""

    order: Order | None = None
    ack_wait_s: float | None = None
    max_deliver: int | None = None

    def all(self) -> GroupOptions:
        """Those of a new group. Raises `InvalidOption`."""
        given = {
            name: value for name, value in msgspec.structs.asdict(self).items() if value is not None
        }
        return GroupOptions(**given)

    def differ_from(self, has: GroupOptions) -> str:
        """What is not as asked for; empty if all is."""
        return "; ".join(
            f"{name.removesuffix('_s')}={getattr(has, name)!r}, not {value!r}"
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None and value != getattr(has, name)
        )


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """What a member gets at one time."""

    grants: tuple[tuple[int, int, int], ...]
    """First, end, and how often each of these was delivered, this time included."""
    batches: tuple[bytes, ...]
    """As they stand in the log; between them they have all that is granted."""
