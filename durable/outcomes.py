"""What becomes of an append, or of any other question to a sidecar that it refuses; and the error
that a refusal is to users. Both sides know these: they are sent as they stand here. No I/O.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from mesh.errors import (
    InvalidOption,
    LogDamaged,
    LogFormat,
    LogFull,
    MeshError,
    OptionsDiffer,
    OutcomeUnknown,
    PayloadTooLarge,
    ProducerFenced,
    SequenceGap,
    StorageFailed,
)
from mesh.options import Durability

OFFSET_UNKNOWN: Final = (1 << 64) - 1
"""Of a record that is in the log, where nobody remembers any more at which offset."""


class Appended(msgspec.Struct, frozen=True, array_like=True, tag="r", gc=False):
    """A batch is in the log, or was already."""

    offset: int
    """Of its first record; `OFFSET_UNKNOWN` if that is not remembered."""
    count: int
    time_ns: int
    repeated: bool = False


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """A producer's run may write under `epoch`, from `seq` on."""

    epoch: int
    seq: int
    durability: Durability = "fsync"


Code = Literal[
    "full",  # no room now: in the log, on the disk, or in a table with a bound
    "large",  # more than the log may ever have
    "storage",  # the disk failed; it may work again
    "unsure",  # it failed, and then failed to cut that off: it may be there when the log is opened
    "damaged",  # what had been on disk does not read
    "closed",  # the sidecar ends
    "missing",  # there is no such stream here
    "differs",  # the stream or group has other options
    "malformed",
    "fenced",  # a later run of this producer has begun
    "unknown",  # the producer, the group or its member is not known here: open or join again
    "gap",  # out of its producer's order; `Refused.seq` would be next
    "over",  # what was asked for is larger than who asks lets in
    "old",  # derived from a record so old that what was derived from it is forgotten
]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """A batch was not written, and will not be (but for ``unsure``); or what else was asked for was
    not done."""

    code: Code
    text: str
    seq: int = 0
    """What its producer's next is, where that is the matter."""


CLOSED: Final = Refused("closed", "the sidecar is closed")
Outcome = Appended | Opened | Refused

_ERRORS: Final[dict[str, type[MeshError]]] = {
    "full": LogFull,
    "large": LogFull,
    "storage": StorageFailed,
    "unsure": OutcomeUnknown,
    "damaged": StorageFailed,
    "closed": StorageFailed,
    "missing": StorageFailed,
    "differs": OptionsDiffer,
    "malformed": InvalidOption,
    "fenced": ProducerFenced,
    "unknown": OutcomeUnknown,
    "gap": SequenceGap,
    "over": PayloadTooLarge,
    "old": OutcomeUnknown,
}

# Refusals that may pass, by who tries again after them. Any other is an error at once.
JOINS_AGAIN: Final[frozenset[Code]] = frozenset({"closed", "missing", "storage", "unknown"})
"""A consumer, which joins again. It goes on with its other partitions meanwhile, so it can wait for
all that may pass."""
TOLD_MEANWHILE: Final[frozenset[Code]] = frozenset({"storage"})
"""Those of `JOINS_AGAIN` of which a consumer says why it waits: a disk may need somebody, the
others pass by themselves."""
OPENS_AGAIN: Final[frozenset[Code]] = frozenset({"full", "storage", "unsure", "closed"})
"""A producer, with its next append; what was under way has failed. Not ``missing``: opening makes
the stream."""
BEGINS_AGAIN: Final[frozenset[Code]] = frozenset({"closed", "missing"})
"""A replay that follows, at a partition that it has yet to begin: its sidecar may be about to make
the stream. Not ``storage``: who reads is told that the disk fails."""
FOLLOWS_AGAIN: Final[frozenset[Code]] = frozenset({"closed"})
"""Likewise, at one that it has begun to read. Not ``missing`` any more: what it read is gone."""
ASK_AGAIN_S: Final = 0.2
"""Between two tries of a consumer, or of a replay at a partition that it has begun to read."""


def refused_for(error: Exception, text: str) -> Refused:
    """The refusal of what `error` has kept a sidecar from."""
    return Refused("damaged" if isinstance(error, LogDamaged | LogFormat) else "storage", text)


def failed(stream: str) -> Refused:
    """The refusal where a sidecar met what nobody foresaw, and has logged it."""
    return Refused("storage", f"stream {stream!r}: its sidecar failed, and logged why")


def error_of(refused: Refused) -> MeshError:
    """What users are told of it."""
    return _ERRORS[refused.code](refused.text)
