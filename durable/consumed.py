"""A record as a consumer has it: what may be said of it, which its seat passes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh import limits
from mesh.durable.reading import Record
from mesh.errors import InvalidOption
from mesh.options import check_seconds

if TYPE_CHECKING:
    from mesh.durable.seat import Seat
else:
    Seat = object  # its module needs this one; help() reads the annotations of a record


class ConsumedRecord(Record, frozen=True, gc=False):
    """A record that a consumer has, until it says what became of it."""

    deliveries: int
    """How often it was delivered, this time included."""
    _seat: Seat
    _heard: int
    """Number of what its sidecar had heard last when it sent this."""

    @property
    def position(self) -> tuple[str, int]:
        """Its partition and offset: what to keep beside its effect, for `Consumer.resume_from`."""
        return self.partition, self.offset

    @property
    def group(self) -> str:
        """The name of the group that it was delivered to."""
        return self._seat.group

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, deliveries={self.deliveries})"

    def ack(self) -> None:
        """It is done. Does not block, and is told soon, at the latest as the consumer is closed:
        see `Consumer.flush`. After that nothing is told any more: the record goes to another."""
        self._seat.ack(self._source.offset + self._index, self._source.log_epoch)

    def nak(self, *, delay: float = 0.0) -> None:
        """It could not be done: deliver it again, to whoever has room, but not within `delay`
        seconds, a day at most. In a group with an order, what is behind it in that goes with it.
        Raises `InvalidOption`. Does not block."""
        self._seat.nak(self, check_seconds(delay, "delay", limits.NAK_DELAY_S_MAX))

    def extend(self) -> None:
        """It takes longer: the group's ``ack_wait`` begins anew. Does not block."""
        self._seat.extend(self._source.offset + self._index)

    def reject(self, reason: str = "") -> None:
        """It can never be done: it becomes a dead letter, which has `reason` in its headers. Raises
        `InvalidOption`. Does not block."""
        if not isinstance(reason, str):
            raise InvalidOption(f"reason must be str, not {reason!r}")
        self._seat.reject(self._source.offset + self._index, self._source.log_epoch, reason)
