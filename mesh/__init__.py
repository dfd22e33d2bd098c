"""Brokerless messaging: nodes find each other and exchange messages over topics, queues, services
and streams.

Start with `Node`. Names are loaded when first used, so that ``import mesh`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.errors import (
        Busy,
        Closed,
        Forked,
        InvalidName,
        InvalidOption,
        LogDamaged,
        LogFormat,
        LogFull,
        LogLocked,
        MeshError,
        NoSidecar,
        NotSerializable,
        OptionsDiffer,
        OutcomeUnknown,
        PayloadTooLarge,
        PeerLost,
        ProducerFenced,
        RemoteError,
        SequenceGap,
        StorageFailed,
        Timeout,
        UnsafeRuntimeDir,
    )
    from mesh.message import (
        Array,
        GroupStats,
        Loss,
        Message,
        Messages,
        PeerEvent,
        PeerInfo,
        Receipt,
        Stats,
        StreamStats,
        TasksLost,
        Untrusted,
    )
    from mesh.node import InsecureWarning, Node
    from mesh.options import StreamOptions

__version__ = "0.1.0.dev0"

_WHERE = {
    "mesh.errors": (
        "Busy Closed Forked InvalidName InvalidOption LogDamaged LogFormat LogFull LogLocked "
        "MeshError NoSidecar NotSerializable OptionsDiffer OutcomeUnknown PayloadTooLarge PeerLost "
        "ProducerFenced RemoteError SequenceGap StorageFailed Timeout UnsafeRuntimeDir"
    ),
    "mesh.message": (
        "Array GroupStats Loss Message Messages PeerEvent PeerInfo Receipt Stats StreamStats "
        "TasksLost Untrusted"
    ),
    "mesh.node": "InsecureWarning Node",
    "mesh.options": "StreamOptions",
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = [
    "Array",
    "Busy",
    "Closed",
    "Forked",
    "GroupStats",
    "InsecureWarning",
    "InvalidName",
    "InvalidOption",
    "LogDamaged",
    "LogFormat",
    "LogFull",
    "LogLocked",
    "Loss",
    "MeshError",
    "Message",
    "Messages",
    "NoSidecar",
    "Node",
    "NotSerializable",
    "OptionsDiffer",
    "OutcomeUnknown",
    "PayloadTooLarge",
    "PeerEvent",
    "PeerInfo",
    "PeerLost",
    "ProducerFenced",
    "Receipt",
    "RemoteError",
    "SequenceGap",
    "Stats",
    "StorageFailed",
    "StreamOptions",
    "StreamStats",
    "TasksLost",
    "Timeout",
    "UnsafeRuntimeDir",
    "Untrusted",
]


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'mesh' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
