"""What users are told when a sidecar refuses."""

from __future__ import annotations

from typing import Final

from mesh.durable.partition import Refused
from mesh.errors import (
    InvalidOption,
    LogFull,
    MeshError,
    OptionsDiffer,
    OutcomeUnknown,
    ProducerFenced,
    SequenceGap,
    StorageFailed,
)

_ERRORS: Final[dict[str, type[MeshError]]] = {
    "full": LogFull,
    "large": LogFull,
    "storage": StorageFailed,
    "damaged": StorageFailed,
    "closed": StorageFailed,
    "missing": StorageFailed,
    "differs": OptionsDiffer,
    "malformed": InvalidOption,
    "fenced": ProducerFenced,
    "unknown": OutcomeUnknown,
    "gap": SequenceGap,
    "old": OutcomeUnknown,
}


def error_of(refused: Refused) -> MeshError:
    return _ERRORS[refused.code](refused.text)
