"""Logs are measured on a disk, synced as they say, and nothing that they lost counts as speed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import disk, teams_log
from bench.case import TINY
from bench.disk import NoPlace, filesystem, place
from bench.measure import Field, latency, rates
from bench.processes import ROOT, Failed, Process
from bench.rows import Alone, Row, Skipped, text
from bench.setting import Address, Setting
from bench.sides import fdatasync, jetstream, module_of
from bench.teams import free_port
from bench.teams_log import AppendTeam, ConsumeTeam, LogTeam, ReplayTeam
from mesh.durable.batch import HEADER_BYTES
from mesh.durable.records import batch_of, pack_payload

SETTING = Setting(transport="disk", size=100)
MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:25 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw
31 30 0:26 / /tmp/a\\040b rw - xfs /dev/vdb rw
32 22 0:27 / /home rw - xfs /dev/vdc rw
33 32 0:28 / /home rw - btrfs /dev/vdd rw
"""
USER = """
import sys
from bench.setting import Address, Setting
from bench.sides import module_of
side, directory, port, transport, count = sys.argv[1:]
address = Address(directory=directory, port=int(port), transport=transport)
log = module_of(side).ROLES["log"](Setting(transport=transport, size=100), address)
log.connect()
log.do_append(int(count), 20)
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/tmpest", "ext4"),
        ("/tmp", "tmpfs"),
        ("/tmp/x/y", "tmpfs"),
        ("/tmp/a b/c", "xfs"),
        ("/home", "btrfs"),
    ],
)
def test_a_filesystem_is_that_of_the_last_mount_above(
    path: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    assert filesystem(path, tmp_path / "mountinfo") == kind


def test_logs_are_kept_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {tempfile.gettempdir(): "tmpfs", disk.LASTING: "ext4"}
    monkeypatch.setattr(disk, "filesystem", kinds.__getitem__)
    assert (place(), disk.note()) == (disk.LASTING, "on ext4")
    kinds[tempfile.gettempdir()] = "xfs"
    assert (place(), disk.note()) == (tempfile.gettempdir(), "on xfs")


def test_without_a_disk_every_side_is_named_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "filesystem", lambda _: "tmpfs")
    with pytest.raises(NoPlace, match="is in memory: name a place on a disk in TMPDIR"):
        place()
    results = list(latency("append", SETTING, ("fdatasync", "sqlite"), TINY, AppendTeam))
    assert [result.peer for result in results] == ["fdatasync", "sqlite"]
    for result in results:
        assert isinstance(result, Skipped)
        assert "is in memory" in result.skipped
        assert not result.failed


def test_the_least_an_append_costs_is_for_as_many_bytes_as_our_log_writes() -> None:
    batch = batch_of([pack_payload(bytes(100), 1 << 20)])
    assert len(fdatasync.EXTRA) + 100 == HEADER_BYTES + batch.header.body_bytes


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("side", ["fdatasync", "sqlite", "jetstream"])
def test_every_append_has_a_sync_of_its_own(side: str) -> None:
    module, count = module_of(side), 20
    if why := module.missing():
        pytest.skip(why)
    transport, port = module.TRANSPORTS[0], free_port()
    with tempfile.TemporaryDirectory(dir=place()) as directory:
        traced = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", f"{directory}/calls"]
        user = [sys.executable, "-c", USER, side, directory, str(port), transport, str(count)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = partial(subprocess.run, env=environment, check=True, timeout=30)
        if helpers := getattr(module, "helpers", None):
            address = Address(directory=directory, port=port, transport=transport)
            (_, _, _, *server), *_ = helpers(address)
            host = Process([*traced, *server], directory=directory)
            try:
                run(user, capture_output=True)
                os.killpg(host.pid, signal.SIGTERM)  # strace itself does not heed it
                host.end()
            finally:
                host.kill()
        else:
            run([*traced, *user])
        calls = Path(directory, "calls").read_text()
    assert len(re.findall(r"\b(?:fsync|fdatasync)\(", calls)) >= count


class StubWorker:
    """Answers what it is given, whatever it is asked."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def ask(self, do: str, **arguments: Any) -> None:
        self.asked = do

    def answer(self, timeout: float = 0) -> dict[str, Any]:
        return self.answers.pop(0)


@contextlib.contextmanager
def a_team(make: type[LogTeam], *answers: dict[str, Any]) -> Iterator[Any]:
    team: Any = make("sqlite", SETTING)
    team.log = StubWorker(*answers)
    with contextlib.closing(team):
        yield team


def test_records_that_are_not_in_the_log_are_lost() -> None:
    answers = ({"latencies": [1.0], "stored": stored} for stored in (50, 99))
    with a_team(AppendTeam, *answers) as team:
        team.calls(50, 1)
        assert team.lost == 0
        team.calls(50, 1)
        assert team.lost == 1


def test_a_replay_that_ends_early_has_lost_the_rest_and_a_changed_record_is_no_result() -> None:
    total = SETTING.total(100)
    answers = (
        {"elapsed": 2.0, "count": count, "total": got}
        for count, got in ((100, total), (97, 5), (100, total + 1))
    )
    with a_team(ReplayTeam, *answers) as team:
        assert (team.block(100), team.lost) == (50, 0)
        assert (team.block(100), team.lost) == (50, 3)
        with pytest.raises(Failed, match="sqlite: records are not what was appended"):
            team.block(100)


def test_a_record_whose_acknowledgement_the_log_has_not_got_is_lost() -> None:
    filled = {"elapsed": 1.0, "stored": 100}
    consumed = {"elapsed": 0.5, "total": SETTING.total(100), "acknowledged": 98}
    with a_team(ConsumeTeam, filled, consumed) as team:
        assert (team.block(100), team.lost) == (200, 2)


@pytest.mark.parametrize(("transport", "roles"), [("ipc", ["host", "log"]), ("disk", ["log"])])
def test_a_log_is_hosted_before_it_is_used_unless_it_is_in_the_users_process(
    transport: str, roles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def worker(self: LogTeam, role: str, number: int = 0) -> StubWorker:
        started.append(role)
        return StubWorker({"ready": True}, {})

    module = SimpleNamespace(ROLES={"host": None, "log": None})
    monkeypatch.setattr(teams_log, "module_of", lambda side: module)
    monkeypatch.setattr(LogTeam, "_worker", worker)
    team = AppendTeam("ours", Setting(transport=transport))
    with contextlib.closing(team):
        list(team.opening())
    assert started == roles


def test_a_side_without_a_log_is_named_as_skipped() -> None:
    (result,) = latency("append", Setting(transport="tcp"), ("raw",), TINY, AppendTeam)
    assert isinstance(result, Skipped)
    assert (result.peer, result.skipped, result.failed) == ("raw", "has no log", False)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("nats-server: v2.9.10", "nats-server is 2.9, older than 2.12 (extra: bench)"),
        ("nats-server: v2.12.0-RC.1", None),
        ("nats-server: v2.15.1", None),
    ],
)
def test_a_server_without_atomic_batches_is_not_measured(
    said: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "nats-server"
    server.write_text(f"#!/bin/sh\necho '{said}'\n")
    server.chmod(0o700)
    monkeypatch.setattr("bench.sides.nats.missing", lambda: None)
    monkeypatch.setattr("bench.sides.nats.server", lambda: str(server))
    assert jetstream.missing() == why


def test_where_ours_was_not_measured_the_others_figures_stand_alone() -> None:
    field = Field("replay", SETTING, ("ours", "sqlite"), "on ext4")
    rates(field, {"sqlite": [2000.0, 4000.0, 3000.0]}, "rec/s", {"sqlite": 7})
    (result,) = field.results
    assert isinstance(result, Alone)
    assert (result.theirs, result.rounds, result.lost) == (3000, 3, 7)
    shown = text(result).split()
    assert shown == [
        "replay",
        "disk",
        "100",
        "B",
        "sqlite",
        "-",
        "3",
        "k",
        "rec/s",
        "-",
        "-",
        "LOST",
        "7",
        "on",
        "ext4",
    ]


def test_where_the_log_was_stands_beside_a_ratio_too() -> None:
    field = Field("replay", SETTING, ("ours", "sqlite"), "on ext4")
    rates(field, {"ours": [6000.0], "sqlite": [3000.0]}, "rec/s", {"ours": 0, "sqlite": 7})
    (row,) = field.results
    assert isinstance(row, Row)
    assert (row.ratio, row.lost, row.note) == (2, 7, "lost by sqlite; on ext4")
