"""Which addresses this host has, in a network made for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.discovery.interfaces import addresses_of

ROOT = Path(__file__).parents[2]

NETWORK = """
ip link set lo up
ip link add eth7 type veth peer name far
ip addr add 10.7.0.1/24 dev eth7
ip addr add 10.7.0.2/24 dev eth7
ip addr add 10.8.0.1/24 dev eth7 label eth7:1
ip link set eth7 up
ip link set far up
ip link add eth8 type veth peer name far8
ip addr add 10.9.0.1/24 dev eth8
exec "$@"
"""

LOOK = """
import json
from mesh.discovery.interfaces import addresses_of
print(json.dumps([addresses_of(i) for i in (
    None, ("eth7",), ("10.8.0.1",), ("eth8",), ("lo",), ("eth9", "10.9.9.9"), ("eth7", "lo"), ()
)]))
"""


def test_the_loopback_is_used_only_where_it_is_named() -> None:
    assert addresses_of(("lo",)) == ("127.0.0.1",)
    assert addresses_of(("127.0.0.1",)) == ("127.0.0.1",)
    assert "127.0.0.1" not in addresses_of(None)


@pytest.mark.netns
def test_addresses_are_those_of_the_interfaces_that_are_up() -> None:
    command = ["unshare", "--net", "sh", "-ec", NETWORK, "sh", sys.executable, "-c", LOOK]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    eth7 = ["10.7.0.1", "10.7.0.2", "10.8.0.1"]
    assert json.loads(run.stdout) == [
        eth7,
        eth7,
        ["10.8.0.1"],
        [],
        ["127.0.0.1"],
        [],
        [*eth7, "127.0.0.1"],
        [],
    ]
