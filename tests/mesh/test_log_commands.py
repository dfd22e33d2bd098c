"""``mesh sidecar`` and ``mesh log``, as they are typed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mesh import Node
from mesh.errors import LogFull, Timeout
from mesh.options import StreamOptions
from tests.support.waiting import until

MESH = [sys.executable, "-u", "-m", "mesh"]


def mesh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MESH, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_sidecar_keeps_streams_until_it_is_told_to_end(tmp_path: Path) -> None:
    for _ in range(2):
        process = subprocess.Popen(
            [*MESH, "sidecar", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == f"keeping streams in {tmp_path}\n"
        with Node("writer") as node:
            node.stream("orders").append("x")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 0
    run = mesh("log", "check", str(tmp_path))
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("orders: 2 records from offset 0 on, ")


def test_a_directory_that_is_in_use_is_refused(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path):
        run = mesh("sidecar", str(tmp_path))
    assert run.returncode == 1
    assert run.stdout == ""
    assert "in use" in run.stderr


def test_where_no_log_can_be_a_sidecar_says_why_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = mesh("sidecar", str(tmp_path / "file"))
    assert (run.returncode, run.stdout) == (1, "")
    where = tmp_path / "file"
    assert run.stderr == f"mesh: no log can be kept in {where}, which is no directory\n"


def test_a_runtime_directory_that_cannot_be_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MESH_RUNTIME_DIR", str(tmp_path / "file" / "below"))
    run = mesh("log", "stats", "orders", "--timeout", "0")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("mesh: [Errno ")
    assert run.stderr.count("\n") == 1


@pytest.mark.damages
def test_a_check_names_what_is_damaged(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        for n in range(10):
            node.stream("orders").append(n)
        node.stream("others").append(1)
    (segment,) = (tmp_path / "streams" / "orders").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[300] ^= 1
    segment.write_bytes(data)
    run = mesh("log", "check", str(tmp_path))
    assert run.returncode == 1
    assert f"orders: {segment.name} at byte" in run.stdout
    assert "others: 1 records" in run.stdout


@pytest.mark.slow
def test_what_is_no_log_is_not_checked(tmp_path: Path) -> None:
    run = mesh("log", "check", str(tmp_path))
    assert (run.returncode, run.stdout) == (1, "")
    assert "is no directory of a sidecar" in run.stderr
    (tmp_path / "identity").write_text("0123456789abcdef\n")
    run = mesh("log", "check", str(tmp_path))
    assert (run.returncode, run.stdout) == (1, "")
    assert "is no directory of a sidecar" in run.stderr


@pytest.mark.slow
def test_a_check_goes_on_behind_what_it_cannot_read(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        run = mesh("log", "check", str(tmp_path))
        assert (run.returncode, run.stdout) == (0, f"{tmp_path} has no streams yet\n")
        node.stream("orders").append("x")
    (tmp_path / "streams" / "a-stray-file").touch()
    run = mesh("log", "check", str(tmp_path))
    assert (run.returncode, run.stderr) == (1, "")
    stray, orders = run.stdout.splitlines()
    assert stray.startswith("a-stray-file: [Errno ")
    assert orders.startswith("orders: 1 records ")


def test_a_stream_is_described_by_its_sidecar(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        orders = node.stream("orders", options=StreamOptions(bytes_max=2000))
        partition = orders.append("x").partition
        with pytest.raises(LogFull):
            orders.append(b"x" * 3000)
        with orders.consumer("billing") as consumer:
            consumer.recv(10).reject()
            consumer.flush()
            run = mesh("log", "stats", "orders")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"{partition}: 1 records from offset 0 on, ")
    assert lines[1].startswith(f"{partition}: group billing: ")
    assert lines[1].endswith(" 1 members, 1 dead")
    assert lines[2] == f"{partition}: since it was opened, 1 refused (large)"
    run = mesh("log", "stats", "others", "--timeout", "0.2")
    assert (run.returncode, run.stdout) == (1, "")
    assert "nobody has a stream 'others'" in run.stderr


def test_a_group_whose_own_file_does_not_read_is_named(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        node.stream("orders").append("x")
    (tmp_path / "streams" / "orders" / "groups" / "backup").mkdir(parents=True)
    with Node("one", durable=tmp_path):
        lines = mesh("log", "stats", "orders").stdout.splitlines()
    assert ": group backup stands still: " in lines[1]


def test_a_check_tells_of_unfinished_appends_that_were_cut_off(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        node.stream("orders").append("x")
    (segment,) = (tmp_path / "streams" / "orders").glob("*.log")
    with segment.open("ab") as file:
        file.write(b"unfinished")
    assert (
        "10 bytes at the end are of an unfinished append"
        in mesh("log", "check", str(tmp_path)).stdout
    )
    with Node("one", durable=tmp_path) as node:
        (found,) = node.stream("orders").stats().values()
        assert found.torn_bytes == 10
    run = mesh("log", "check", str(tmp_path))
    assert run.returncode == 0
    assert "orders: 10 bytes in 1 files (.torn) were unfinished appends" in run.stdout


@pytest.mark.slow
def test_dead_letters_are_appended_again_once(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        orders = node.stream("orders")
        orders.append("bad", key="k", headers={"trace": "x"})
        with orders.consumer("billing") as consumer:
            consumer.recv(10).reject("today only")
            dead = node.stream("orders.dead")
            until(lambda: _has(dead))
            for _ in range(2):
                run = mesh("log", "redrive", "orders", "--timeout", "1")
                assert run.stderr == ""
            record = consumer.recv(10)
            assert (record.payload, record.key, dict(record.headers)) == (
                "bad",
                b"k",
                {"trace": "x"},
            )
            record.ack()
            with pytest.raises(Timeout):
                consumer.recv(0.2)


@pytest.mark.slow
def test_a_stream_without_dead_letters_has_none_to_append(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        node.stream("orders").append("x")
        run = mesh("log", "redrive", "orders", "--timeout", "0.5")
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout == "0 dead letters of orders are appended again\n"
        run = mesh("log", "redrive", "oders", "--timeout", "0.2")
        assert (run.returncode, run.stdout) == (1, "")
        text = "mesh: no partition within 0.2 s: nobody has a stream 'oders': "
        assert run.stderr.startswith(text)


def _has(dead: object) -> bool:
    try:
        return bool(list(dead.replay(timeout=0.5)))  # type: ignore[attr-defined]
    except Timeout:
        return False
