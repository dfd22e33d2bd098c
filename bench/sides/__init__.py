"""The sides: one module for each system that is measured, `ours` the first of them.

A module has `ROLES`, the programs it can be, by name; `TRANSPORTS`, what it can be measured over;
and `missing`, which tells what it needs and has not got. Its worker is `bench.worker`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

SIDES = (
    *("ours", "raw", "zenoh", "nng", "nats"),
    *("fdatasync", "sqlite", "jetstream", "jetstream_push"),
)


def module_of(side: str) -> ModuleType:
    """The module of a side; that of ``ours-unbatched`` is that of ``ours``."""
    return importlib.import_module(f"bench.sides.{side.partition('-')[0]}")
