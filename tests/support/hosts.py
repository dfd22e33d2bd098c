"""Two hosts out of one: network namespaces on a bridge, each with its own directory and boot id.

A namespace alone is not a host: the nodes in it would see each other's ipc sockets and processes.
So each host also has mount and pid namespaces, a runtime directory that nobody else sees, and
another boot id in /proc. Needs root.
"""

from __future__ import annotations

import secrets
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Program

# A disk that another test has mounted (tests/support/faults.py) would stay mounted here when that
# unmounts it, and be mounted again as it is: without power.
_ENTER = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
while read -r device where rest; do
    case $device$where in /dev/loop*/disk) umount --lazy "$where" ;; esac
done < /proc/mounts
mount --bind "$1" /proc/sys/kernel/random/boot_id
mount -t tmpfs -o mode=0700 none "$2"
export MESH_RUNTIME_DIR="$2"
shift 2
exec "$@"
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Host:
    """One host on the bridge."""

    def __init__(self, number: int, tag: str, bridge: str, directory: Path) -> None:
        self.address = f"10.213.7.{number}"
        self._namespace = f"mesh-{tag}-{number}"
        self._cable = f"m{tag}{number}"
        self._boot_id = directory / f"boot-{number}"
        self._boot_id.write_text(f"{secrets.token_hex(16)}\n")
        self._runtime = directory / f"runtime-{number}"
        self._runtime.mkdir()
        run("ip", "netns", "add", self._namespace)
        run(
            *("ip", "link", "add", self._cable, "type", "veth"),
            *("peer", "name", "eth0", "netns", self._namespace),
        )
        run("ip", "link", "set", self._cable, "master", bridge, "up")
        inside = ("ip", "-n", self._namespace)
        run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "route", "add", "default", "dev", "eth0")  # or multicast has no way out

    def start(self, source: str, *arguments: str, env: dict[str, str] | None = None) -> Program:
        """Run a Python program on this host."""
        return Program(
            source,
            *arguments,
            env=env,
            prefix=(
                *("ip", "netns", "exec", self._namespace),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", textwrap.dedent(_ENTER), "host", str(self._boot_id)),
                str(self._runtime),
            ),
        )

    def cut(self) -> None:
        """Pull the cable."""
        run("ip", "link", "set", self._cable, "down")

    def heal(self) -> None:
        run("ip", "link", "set", self._cable, "up")

    def move(self, number: int) -> None:
        """Take another address in place of the one it has, as a lease that ran out would."""
        inside = ("ip", "-n", self._namespace)
        run(*inside, "address", "del", f"{self.address}/24", "dev", "eth0")
        self.address = f"10.213.7.{number}"
        run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        run(*inside, "route", "replace", "default", "dev", "eth0")

    def remove(self) -> None:
        subprocess.run(("ip", "netns", "del", self._namespace), check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else."""
    tag = secrets.token_hex(2)
    bridge = f"mesh{tag}"
    run("ip", "link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
    run("ip", "link", "set", bridge, "up")
    made: list[Host] = []
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as directory:
        try:
            made = [Host(number, tag, bridge, Path(directory)) for number in (1, 2)]
            yield made[0], made[1]
        finally:
            for host in made:
                host.remove()
            run("ip", "link", "del", bridge)
