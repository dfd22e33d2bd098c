"""A PostgreSQL server for tests: of their own, on a UNIX socket, without TCP, ended with them.

It takes the server's programs and psycopg; without them the test is skipped and says so. As root,
which the server refuses to run as, it is run as ``nobody``.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import until

USER = "bank"
_DEBIAN = Path("/usr/lib/postgresql")
"""Has a folder for each version."""
_DEADLINE_S = 20.0


class Server:
    """One that runs."""

    def __init__(self, psycopg: Any, folder: Path) -> None:
        self._psycopg = psycopg
        self.env = {"PGHOST": str(folder), "PGUSER": USER}
        """For programs that connect to it."""

    def connect(self, database: str) -> Any:
        """Each statement is committed by itself."""
        host = self.env["PGHOST"]
        return self._psycopg.connect(host=host, user=USER, dbname=database, autocommit=True)

    @contextlib.contextmanager
    def database(self, name: str) -> Iterator[Any]:
        """A connection to a new one, which is gone afterwards, whoever else is connected to it."""
        with self.connect("postgres") as root:
            root.execute(f"CREATE DATABASE {name}")
            try:
                with self.connect(name) as db:
                    yield db
            finally:
                root.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def answers(self) -> bool:
        try:
            self.connect("postgres").close()
        except self._psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def server() -> Iterator[Server]:
    psycopg = pytest.importorskip(
        "psycopg", reason="psycopg is not installed", exc_type=ImportError
    )
    initdb, postgres = _program("initdb"), _program("postgres")
    folder = Path(tempfile.mkdtemp(prefix="mesh-pg-", dir="/tmp"))  # a socket's path is short
    try:
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
        data = folder / "data"
        options = ("--auth=trust", "--no-locale", "--encoding=UTF8", "--no-sync")
        made = subprocess.run(
            [initdb, "-D", data, "-U", USER, *options],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            **identity,
        )
        assert not made.returncode, made.stderr
        # Only clients are killed, so that nothing has to be on the disk.
        settings = ("-k", folder, "-c", "listen_addresses=", "-c", "fsync=off")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [postgres, "-D", data, *settings], cwd=folder, stdout=log, stderr=log, **identity
            )
        try:
            running = Server(psycopg, folder)
            until(running.answers, "an answer of PostgreSQL", _DEADLINE_S)
            yield running
        finally:
            process.send_signal(signal.SIGINT)  # whoever is connected is disconnected
            process.wait(_DEADLINE_S)
    finally:
        shutil.rmtree(folder)


def _program(name: str) -> str:
    """Its path: of the newest version that Debian has installed, or on the path."""
    found = [path for path in _DEBIAN.glob(f"*/bin/{name}") if os.access(path, os.X_OK)]
    found.sort(key=lambda path: [int(digits) for digits in re.findall(r"\d+", str(path))])
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} (PostgreSQL) is not installed")
    return program
