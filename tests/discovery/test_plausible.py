"""What an announcement may look like, whoever wrote it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.discovery.plausible import is_node_id, is_plausible, parse_tcp
from mesh.discovery.source import Announcement

GOOD = Announcement(
    id="0123456789abcdef",
    name="Küche",
    realm="r",
    endpoints=("ipc:///run/user/1000/mesh/0123456789abcdef.control1", "tcp://192.168.7.9:40001"),
    tag="0f" * 32,
)


def test_a_nodes_own_is_plausible() -> None:
    assert is_plausible(GOOD)
    assert is_plausible(msgspec.structs.replace(GOOD, tag="", endpoints=()))
    assert is_plausible(msgspec.structs.replace(GOOD, endpoints=("ipc:///" + "x" * 106,)))


@pytest.mark.parametrize(
    "changed",
    [
        {"id": ""},
        {"id": "0123456789abcde"},
        {"id": "0123456789abcdef\n"},
        {"id": "0123456789ABCDEF"},
        {"id": "../../etc/passwd"},
        {"name": ""},
        {"name": "x" * 64},
        {"name": "a\x1b[2J"},
        {"realm": ""},
        {"realm": "a\n"},
        {"tag": "xyz"},
        {"tag": "0" * 129},
        {"endpoints": ("tcp://10.0.0.1:1",) * (limits.ENDPOINTS_MAX + 1)},
        {"endpoints": ("ipc://relative",)},
        {"endpoints": ("ipc://@abstract",)},
        {"endpoints": ("ipc:///with\0nul",)},
        {"endpoints": ("ipc:///" + "x" * 107,)},
        {"endpoints": ("ipc:///\x1b[2J",)},
        {"endpoints": ("inproc://inside",)},
        {"endpoints": ("tcp://host:1",)},
        {"endpoints": ("",)},
    ],
)
def test_what_no_node_would_say_is_not(changed: dict[str, object]) -> None:
    assert not is_plausible(msgspec.structs.replace(GOOD, **changed))


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:1",
        "tcp://224.0.0.1:1",
        "tcp://255.255.255.255:1",
        "tcp://10.0.0.256:1",
        "tcp://10.0.0:1",
        "tcp://010.0.0.1:1",
        "tcp://10.0.0.1:0",
        "tcp://10.0.0.1:65536",
        "tcp://10.0.0.1:01",
        "tcp://10.0.0.1:1\n",
        "tcp://10.0.0.1",
        "tcp://٣.0.0.1:1",
        "tcp://*:1",
        "tcp://eth0;10.0.0.1:1",
    ],
)
def test_what_cannot_be_dialled_is_no_endpoint(endpoint: str) -> None:
    assert parse_tcp(endpoint) is None


def test_an_address_and_port_are_read() -> None:
    assert parse_tcp("tcp://10.0.0.1:65535") == ("10.0.0.1", 65535)


@given(st.text())
def test_any_text_is_judged_without_an_error(text: str) -> None:
    assert not is_node_id(text) or len(text) == 16
    parse_tcp(text)
    parse_tcp(f"tcp://{text}")
    is_plausible(Announcement(id=text, name=text, realm=text, endpoints=(text,), tag=text))
    is_plausible(msgspec.structs.replace(GOOD, endpoints=(f"ipc:///{text}",)))
