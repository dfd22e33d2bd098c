"""Options: frozen, keyword-only; each field gives its unit, its default and what ``None`` means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec

from mesh import limits
from mesh.errors import InvalidOption

DiscoveryName = Literal["local", "mdns"]
WhenFull = Literal["drop", "wait"]
Durability = Literal["fsync", "interval", "os"]
Retention = Literal["limits", "acked"]
_MOST: Final = 1 << 62
"""Of anything: as good as no limit."""
Function = TypeVar("Function", bound=Callable[..., Any])


def check_timeout(timeout: float | None, option: str = "timeout") -> float | None:
    """Return `timeout` in seconds (``None``: for ever) or raise `InvalidOption`."""
    if timeout is None:
        return None
    if not is_number(timeout):
        raise InvalidOption(f"{option} must be seconds or None, not {timeout!r}")
    if not 0 <= timeout < 1e9:
        raise InvalidOption(f"{option} must be 0 to 1e9 s or None, not {timeout!r}")
    return float(timeout)


def is_number(value: object) -> bool:
    """Whether it is one as options take them: True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_seconds(value: float, option: str, high: float) -> float:
    """Return `value` if it is from 0 to `high` seconds, else raise `InvalidOption`."""
    if not is_number(value) or not 0 <= value <= high:
        raise InvalidOption(f"{option} must be 0 to {high:,.0f} s, not {value!r}")
    return float(value)


def check_count(value: int, option: str, low: int, high: int) -> int:
    """Return `value` if it is an integer from `low` to `high`, else raise `InvalidOption`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        range_ = f"of {low:,} or more" if high == _MOST else f"from {low:,} to {high:,}"
        raise InvalidOption(f"{option} must be an integer {range_}, not {value!r}")
    return value


def check_flag(value: bool, option: str) -> bool:
    """Return `value` if it is True or False, else raise `InvalidOption`."""
    if not isinstance(value, bool):
        raise InvalidOption(f"{option} must be True or False, not {value!r}")
    return value


def check_strings(values: Iterable[str], option: str) -> tuple[str, ...]:
    """Return `values` as a tuple if they are several strings, else raise `InvalidOption`."""
    if isinstance(values, str | bytes):
        raise InvalidOption(f"{option} takes several strings, not one: ({values!r},)")
    if not isinstance(values, Iterable):
        raise InvalidOption(f"{option} takes several strings, not {values!r}")
    strings = tuple(values)
    for value in strings:
        if not isinstance(value, str):
            raise InvalidOption(f"{option} takes strings, and {value!r} is none")
    return strings


def check_function(value: Function, what: str) -> Function:
    """Return `value` if it can be called, else raise `InvalidOption`."""
    if not callable(value):
        raise InvalidOption(f"{what} takes a function, not {value!r}")
    return value


def check_secret(secret: str) -> str:
    """Return `secret` if it can be one, else raise `InvalidOption`, which does not show it."""
    if not isinstance(secret, str):
        raise InvalidOption(f"secret must be str, not {type(secret).__name__}")
    if (count := len(secret)) < limits.SECRET_CHARACTERS_MIN:
        raise InvalidOption(
            f"secret must have {limits.SECRET_CHARACTERS_MIN} characters or more, not {count}; "
            "`mesh secret` makes a good one"
        )
    if any("\ud800" <= character <= "\udfff" for character in secret):
        raise InvalidOption("secret has lone surrogates, which UTF-8 cannot say")
    return secret


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is made with, besides its name."""

    realm: str = "default"
    """Nodes of different realms never connect."""

    secret: str | None = None
    """Shared by the realm's nodes; 16 characters or more. ``None``: this machine only."""

    durable: str | None = None
    """Directory of an embedded sidecar. ``None``: none."""

    seeds: tuple[str, ...] = ()
    """Control addresses, ``HOST:PORT``, to dial where multicast does not reach."""

    discovery: tuple[DiscoveryName, ...] | None = None
    """Sources to use. ``None``: ``("local",)`` alone on this machine, with mdns on a network."""

    interfaces: tuple[str, ...] | None = None
    """Names or IPv4 addresses of the network interfaces to use. ``None``: all that are up but the
    loopback."""

    port: int = 0
    """TCP port of the control link, which is what a seed names. 0: any free one."""

    insecure_lan: bool = False
    """Speak plain text on the network, without a secret. Warns."""

    heartbeat_s: float = 1.0
    """Interval of pings, in seconds; a peer on another host that is silent for three is gone, one
    on this host for ten."""

    buffer_messages: int = limits.BUFFER_MESSAGES
    """Frames kept for each peer by each end of a topic, 1 to 1,000,000 (libzmq's own is 1000). A
    frame is one message, or a batch of them while the topic is busy."""

    buffer_bytes: int = limits.BUFFER_BYTES
    """Bytes kept for each peer by each end of a topic, 256 KiB or more: 64 MiB. The frames of one
    peer are as many as both limits allow, at 256 KiB or more for each: 256 by default. One that is
    larger than its share counts as several. Each service holds at most so many bytes of requests
    that wait."""

    message_bytes_max: int = limits.MESSAGE_BYTES_MAX
    """Largest message, sent or received, in bytes as encoded: 64 MiB."""

    batch_window_ms: float = limits.BATCH_WINDOW_MS
    """How long a message of a busy channel may wait for others to share its frame, 0 to 1000 ms.
    The first after a pause never waits. 0: none does, and every message has a frame of its own."""

    compress: bool = True
    """Compress with LZ4 what leaves this host, where it shrinks by a tenth or more. Pays up to some
    3 Gbit/s; False: nothing is compressed, which a faster network is better off with."""

    def __post_init__(self) -> None:
        check_count(self.port, "port", 0, 65535)
        check_flag(self.compress, "compress")
        check_count(self.buffer_messages, "buffer_messages", 1, 1_000_000)
        check_count(self.buffer_bytes, "buffer_bytes", limits.SLOT_BYTES_MIN, 1 << 40)
        check_count(self.message_bytes_max, "message_bytes_max", 1024, 1 << 31)
        check_flag(self.insecure_lan, "insecure_lan")
        heartbeat_s = self.heartbeat_s
        if not is_number(heartbeat_s) or not 0.05 <= heartbeat_s <= 3600:
            raise InvalidOption(f"heartbeat_s must be 0.05 to 3,600 s, not {heartbeat_s!r}")
        window_ms = self.batch_window_ms
        if not is_number(window_ms) or not 0 <= window_ms <= 1000:
            raise InvalidOption(f"batch_window_ms must be 0 to 1,000 ms, not {window_ms!r}")
        if self.secret is not None:
            check_secret(self.secret)
        if self.durable is not None and not (isinstance(self.durable, str) and self.durable):
            raise InvalidOption(f"durable must be the path of a directory, not {self.durable!r}")
        if self.secret is not None and self.insecure_lan:
            raise InvalidOption("insecure_lan=True and a secret contradict each other")
        for source in self.discovery or ():
            if source not in ("local", "mdns"):
                raise InvalidOption(f"discovery knows 'local' and 'mdns', not {source!r}")
        if self.interfaces is not None and not self.interfaces:
            raise InvalidOption("interfaces names none: (); None stands for all that are up")
        if not self.networked and (self.seeds or "mdns" in (self.discovery or ())):
            raise InvalidOption(
                "seeds and mdns reach beyond this machine, which needs a secret "
                "(or insecure_lan=True)"
            )

    @property
    def networked(self) -> bool:
        """Whether anything is bound beyond this machine's private directory."""
        return self.secret is not None or self.insecure_lan

    @property
    def sources(self) -> tuple[str, ...]:
        """The discovery sources to start, seeds aside."""
        if self.discovery is not None:
            return self.discovery
        return ("local", "mdns") if self.networked else ("local",)


class PublisherOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one topic is published."""

    when_full: WhenFull = "drop"
    """``drop``: a subscriber without room loses the message, and counts it; `Node.stats` of the
    publishing node shows only that it happened.
    ``wait``: the publisher waits, for all of its subscribers."""

    keep_last: bool = False
    """Give each newcomer the last message of the topic."""

    def __post_init__(self) -> None:
        if self.when_full not in ("drop", "wait"):
            raise InvalidOption(f"when_full must be 'drop' or 'wait', not {self.when_full!r}")
        check_flag(self.keep_last, "keep_last")


class SubscriberOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How topics are received."""

    latest_only: bool = False
    """Keep only the newest message of each sender and topic; what it replaces is not a loss."""
    views: bool = False
    """Payloads of `bytes` that travel by themselves (64 KiB and more) arrive as read-only
    `memoryview`, in the memory that they were received in."""
    repair: bool = False
    """Have what was missed fetched from where its publisher's node has recorded it
    (`Node.record`)."""
    repair_timeout_s: float = 5.0
    """Seconds after which a gap of which nothing was found is counted as lost, and what is held
    behind it is delivered: several times what a log on a busy disk lags behind."""

    def __post_init__(self) -> None:
        check_flag(self.latest_only, "latest_only")
        check_flag(self.views, "views")
        check_flag(self.repair, "repair")
        if check_timeout(self.repair_timeout_s, "repair_timeout") is None:
            raise InvalidOption("repair_timeout takes seconds, not None: a gap is given up at last")
        if self.repair and self.latest_only:
            raise InvalidOption(
                "latest_only=True keeps no message that is not the newest, "
                "and repair=True fetches such"
            )


class PullerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How tasks are taken from a queue."""

    prefetch: int = limits.PREFETCH
    """Tasks of any one pusher that may be in this worker's hands, the one it works on included."""
    views: bool = False
    """As with subscribers."""

    def __post_init__(self) -> None:
        check_count(self.prefetch, "prefetch", 1, limits.PREFETCH_MAX)
        check_flag(self.views, "views")


class ServiceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a service runs its handler."""

    concurrency: int = 1
    """Handlers that may run at once."""

    backlog: int = limits.BACKLOG
    """Requests waiting for a handler; one more is answered `Busy`, as is one with which they would
    have more than the node's `buffer_bytes`."""

    def __post_init__(self) -> None:
        check_count(self.concurrency, "concurrency", 1, 1024)
        check_count(self.backlog, "backlog", 0, limits.OUTSTANDING_MAX)


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is kept. Fixed when it is made, at each of its partitions."""

    durability: Durability = "fsync"
    """What an append waits for. ``fsync``: to be on disk. ``interval``: to be written, and on disk
    within a second. ``os``: to be written; the kernel decides when it is on disk."""

    retention: Retention = "limits"
    """When a record goes. ``limits``: by the three limits that follow. ``acked``: also once every
    group has acknowledged it."""

    keep_bytes: int | None = None
    """Bytes of a partition, beyond which its oldest records go; whole segments of 16 MiB at a time.
    None: as many as come."""

    keep_s: float | None = None
    """Seconds after which a record goes. None: it stays."""

    keep_count: int | None = None
    """Records of a partition. None: as many as come."""

    bytes_max: int | None = None
    """Bytes of a partition; an append beyond them is refused (`LogFull`). Segments have a quarter
    of that, if not 16 MiB, so that `retention` can make room. None: as many as the disk has room
    for."""

    dedup_window_s: float = limits.DEDUP_WINDOW_S
    """How long a ``dedup_id`` is remembered, in seconds. JetStream's default."""

    @property
    def gives_up(self) -> bool:
        """Whether its records go at all."""
        limits_of_it = (self.keep_bytes, self.keep_s, self.keep_count)
        return self.retention == "acked" or any(limit is not None for limit in limits_of_it)

    def __post_init__(self) -> None:
        if self.durability not in get_args(Durability):
            raise InvalidOption(
                f"durability must be 'fsync', 'interval' or 'os', not {self.durability!r}"
            )
        if self.retention not in get_args(Retention):
            raise InvalidOption(f"retention must be 'limits' or 'acked', not {self.retention!r}")
        for option, low in (("keep_bytes", 1), ("keep_count", 1), ("bytes_max", 1024)):
            value = getattr(self, option)
            if value is not None:
                check_count(value, option, low, _MOST)
        for option, seconds in (("keep_s", self.keep_s), ("dedup_window_s", self.dedup_window_s)):
            if seconds is None:
                continue
            if not is_number(seconds) or not 0.001 <= seconds < 1e9:
                raise InvalidOption(f"{option} must be 0.001 to 1e9 s, not {seconds!r}")
