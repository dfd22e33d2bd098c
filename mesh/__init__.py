"""Brokerless messaging: nodes find each other and exchange messages over topics, queues, services.

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
        MeshError,
        NotSerializable,
        OptionsDiffer,
        PayloadTooLarge,
        PeerLost,
        RemoteError,
        Timeout,
        UnsafeRuntimeDir,
    )
    from mesh.message import (
        Array,
        Loss,
        Message,
        Messages,
        PeerEvent,
        PeerInfo,
        Stats,
        TasksLost,
        Untrusted,
    )
    from mesh.node import InsecureWarning, Node

__version__ = "0.1.0.dev0"

_WHERE = {
    "mesh.errors": (
        "Busy Closed Forked InvalidName InvalidOption MeshError NotSerializable OptionsDiffer "
        "PayloadTooLarge PeerLost RemoteError Timeout UnsafeRuntimeDir"
    ),
    "mesh.message": "Array Loss Message Messages PeerEvent PeerInfo Stats TasksLost Untrusted",
    "mesh.node": "InsecureWarning Node",
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = [
    "Array",
    "Busy",
    "Closed",
    "Forked",
    "InsecureWarning",
    "InvalidName",
    "InvalidOption",
    "Loss",
    "MeshError",
    "Message",
    "Messages",
    "Node",
    "NotSerializable",
    "OptionsDiffer",
    "PayloadTooLarge",
    "PeerEvent",
    "PeerInfo",
    "PeerLost",
    "RemoteError",
    "Stats",
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
