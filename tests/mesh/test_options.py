"""Options: frozen, named, documented, closed by default, and refused with the range in the text."""

from __future__ import annotations

import ast
import errno
import inspect
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mesh import Node, options
from mesh.errors import InvalidName, InvalidOption
from mesh.options import (
    NodeOptions,
    PublisherOptions,
    PullerOptions,
    ServiceOptions,
    StreamOptions,
    SubscriberOptions,
    check_count,
    check_timeout,
)

CLASSES: list[Any] = [
    NodeOptions,
    PublisherOptions,
    StreamOptions,
    SubscriberOptions,
    PullerOptions,
    ServiceOptions,
]
SECRET = "sixteen characters or more"


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_work(cls: Any) -> None:
    assert cls() == cls()


@pytest.mark.parametrize("cls", CLASSES)
def test_options_cannot_be_changed_once_made(cls: Any) -> None:
    made = cls()
    with pytest.raises(AttributeError):
        setattr(made, msgspec.structs.fields(cls)[0].name, None)


@pytest.mark.parametrize("cls", CLASSES)
def test_options_are_given_by_name_only(cls: Any) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        cls("default")


def test_every_field_of_every_class_is_documented() -> None:
    """A string under each field, which says what the value means."""
    classes = [
        node
        for node in ast.parse(inspect.getsource(options)).body
        if isinstance(node, ast.ClassDef) and ast.unparse(node.bases[0]) == "msgspec.Struct"
    ]
    assert {node.name for node in classes} == {cls.__name__ for cls in CLASSES}
    for cls in classes:
        for field, below in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                name = ast.unparse(field.target)
                assert isinstance(below, ast.Expr), f"{cls.name}.{name} has no docstring"
                assert isinstance(below.value, ast.Constant), f"{cls.name}.{name}"


@pytest.mark.parametrize(
    ("cls", "given", "text"),
    [
        (NodeOptions, {"port": -1}, "port must be an integer from 0 to 65,535, not -1"),
        (NodeOptions, {"port": 65536}, "port must be an integer from 0 to 65,535, not 65536"),
        (NodeOptions, {"port": "5000"}, "port must be an integer from 0 to 65,535, not '5000'"),
        (NodeOptions, {"port": True}, "port must be an integer from 0 to 65,535, not True"),
        (
            NodeOptions,
            {"buffer_messages": 0},
            "buffer_messages must be an integer from 1 to 1,000,000, not 0",
        ),
        (
            NodeOptions,
            {"message_bytes_max": 1023},
            "message_bytes_max must be an integer from 1,024 to 2,147,483,648, not 1023",
        ),
        (NodeOptions, {"heartbeat_s": 0.01}, "heartbeat_s must be 0.05 to 3,600 s, not 0.01"),
        (
            NodeOptions,
            {"heartbeat_s": float("nan")},
            "heartbeat_s must be 0.05 to 3,600 s, not nan",
        ),
        (NodeOptions, {"heartbeat_s": "1"}, "heartbeat_s must be 0.05 to 3,600 s, not '1'"),
        (NodeOptions, {"heartbeat_s": None}, "heartbeat_s must be 0.05 to 3,600 s, not None"),
        (NodeOptions, {"heartbeat_s": True}, "heartbeat_s must be 0.05 to 3,600 s, not True"),
        (NodeOptions, {"compress": 1}, "compress must be True or False, not 1"),
        (NodeOptions, {"insecure_lan": "no"}, "insecure_lan must be True or False, not 'no'"),
        (NodeOptions, {"secret": 123}, "secret must be str, not int"),
        (NodeOptions, {"secret": b"x" * 20}, "secret must be str, not bytes"),
        (NodeOptions, {"secret": [SECRET]}, "secret must be str, not list"),
        (
            NodeOptions,
            {"secret": "\ud800" * 20},
            "secret has lone surrogates, which UTF-8 cannot say",
        ),
        (
            NodeOptions,
            {"secret": "x" * 15},
            "secret must have 16 characters or more, not 15; `mesh secret` makes a good one",
        ),
        (
            NodeOptions,
            {"interfaces": (), "secret": SECRET},
            "interfaces names none: (); None stands for all that are up",
        ),
        (PublisherOptions, {"keep_last": "no"}, "keep_last must be True or False, not 'no'"),
        (SubscriberOptions, {"latest_only": 1}, "latest_only must be True or False, not 1"),
        (SubscriberOptions, {"views": 1}, "views must be True or False, not 1"),
        (PullerOptions, {"views": None}, "views must be True or False, not None"),
        (
            StreamOptions,
            {"durability": "disk"},
            "durability must be 'fsync', 'interval' or 'os', not 'disk'",
        ),
        (StreamOptions, {"retention": 1}, "retention must be 'limits' or 'acked', not 1"),
        (
            StreamOptions,
            {"keep_count": 0},
            "keep_count must be an integer of 1 or more, not 0",
        ),
        (StreamOptions, {"keep_s": -1}, "keep_s must be 0.001 to 1e9 s, not -1"),
        (
            NodeOptions,
            {"durable": ""},
            "durable must be the path of a directory, not ''",
        ),
        (
            NodeOptions,
            {"secret": SECRET, "insecure_lan": True},
            "insecure_lan=True and a secret contradict each other",
        ),
        (
            NodeOptions,
            {"discovery": ("dns",)},
            "discovery knows 'local' and 'mdns', not 'dns'",
        ),
        (
            PublisherOptions,
            {"when_full": "block"},
            "when_full must be 'drop' or 'wait', not 'block'",
        ),
        (PullerOptions, {"prefetch": 0}, "prefetch must be an integer from 1 to 65,536, not 0"),
        (
            ServiceOptions,
            {"concurrency": 0},
            "concurrency must be an integer from 1 to 1,024, not 0",
        ),
        (ServiceOptions, {"backlog": -1}, "backlog must be an integer from 0 to 65,536, not -1"),
    ],
)
def test_bad_value_is_refused_with_its_option_and_range(
    cls: Any, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidOption) as refused:
        cls(**given)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    "given",
    [
        {"port": 65535},
        {"port": 0},
        {"buffer_messages": 1},
        {"buffer_messages": 1_000_000},
        {"message_bytes_max": 1024},
        {"message_bytes_max": 1 << 31},
        {"heartbeat_s": 0.05},
        {"heartbeat_s": 3600},
    ],
)
def test_the_ends_of_a_range_are_in_it(given: dict[str, Any]) -> None:
    (name,) = given
    assert getattr(NodeOptions(**given), name) == given[name]


@pytest.mark.parametrize(
    "given",
    [{"seeds": ("10.0.0.1:5000",)}, {"discovery": ("mdns",)}, {"discovery": ("local", "mdns")}],
)
def test_nothing_reaches_beyond_this_machine_without_a_secret(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption) as refused:
        NodeOptions(**given)
    assert str(refused.value) == (
        "seeds and mdns reach beyond this machine, which needs a secret (or insecure_lan=True)"
    )
    assert NodeOptions(**given, secret=SECRET).networked
    assert NodeOptions(**given, insecure_lan=True).networked


@pytest.mark.parametrize(
    ("given", "networked", "sources"),
    [
        ({}, False, ("local",)),
        ({"secret": SECRET}, True, ("local", "mdns")),
        ({"insecure_lan": True}, True, ("local", "mdns")),
        ({"discovery": ()}, False, ()),
        ({"secret": SECRET, "discovery": ("mdns",)}, True, ("mdns",)),
    ],
)
def test_sources_follow_from_how_far_the_node_may_reach(
    given: dict[str, Any], networked: bool, sources: tuple[str, ...]
) -> None:
    made = NodeOptions(**given)
    assert made.networked is networked
    assert made.sources == sources


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (0, 0.0), (5, 5.0), (0.25, 0.25), (999_999_999, 999999999.0)],
)
def test_timeout_is_seconds_or_for_ever(given: float | None, seconds: float | None) -> None:
    assert check_timeout(given) == seconds
    assert given is None or isinstance(check_timeout(given), float)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (-1, "timeout must be 0 to 1e9 s or None, not -1"),
        (-0.001, "timeout must be 0 to 1e9 s or None, not -0.001"),
        (1e9, "timeout must be 0 to 1e9 s or None, not 1000000000.0"),
        (float("inf"), "timeout must be 0 to 1e9 s or None, not inf"),
        (float("nan"), "timeout must be 0 to 1e9 s or None, not nan"),
        ("5", "timeout must be seconds or None, not '5'"),
        (True, "timeout must be seconds or None, not True"),
    ],
)
def test_what_is_no_timeout_is_refused(given: Any, text: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        check_timeout(given)
    assert str(refused.value) == text


def test_a_check_names_the_option_it_is_for() -> None:
    with pytest.raises(InvalidOption, match=r"^ack_wait must be 0 to 1e9 s or None, not -1$"):
        check_timeout(-1, "ack_wait")
    with pytest.raises(InvalidOption, match=r"^credit must be an integer from 1 to 8, not 9$"):
        check_count(9, "credit", 1, 8)
    assert check_count(8, "credit", 1, 8) == 8


@pytest.mark.parametrize("option", ["seeds", "interfaces", "discovery"])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, "takes several strings, not 5"),
        ("lo", "takes several strings, not one: ('lo',)"),
        (b"lo", "takes several strings, not one: (b'lo',)"),
        ((5,), "takes strings, and 5 is none"),
        ((None,), "takes strings, and None is none"),
        (([],), "takes strings, and [] is none"),
        ((b"10.0.0.1:5000",), "takes strings, and b'10.0.0.1:5000' is none"),
    ],
)
def test_what_are_not_several_strings_is_refused(option: str, given: Any, text: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        Node("a", secret=SECRET, **{option: given})
    assert str(refused.value) == f"{option} {text}"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"name": None}, "name must be str, not None"),
        ({"name": ["a"]}, "name must be str, not ['a']"),
        ({"name": "a", "realm": 5}, "realm must be str, not 5"),
        ({"name": "a", "realm": []}, "realm must be str, not []"),
        ({"name": "a", "realm": ""}, "realm '' is empty or has control characters"),
    ],
)
def test_a_node_and_its_realm_have_names(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidName) as refused:
        Node(**given)
    assert str(refused.value) == text


@pytest.mark.parametrize("name", [None, 5, [], b"a"])
def test_every_channel_is_opened_by_a_name(name: Any) -> None:
    text = f"must be str, not {type(name).__name__}$"
    with Node("a") as node:
        ways: list[Callable[[Any], object]] = [
            node.publisher,
            node.subscriber,
            node.pusher,
            node.puller,
            node.client,
            node.service,
        ]
        for way in ways:
            with pytest.raises(InvalidName, match=text):
                way(name)


def test_what_is_called_later_can_be_called() -> None:
    nothing: Any = None
    with Node("a") as node:
        with pytest.raises(InvalidOption, match=r"^service 'x' takes a function, not None$"):
            node.service("x")(nothing)
        with pytest.raises(InvalidOption, match=r"^on_peer takes a function, not None$"):
            node.on_peer(nothing)


def test_a_port_that_is_taken_is_an_error_of_the_system_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"tcp port {port} cannot be had on 127.0.0.1") as taken:
            Node("a", secret=SECRET, interfaces=["127.0.0.1"], discovery=[], port=port)
    assert taken.value.errno == errno.EADDRINUSE
