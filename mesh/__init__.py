"""Brokerless messaging: nodes find each other and exchange messages over topics, queues, services
and streams.

Start with `Node`. Names are loaded when first used, so that ``import mesh`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.durable.appending import Appending
    from mesh.durable.consumed import ConsumedRecord
    from mesh.durable.consumer import Consumer
    from mesh.durable.reading import Origin, Record
    from mesh.durable.recording import Recording
    from mesh.durable.replay import Replay
    from mesh.durable.stream import Stream
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
    from mesh.sockets.client import Client
    from mesh.sockets.publisher import Publisher
    from mesh.sockets.puller import Puller
    from mesh.sockets.pusher import Pusher
    from mesh.sockets.subscriber import Subscriber

__version__ = "0.1.0.dev0"

_WHERE = {
    "mesh.durable.appending": "Appending",
    "mesh.durable.consumed": "ConsumedRecord",
    "mesh.durable.consumer": "Consumer",
    "mesh.durable.reading": "Origin Record",
    "mesh.durable.recording": "Recording",
    "mesh.durable.replay": "Replay",
    "mesh.durable.stream": "Stream",
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
    "mesh.sockets.client": "Client",
    "mesh.sockets.publisher": "Publisher",
    "mesh.sockets.puller": "Puller",
    "mesh.sockets.pusher": "Pusher",
    "mesh.sockets.subscriber": "Subscriber",
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = [
    "Appending",
    "Array",
    "Busy",
    "Client",
    "Closed",
    "ConsumedRecord",
    "Consumer",
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
    "Origin",
    "OutcomeUnknown",
    "PayloadTooLarge",
    "PeerEvent",
    "PeerInfo",
    "PeerLost",
    "ProducerFenced",
    "Publisher",
    "Puller",
    "Pusher",
    "Receipt",
    "Record",
    "Recording",
    "RemoteError",
    "Replay",
    "SequenceGap",
    "Stats",
    "StorageFailed",
    "Stream",
    "StreamOptions",
    "StreamStats",
    "Subscriber",
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
