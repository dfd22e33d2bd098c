"""Real processes for tests that claim them: a program in, its lines out, each with a deadline."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import pytest

DEADLINE_S = 15.0


class Program:
    """A Python program in a process of its own. Leaving kills it if it still runs."""

    def __init__(
        self,
        source: str,
        *arguments: str,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-u", "-c", textwrap.dedent(source), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, timeout: float = DEADLINE_S) -> str:
        """The next line it prints. Fails with what it wrote to stderr if it ended instead."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self._out, selectors.EVENT_READ)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
            assert ready, f"it printed no line within {timeout} s"
            data = os.read(self._out, 65536)
            if not data:
                raise AssertionError(f"it ended: {self.finish()!r}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def expect(self, line: str, timeout: float = DEADLINE_S) -> None:
        """Read lines until one is `line`."""
        deadline = time.monotonic() + timeout
        while (got := self.line(deadline - time.monotonic())) != line:
            assert time.monotonic() < deadline, f"still printing {got!r}, not {line!r}"

    def tell(self, line: str = "") -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        if number == signal.SIGSTOP:  # each thread stops when it comes to that
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def finish(self, timeout: float = DEADLINE_S) -> tuple[int, str, str]:
        """Wait for its end: (status, the rest of stdout, stderr)."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, (self._buffer + out).decode(), err.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)  # not for the end of its output, which a child may hold open
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Programs:
    """Starts programs and ends them all."""

    def __init__(self) -> None:
        self.running: list[Program] = []

    def start(self, source: str, *arguments: str, env: dict[str, str] | None = None) -> Program:
        program = Program(source, *arguments, env=env)
        self.running.append(program)
        return program


@pytest.fixture
def programs() -> Iterator[Programs]:
    """`Programs`, ended with the test."""
    programs = Programs()
    yield programs
    with contextlib.ExitStack() as ending:
        for program in programs.running:
            ending.push(program)
