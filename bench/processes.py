"""The processes of a benchmark: none outlives it, and every wait for one has a deadline."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import lifeline
from bench.setting import Address, Setting

ROOT = Path(__file__).parent.parent
START_S = 30.0
"""To import, bind and connect, on a machine that does other things too."""


class Failed(Exception):
    """A process did not do what it was asked for."""


class Process:
    """A program whose lines are read and which is killed in the end; it ends with its input, or
    holds a `bench.lifeline`, so that none is left where this process is killed itself."""

    def __init__(
        self, command: list[str], *, directory: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = command
        self._errors = Path(directory, f"stderr-{time.monotonic_ns()}")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    lifeline.PARENT: str(os.getpid()),
                    **(env or {}),
                },
                start_new_session=True,  # a Ctrl-C is the harness's to deal with
            )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self, timeout: float) -> str:
        """The next line it prints. Raises `Failed`."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self._out, selectors.EVENT_READ)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Failed(f"no answer within {timeout:g} s{self._said()}")
            data = os.read(self._out, 1 << 20)
            if not data:
                raise Failed(f"it ended{self._said()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"it ended{self._said()}") from None

    def kill(self) -> None:
        """End it and whatever it started. Idempotent."""
        if self._process.returncode is not None:
            return
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # what was still to be written to it
                    continue

    def end(self, timeout: float = START_S) -> int:
        """Have it end by itself: its exit status. Raises `Failed`."""
        self._ask_to_end()
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not end within {timeout:g} s{self._said()}") from None
        self._close()
        return status

    def _ask_to_end(self) -> None:
        self._process.terminate()

    def _said(self) -> str:
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


class Worker(Process):
    """A `bench.worker`."""

    def __init__(
        self, side: str, role: str, setting: Setting, address: Address, number: int = 0
    ) -> None:
        config = {
            "side": side,
            "role": role,
            "setting": setting.as_json(),
            "address": vars(address),
        }
        directory = Path(address.directory, f"{role}-{number}")
        directory.mkdir(mode=0o700)
        self.name = f"{role} of {side}"
        super().__init__(
            [sys.executable, "-m", "bench.worker", json.dumps(config)],
            directory=str(directory),
            env={"BENCH_WORKER": str(number)},
        )

    def ask(self, do: str, **arguments: Any) -> None:
        self.tell(json.dumps({"do": do, **arguments}))

    def _ask_to_end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def answer(self, timeout: float = START_S) -> dict[str, Any]:
        """Raises `Failed`."""
        try:
            answer: dict[str, Any] = json.loads(self.line(timeout))
        except Failed as error:
            raise Failed(f"{self.name}: {error}") from None
        return answer
