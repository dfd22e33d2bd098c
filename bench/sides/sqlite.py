"""SQLite by Python's own module: a table in WAL mode that syncs each commit (``synchronous=FULL``).

It is in the process that uses it. An INSERT by itself is a transaction. Many go by `executemany`
in transactions of 500.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import islice

from bench.roles_log import Log

TRANSPORTS = ("disk",)
BATCH = 500
INSERT = "INSERT INTO log (payload) VALUES (?)"


def missing() -> str | None:
    return None if importlib.util.find_spec("_sqlite3") else "this Python has no sqlite3"


class Table(Log):
    def connect(self) -> None:
        import sqlite3

        path = f"{self.address.directory}/log.db"
        self.database = sqlite3.connect(path, isolation_level=None)
        (mode,) = self.database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise RuntimeError(f"journal_mode is {mode}, not wal")
        self.database.execute("PRAGMA synchronous = FULL")
        self.database.execute(
            "CREATE TABLE log (offset INTEGER PRIMARY KEY, payload BLOB NOT NULL)"
        )

    def append(self, payload: bytes) -> None:
        self.database.execute(INSERT, (payload,))

    def append_all(self, payloads: Iterator[bytes], count: int) -> None:
        rows = ((payload,) for payload in payloads)
        for _ in range(0, count, BATCH):
            self.database.execute("BEGIN")
            self.database.executemany(INSERT, islice(rows, BATCH))
            self.database.execute("COMMIT")

    def read(self, count: int, progress: list[int]) -> None:
        found = total = 0
        query = "SELECT payload FROM log ORDER BY offset LIMIT ?"
        for (payload,) in self.database.execute(query, (count,)):
            total += payload[-1]
            found += 1
        progress[:] = found, total

    def stored(self) -> int:
        (offset,) = self.database.execute("SELECT max(offset) FROM log").fetchone()
        return offset or 0  # no row is ever removed


ROLES = {"log": Table}
