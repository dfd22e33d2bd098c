"""No log at all: `write` and `fdatasync` of the bytes that our log writes for a record.

What the disk alone costs. The file grows, as a log does. A sync of one that does not is cheaper, so
SQLite, which writes into the same file again and again, may come out ahead. It stands beside logs
that are reached over a transport, too, and uses none.
"""

from __future__ import annotations

import os

from bench.roles_log import Log

TRANSPORTS = ("disk", "ipc", "tcp")
EXTRA = bytes(72 + 5)
"""What our log writes for a record besides its payload: a batch's header, and MessagePack's."""


def missing() -> str | None:
    return None


class File(Log):
    def connect(self) -> None:
        path = f"{self.address.directory}/log"
        self.fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        directory = os.open(self.address.directory, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def append(self, payload: bytes) -> None:
        os.write(self.fd, EXTRA + payload)
        os.fdatasync(self.fd)

    def stored(self) -> int:
        return os.fstat(self.fd).st_size // (len(EXTRA) + self.setting.size)


ROLES = {"log": File}
