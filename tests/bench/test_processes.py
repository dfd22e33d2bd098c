"""No process outlives a benchmark, however that ends; and nobody waits for ever."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.processes import ROOT, Failed, Process, Worker
from bench.setting import Address, Setting
from tests.support.processes import Program

HARNESS = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from bench.__main__ import run
    print("begun", flush=True)
    sys.exit(run(["--tiny", "--rounds", "100000", "--only", "topic", "--peer", "raw"]))
"""
RECEIVER = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from bench.roles import Receiver
    from bench.setting import Address, Setting

    class Lossy(Receiver):
        def take(self, count, progress):
            read, _ = os.pipe()
            while True:
                progress[:] = [progress[0] + 7, 70]
                os.read(read, 1)

        def take_one(self):
            raise NotImplementedError

    import json, os
    receiver = Lossy(Setting(), Address(directory="", port=0, transport="ipc"))
    print(json.dumps(receiver.receive(count=10, seconds=0.05)))
"""

STARTER = """
    import sys, tempfile
    sys.path.insert(0, sys.argv[1])
    from bench.processes import Process
    command = [sys.executable, "-m", "bench.lifeline", sys.executable, "-S", "-u", "-c"]
    sleeper = "import os, time; print('asleep'); time.sleep(60)"
    process = Process([*command, sleeper], directory=sys.argv[2])
    print(process.line(10), process.pid, flush=True)
    process.line(60)
"""


ENDING = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path("ended").touch()))
print("begun")
signal.pause()
"""


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_is_left_when_it_is_ended(number: int, private_runtime_dir: str) -> None:
    # A short path, since the sockets below it have 107 bytes; removed with what SIGKILL leaves.
    with Program(HARNESS, str(ROOT), env={"TMPDIR": private_runtime_dir}) as harness:
        harness.expect("begun")
        deadline = time.monotonic() + 15
        while len(workers := children(harness.pid)) < 4:
            assert time.monotonic() < deadline, "it does not get going"
            time.sleep(0.005)
        harness.kill(number)
        status, _, _ = harness.finish()
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    wait_until_gone(workers)
    left = os.listdir(private_runtime_dir)
    assert bool(left) == (number == signal.SIGKILL), "its directories go too, where it can do that"


@pytest.mark.slow
def test_not_even_a_program_that_reads_nothing_outlives_a_harness_that_is_killed(
    tmp_path: Path,
) -> None:
    with Program(STARTER, str(ROOT), str(tmp_path)) as harness:
        word, pid = harness.line().split()
        assert (word, is_running(int(pid))) == ("asleep", True)
    wait_until_gone([int(pid)])


def test_a_process_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    process = Process([sys.executable, "-S", "-c", "input()"], directory=str(tmp_path))
    try:
        with pytest.raises(Failed, match="no answer within 0 s"):
            process.line(0)
    finally:
        process.kill()
    assert not is_running(process.pid)
    process.kill()


def test_a_process_is_asked_to_end_and_may_do_so_in_its_own_way(tmp_path: Path) -> None:
    process = Process([sys.executable, "-S", "-u", "-c", ENDING], directory=str(tmp_path))
    try:
        assert process.line(10) == "begun"
        assert process.end(10) == 0
    finally:
        process.kill()
    assert (tmp_path / "ended").exists()
    assert not is_running(process.pid)


@pytest.mark.slow
def test_a_worker_ends_with_its_input(tmp_path: Path) -> None:
    address = Address(directory=str(tmp_path), port=0, transport="disk")
    worker = Worker("fdatasync", "log", Setting(size=100), address)
    try:
        worker.answer()
        assert worker.end(10) == 0
    finally:
        worker.kill()


def test_what_a_process_said_of_its_end_is_told(tmp_path: Path) -> None:
    process = Process(
        [sys.executable, "-S", "-c", "raise SystemExit('no luck')"], directory=str(tmp_path)
    )
    try:
        with pytest.raises(Failed, match="it ended: no luck"):
            process.line(10)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_receiver_that_gets_too_little_says_how_far_it_came() -> None:
    with Program(RECEIVER, str(ROOT)) as program:
        told = json.loads(program.line())
    assert (told["count"], told["total"]) == (7, 70)


@pytest.mark.slow
def test_the_command_prints_saves_and_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    chosen = ["--tiny", "--only", "death", "--out", str(out)]
    assert main([*chosen, "--json"]) == 0
    (told,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    saved = json.loads(out.read_text())
    assert saved["results"] == [told]
    assert saved["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert {"case", "transport", "size", "peer", "ours", "theirs", "ratio", "unit"} <= set(told)
    assert (told["case"], told["peer"], told["theirs"]) == ("death", "budget", 0.2)
    assert main([*chosen, "--floors"]) == 0
    assert "death noticed" in capsys.readouterr().out


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.cases import CASES

    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in CASES)
