"""``mesh log``: checking what is on disk, asking how it goes, and putting dead letters back."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import click

from mesh.durable.check import check as check_log
from mesh.durable.storage import Disk
from mesh.durable.stream import Stream
from mesh.errors import LogFormat, MeshError, NoSidecar, Timeout
from mesh.node import Node

_GROUP = "mesh-redrive"
_OWN = "mesh-"


def check(directory: str) -> bool:
    """Print a line for each stream, and one for each finding; whether there was none. Raises
    `MeshError` for what is no sidecar's directory."""
    root = Path(directory)
    try:
        partition = int((root / "identity").read_text(), 16)
        folders = sorted((root / "streams").iterdir())
    except (OSError, ValueError) as error:
        raise MeshError(f"{directory} is no directory of a sidecar: {error}") from None
    sound = True
    if not folders:
        click.echo(f"{directory} has no streams yet")
    for folder in folders:
        name = unquote(folder.name)
        try:
            report = check_log(Disk(folder), partition)
        except (LogFormat, OSError) as error:
            click.echo(f"{name}: {error}")
            sound = False
            continue
        click.echo(
            f"{name}: {report.end - report.start:,} records from offset {report.start:,} on, "
            f"{report.bytes:,} bytes in {report.segments:,} segments"
        )
        if report.torn_bytes:
            click.echo(
                f"{name}: {report.torn_bytes:,} bytes at the end are of an unfinished append"
            )
        if report.aside:
            click.echo(
                f"{name}: {report.aside_bytes:,} bytes in {report.aside:,} files (.torn) "
                "were unfinished appends, cut off when the log was opened"
            )
        for finding in report.findings:
            sound = False
            click.echo(
                f"{name}: {finding.file} at byte {finding.position:,}, offset {finding.offset:,}: "
                f"{finding.reason}"
            )
    return sound


def stats(stream: str, realm: str | None, timeout: float) -> None:
    """A line for each partition, each of its groups, and what went wrong. Raises `NoSidecar` and
    the like."""
    with Node("stats", realm=realm) as node:
        partitions = node.stream(stream).stats(timeout=timeout)
    for partition, found in sorted(partitions.items()):
        click.echo(
            f"{partition}: {found.records:,} records from offset {found.start:,} on, "
            f"{found.bytes:,} bytes in {found.segments:,} segments, {found.readers:,} readers wait"
        )
        for name, group in sorted(found.groups.items()):
            click.echo(
                f"{partition}: group {name}: {group.lag:,} to do, {group.in_flight:,} in flight, "
                f"{group.members:,} members{_counted(group.counters)}"
            )
        for name, why in sorted(found.groups_unread.items()):
            click.echo(f"{partition}: group {name} stands still: {why}")
        wrong = {
            **{f"refused ({code})": count for code, count in found.refused.items()},
            **{f"forgotten ({kind})": count for kind, count in found.forgotten.items()},
            "writes or syncs failed": found.failures,
            "records lost unsynced": found.unsynced_lost,
            "bytes torn off": found.torn_bytes,
        }
        if any(wrong.values()):
            click.echo(f"{partition}: since it was opened{_counted(wrong)}")


def _counted(counters: dict[str, int]) -> str:
    return "".join(f", {count:,} {what}" for what, count in sorted(counters.items()) if count)


def redrive(stream: str, realm: str | None, timeout: float) -> None:
    """Until there were none for `timeout` seconds. Raises `NoSidecar` and the like, also if there
    are some that it did not get."""
    count = 0
    with Node("redrive", realm=realm) as node:
        target, dead = node.stream(stream), node.stream(f"{stream}.dead")
        target.bounds(timeout=timeout)  # that it is there: it may have no dead letters yet
        with dead.consumer(_GROUP) as letters:
            while True:
                try:
                    letter = letters.recv(timeout if not count else min(timeout, 1.0))
                except Timeout as late:
                    ended = late
                    break
                headers = {k: v for k, v in letter.headers.items() if not k.startswith(_OWN)}
                target.append(letter.payload, key=letter.key, headers=headers, derived_from=letter)
                letter.ack()
                count += 1
            letters.flush()
        left = 0 if isinstance(ended, NoSidecar) else _left(dead, timeout)
    done = f"{count:,} dead letters of {stream} are appended again"
    if left:
        raise MeshError(f"{done}, and {left:,} are left: {ended}")
    click.echo(done)


def _left(dead: Stream, timeout: float) -> int:
    """How many letters are still to be appended."""
    found = dead.stats(timeout=timeout).values()
    return sum(each.groups[_GROUP].lag if _GROUP in each.groups else each.records for each in found)
