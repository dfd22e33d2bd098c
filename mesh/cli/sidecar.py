"""``mesh sidecar``: a node that keeps streams, and does nothing else."""

from __future__ import annotations

import signal
import threading

import click

from mesh.node import Node


def run(directory: str, name: str, realm: str | None) -> None:
    """Until SIGINT or SIGTERM. Raises `LogLocked`, `LogDamaged`, `StorageFailed`."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Node(name, realm=realm, durable=directory):
        click.echo(f"keeping streams in {directory}")
        ended.wait()
