"""Groups of consumers between real nodes: each record is done by somebody, whoever dies."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Literal

import pytest

from mesh import Node
from mesh.durable.consumer import Consumer
from mesh.errors import (
    Closed,
    InvalidName,
    InvalidOption,
    LogFull,
    NoSidecar,
    OptionsDiffer,
    Timeout,
)
from mesh.limits import HEADERS_MAX
from mesh.options import StreamOptions
from tests.mesh.test_streams import kill_and_start_again, sound
from tests.support.processes import Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

HOARDER = """
    import sys, time
    from mesh import Node

    with Node("hoarder") as node:
        consumer = node.stream("orders").consumer("billing", prefetch=10)
        for n in range(3):
            record = consumer.recv(10)
        print("has", record.payload)
        sys.stdin.read()
"""


def take(consumer: Consumer, count: int, *, ack: bool = True) -> list[object]:
    payloads = []
    for _ in range(count):
        record = consumer.recv(10)
        payloads.append(record.payload)
        if ack:
            record.ack()
    return payloads


def has_nothing(consumer: Consumer, within: float = 0.2) -> bool:
    try:
        consumer.recv(within)
    except Timeout:
        return True
    return False


def test_a_group_gets_every_record_and_goes_on_where_it_was(node: Node) -> None:
    orders = node.stream("orders")
    orders.append_many(range(100))
    with orders.consumer("billing") as consumer:
        assert take(consumer, 60) == list(range(60))
        assert consumer.group == "billing"
        assert len(consumer.partitions) == 1
    with orders.consumer("billing") as consumer:
        orders.append("last")
        assert take(consumer, 41) == [*range(60, 100), "last"]
        assert has_nothing(consumer)
        consumer.flush()
        assert list(consumer.committed.values()) == [101]
    with orders.consumer("shipping") as other:
        assert take(other, 101) == [*range(100), "last"]


def test_members_share_the_records(node: Node) -> None:
    orders = node.stream("orders")
    with (
        orders.consumer("billing", prefetch=5) as one,
        orders.consumer("billing", prefetch=5) as two,
    ):
        got: list[list[object]] = [[], []]

        def work(consumer: Consumer, mine: list[object]) -> None:
            try:
                for record in consumer:
                    mine.append(record.payload)
                    record.ack()
            except Closed:
                return

        threads = [
            threading.Thread(target=work, args=pair) for pair in zip((one, two), got, strict=True)
        ]
        for thread in threads:
            thread.start()
        for n in range(200):
            orders.append(n)
        until(lambda: len(got[0]) + len(got[1]) >= 200)
    for thread in threads:
        thread.join(10)
    assert sorted(got[0] + got[1]) == list(range(200))  # type: ignore[type-var]
    assert got[0]
    assert got[1]


def test_what_is_not_acknowledged_comes_again(node: Node) -> None:
    orders = node.stream("orders")
    orders.append_many(["a", "b", "c"])
    with orders.consumer("billing", ack_wait=0.3) as consumer:
        first = consumer.recv(10)
        assert (first.payload, first.deliveries) == ("a", 1)
        take(consumer, 2)
        again = consumer.recv(10)
        assert (again.payload, again.deliveries) == ("a", 2)
        again.ack()
        assert has_nothing(consumer, 0.5)


def test_extending_keeps_a_record(node: Node) -> None:
    orders = node.stream("orders")
    orders.append("slow")
    with orders.consumer("billing", ack_wait=0.4) as consumer:
        record = consumer.recv(10)
        for _ in range(6):
            assert has_nothing(consumer, 0.2)
            record.extend()
        record.ack()
        consumer.flush()
    with orders.consumer("billing") as consumer:
        assert has_nothing(consumer)


def test_a_record_handed_back_comes_again_after_its_delay(node: Node) -> None:
    orders = node.stream("orders")
    orders.append("later")
    with orders.consumer("billing") as consumer:
        consumer.recv(10).nak(delay=0.3)
        began = time.monotonic()
        again = consumer.recv(10)
        assert again.deliveries == 2
        assert time.monotonic() - began > 0.2
        again.nak()
        assert consumer.recv(10).deliveries == 3


def test_what_cannot_be_done_becomes_a_dead_letter(node: Node) -> None:
    orders = node.stream("orders")
    receipt = orders.append({"id": 7}, key="k", headers={"trace": "x"})
    orders.append("poison")
    with orders.consumer("billing", max_deliver=2) as consumer:
        consumer.recv(10).reject("no such customer")
        for _ in range(2):
            consumer.recv(10).nak()
        assert has_nothing(consumer)
        consumer.flush()
    dead = node.stream("orders.dead")
    until(lambda: len(list(dead.replay())) == 2)
    first, second = dead.replay()
    assert (first.payload, first.key) == ({"id": 7}, b"k")
    assert dict(first.headers) == {
        "trace": "x",
        "mesh-stream": "orders",
        "mesh-partition": receipt.partition,
        "mesh-offset": 0,
        "mesh-group": "billing",
        "mesh-deliveries": 1,
        "mesh-reason": "no such customer",
    }
    assert second.payload == "poison"
    assert second.headers["mesh-deliveries"] == 2
    with orders.consumer("billing") as consumer:
        assert has_nothing(consumer)


def test_what_is_said_of_a_record_is_checked_where_it_is_said(node: Node) -> None:
    """And does not stand in the way of what was said of others."""
    orders = node.stream("orders")
    orders.append_many(range(3))
    with orders.consumer("billing") as consumer:
        first, second, third = (consumer.recv(10) for _ in range(3))
        first.ack()
        for delay in ("5", -1, None, 86_401):
            with pytest.raises(InvalidOption, match="delay must be 0 to 86,400 s, not"):
                second.nak(delay=delay)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match="reason must be str, not ValueError"):
            second.reject(ValueError("no such file"))  # type: ignore[arg-type]
        second.ack()
        third.reject("there is no file '\udcff'")
        consumer.flush()
        assert list(consumer.committed.values()) >= [2]
    until(lambda: len(list(node.stream("orders.dead").replay())) == 1)
    (letter,) = node.stream("orders.dead").replay()
    assert letter.headers["mesh-reason"] == "there is no file '\\udcff'"


def test_a_dead_letter_says_why_beside_as_many_headers_as_a_record_may_have(node: Node) -> None:
    orders = node.stream("orders")
    headers = {f"h{n}": n for n in range(HEADERS_MAX)}
    orders.append("a", headers=headers)
    with orders.consumer("billing") as consumer:
        consumer.recv(10).reject("no")
        with node.stream("orders.dead").consumer("people") as people:
            letter = people.recv(10)
            assert letter.headers["mesh-reason"] == "no"
            assert {**letter.headers, **headers} == letter.headers


def test_a_delayed_record_waits_for_its_time(node: Node) -> None:
    orders = node.stream("orders")
    with orders.consumer("billing") as consumer:
        orders.append("later", delay=0.4)
        orders.append("now")
        assert take(consumer, 2) == ["now", "later"]


def test_the_records_of_a_key_are_done_in_order(node: Node) -> None:
    orders = node.stream("orders")
    for n in range(60):
        orders.append([n % 3, n], key=str(n % 3))
    done: list[tuple[int, int]] = []
    with (
        orders.consumer("billing", order="key", prefetch=4) as one,
        orders.consumer("billing", order="key", prefetch=4) as two,
    ):

        def work(consumer: Consumer) -> None:
            for record in consumer:
                done.append(tuple(record.payload))
                record.ack()

        threads = [threading.Thread(target=work, args=(each,)) for each in (one, two)]
        for thread in threads:
            thread.start()
        until(lambda: len(done) >= 60)
    for thread in threads:
        thread.join(10)
    for key in range(3):
        assert [n for k, n in done if k == key] == list(range(key, 60, 3))


@pytest.mark.parametrize("order", ["key", "exclusive"])
def test_what_is_handed_back_is_not_overtaken_by_what_was_here_already(
    node: Node, order: Literal["key", "exclusive"]
) -> None:
    orders = node.stream("orders")
    for n in range(40):
        orders.append([n % 2, n], key=str(n % 2))
    done: list[list[int]] = []
    with orders.consumer("billing", order=order, prefetch=30) as consumer:
        while len(done) < 40:
            record = consumer.recv(10)
            if record.payload[1] in (4, 6, 33) and record.deliveries < 3:
                record.nak(delay=0.1 if record.payload[1] == 6 else 0)
            else:
                done.append(record.payload)
                record.ack()
        assert has_nothing(consumer)
    for key in range(2):
        assert [n for k, n in done if k == key] == list(range(key, 40, 2))
    if order == "exclusive":
        assert [n for _, n in done] == list(range(40))


def test_what_has_no_key_is_not_recalled_with_what_is_handed_back(node: Node) -> None:
    orders = node.stream("orders")
    for n in range(6):
        orders.append(n, key=None if n % 2 else "k")
    with orders.consumer("billing", order="key") as consumer:
        consumer._core.about_to_wait()
        until(lambda: len(consumer._core._inbox) == 6)
        for _ in range(2):
            consumer.recv(10).nak(delay=0.2)
        done = take(consumer, 6)
        assert done[:2] == [3, 5]
        assert [n for n in done if n in (0, 2, 4)] == [0, 2, 4]


@pytest.mark.slow
def test_a_log_that_is_killed_brings_all_again_that_is_behind_what_was_handed_back(
    tmp_path: Path, programs: Programs
) -> None:
    sidecar = programs.start(SIDECAR, str(tmp_path / "log"))
    sidecar.expect("ready")
    with Node("worker") as node:
        orders = node.stream("orders")
        orders.append_many(range(20))
        with orders.consumer("billing", order="exclusive") as consumer:
            done = take(consumer, 5)
            consumer.recv(10).nak(delay=60)
            consumer.flush()
            kill_and_start_again(sidecar, programs, tmp_path / "log")
            assert done + take(consumer, 15) == list(range(20))


def test_of_exclusive_members_one_has_all_and_another_takes_over(node: Node) -> None:
    orders = node.stream("orders")
    orders.append_many(range(10))
    one = orders.consumer("billing", order="exclusive")
    assert take(one, 5) == [0, 1, 2, 3, 4]
    with orders.consumer("billing", order="exclusive") as two:
        assert has_nothing(two)
        one.close()
        assert take(two, 5) == [5, 6, 7, 8, 9]


def test_a_group_may_begin_with_what_comes(node: Node) -> None:
    orders = node.stream("orders")
    orders.append("past")
    with orders.consumer("billing", start="latest") as consumer:
        assert has_nothing(consumer)
        orders.append("new")
        assert take(consumer, 1) == ["new"]


def test_positions_of_the_users_own_settle_what_is_before_them(node: Node) -> None:
    orders = node.stream("orders")
    orders.append_many(range(10))
    with orders.consumer("billing", order="exclusive") as consumer:
        for _ in range(4):
            position = consumer.recv(10).position  # into the database; no ack
    with orders.consumer("billing", order="exclusive") as consumer:
        consumer.resume_from([position])
        assert take(consumer, 6) == [4, 5, 6, 7, 8, 9]
        with pytest.raises(InvalidOption, match="before its first recv"):
            consumer.resume_from([position])


@pytest.mark.slow
def test_positions_come_in_time_however_long_it_took_to_read_them(node: Node) -> None:
    orders = node.stream("orders")
    receipt = orders.append_many(range(10))[0]
    with orders.consumer("billing", order="exclusive") as consumer:
        ticks: list[None] = []
        tick = consumer._core.tick
        consumer._core.tick = lambda: (ticks.append(None), tick())  # type: ignore[assignment, func-returns-value]
        until(lambda: len(ticks) == 2)
        consumer.resume_from([(receipt.partition, 3)])
        assert take(consumer, 6) == [4, 5, 6, 7, 8, 9]


def test_positions_are_heeded_by_a_group_that_is_new(node: Node) -> None:
    orders = node.stream("orders")
    receipt = orders.append_many(range(10))[0]
    with orders.consumer("another", order="exclusive") as consumer:
        consumer.resume_from([(receipt.partition, 6), ("0123456789abcdef", 3)])
        assert take(consumer, 3) == [7, 8, 9]


def test_positions_that_cannot_be_relied_on_are_refused(node: Node) -> None:
    orders = node.stream("orders", options=StreamOptions(durability="interval"))
    partition = orders.append("x").partition
    with orders.consumer("billing", order="exclusive") as consumer:
        consumer.resume_from([])
        with pytest.raises(InvalidOption, match="durability='fsync', not 'interval'"):
            consumer.recv(10)
    for bad in ((partition[:4], 5), (partition, -1), (partition, "5"), (7, 5)):
        with (
            orders.consumer("billing", order="exclusive") as consumer,
            pytest.raises(InvalidOption, match="is a partition of 16 digits and an offset"),
        ):
            consumer.resume_from([bad])  # type: ignore[list-item]
    for order, text in (("key", "not 'key'"), (None, "and none was given")):
        with (
            orders.consumer("billing", order=order) as consumer,  # type: ignore[arg-type]
            pytest.raises(InvalidOption, match=f"which takes order='exclusive', {text}$"),
        ):
            consumer.resume_from([(partition, 0)])


@pytest.mark.slow
def test_a_full_stream_has_room_again_when_what_it_held_is_done(node: Node) -> None:
    options = StreamOptions(retention="acked", bytes_max=20_000)
    orders = node.stream("orders", options=options)
    with orders.consumer("billing") as consumer:

        def has_room() -> bool:
            try:
                orders.append(b"x" * 1000)
            except LogFull:
                return False
            return True

        count = 0
        while has_room():
            count += 1
        take(consumer, count)
        consumer.flush()
        until(has_room)
        take(consumer, 1)


def test_an_acked_stream_keeps_only_what_somebody_has_to_do(node: Node, tmp_path: Path) -> None:
    orders = node.stream("orders", options=StreamOptions(retention="acked"))
    with orders.consumer("billing", prefetch=4096) as consumer:
        orders.append_many([b"x" * 1000] * 40_000, timeout=60)
        take(consumer, 40_000)
        consumer.flush()
        segments = tmp_path / "log" / "streams" / "orders"
        until(lambda: len(list(segments.glob("*.log"))) == 1)
        orders.append("next")
        assert take(consumer, 1) == ["next"]


@pytest.mark.slow
def test_a_full_work_queue_goes_on_as_its_records_are_acknowledged(node: Node) -> None:
    options = StreamOptions(retention="acked", bytes_max=40_000_000)
    orders = node.stream("orders", when_full="wait", options=options)
    count = 60_000
    with orders.consumer("billing", prefetch=4096) as consumer:
        appending = threading.Thread(
            target=lambda: orders.append_many([b"x" * 1000] * count, timeout=60)
        )
        appending.start()
        appending.join(1)
        assert appending.is_alive(), "what there is room for is two thirds"
        take(consumer, count)
        appending.join(10)
        assert not appending.is_alive()


def test_bad_options_of_a_group_are_refused(node: Node) -> None:
    orders = node.stream("orders")
    orders.append("x")
    for options, error, text in (
        ({"group": "a*"}, InvalidName, r"group name 'a\*' has a wildcard"),
        ({"order": "random"}, InvalidOption, "order must be"),
        ({"ack_wait": 0}, InvalidOption, "ack_wait must be 0.05 to 86,400 s, not 0"),
        ({"max_deliver": -1}, InvalidOption, "max_deliver must be"),
        ({"prefetch": 0}, InvalidOption, "prefetch must be"),
        ({"start": 7}, InvalidOption, "starts at 'earliest' or 'latest', not 7"),
    ):
        with pytest.raises(error, match=text):
            orders.consumer(**{"group": "billing", **options})  # type: ignore[arg-type]
    with orders.consumer("billing", order="key") as consumer:
        take(consumer, 1)
    other = orders.consumer("billing", order="any")
    with other, pytest.raises(OptionsDiffer, match="created with order='key', not 'any'"):
        other.recv(10)
    other = orders.consumer("billing", ack_wait=7)
    with other, pytest.raises(OptionsDiffer, match=r"created with ack_wait=30\.0, not 7"):
        other.recv(10)


def test_a_consumer_that_is_closed_hands_out_nothing_more(node: Node) -> None:
    """What it had is with others by then."""
    orders = node.stream("orders")
    orders.append_many(range(3))
    with orders.consumer("billing") as first:
        take(first, 1)
    assert list(first) == []
    with pytest.raises(Closed):
        first.recv(0)
    with orders.consumer("billing") as second:
        assert take(second, 2) == [1, 2]


def test_who_forgets_to_acknowledge_is_told_that_it_waits_for_that(node: Node) -> None:
    orders = node.stream("orders")
    orders.append_many(range(10))
    with orders.consumer("billing", prefetch=4) as consumer:
        records = [consumer.recv(10) for _ in range(4)]
        text = r"no record within 0\.1 s: 4 that came before were not settled, and no more than 4 "
        with pytest.raises(Timeout, match=text):
            consumer.recv(0.1)
        for _ in range(2):  # what is said twice of a record counts once
            records[0].ack()
        records[1].nak(delay=60)
        records[2].reject("bad")
        late = [consumer.recv(10) for _ in range(3)]
        with pytest.raises(Timeout, match="4 that came before were not settled"):
            consumer.recv(0.1)
        for record in (records[3], *late):
            record.ack()
        take(consumer, 3)
        with pytest.raises(Timeout, match=r"no record within 0\.1 s$"):
            consumer.recv(0.1)


def test_waiting_for_a_stream_that_nobody_has_says_so(node: Node) -> None:
    with node.stream("oders").consumer("billing") as consumer:
        for timeout, within in ((0.05, "within 0.05 s"), (0, "at once")):
            with pytest.raises(NoSidecar, match=f"no record {within}: nobody has a stream 'oders'"):
                consumer.recv(timeout)
        with pytest.raises(NoSidecar):
            asyncio.run(consumer.arecv(0.05))
        node.stream("oders").append("x")
        assert take(consumer, 1) == ["x"]
        with pytest.raises(Timeout) as waited:
            consumer.recv(0.05)
        assert type(waited.value) is Timeout


def test_asyncio_consumes_as_well(node: Node) -> None:
    async def main() -> None:
        orders = node.stream("orders")
        await orders.aappend_many(range(50))
        async with orders.consumer("billing") as consumer:
            got = []
            async for record in consumer:
                got.append(record.payload)
                record.ack()
                if len(got) == 50:
                    break
            assert got == list(range(50))
            await consumer.aflush()
            with pytest.raises(Timeout):
                await consumer.arecv(0.1)

    asyncio.run(main())


# -- Whoever dies


@pytest.mark.slow
def test_a_dead_members_records_go_to_others_at_once(tmp_path: Path, programs: Programs) -> None:
    with Node("writer", durable=tmp_path / "log") as node:
        orders = node.stream("orders")
        orders.append_many(range(10))
        hoarder = programs.start(HOARDER)
        hoarder.expect("has 2")
        with orders.consumer("billing") as consumer:
            assert has_nothing(consumer)
            hoarder.kill()
            killed = time.monotonic()
            assert sorted(take(consumer, 10)) == list(range(10))  # type: ignore[type-var]
            assert time.monotonic() - killed < 5, "long before ack_wait"


@pytest.mark.slow
def test_a_group_survives_its_sidecar_being_killed(tmp_path: Path, programs: Programs) -> None:
    """What was acknowledged and flushed does not come again; the rest does."""
    sidecar = programs.start(SIDECAR, str(tmp_path / "log"))
    sidecar.expect("ready")
    with Node("worker") as node:
        orders = node.stream("orders")
        orders.append_many(range(100))
        with orders.consumer("billing", prefetch=10) as consumer:
            done = take(consumer, 50)
            consumer.flush()
            sidecar = kill_and_start_again(sidecar, programs, tmp_path / "log")
            while len(done) < 100:
                done += take(consumer, 1)
            assert done[:50] == list(range(50))
            assert sorted(done) == list(range(100))  # type: ignore[type-var]
            consumer.flush()
            assert has_nothing(consumer)
    sidecar.tell()
    sidecar.process.stdin.close()  # type: ignore[union-attr]
    sidecar.process.wait(10)
    sound(tmp_path / "log")


@pytest.mark.slow
def test_consumers_cover_all_partitions_also_those_that_come_later(tmp_path: Path) -> None:
    with Node("a", durable=tmp_path / "a") as a, Node("worker") as worker:
        a.stream("orders").append("a")
        with worker.stream("orders").consumer("billing") as consumer:
            assert take(consumer, 1) == ["a"]
            with Node("b", durable=tmp_path / "b") as b:
                b.stream("orders").append("b")
                assert take(consumer, 1) == ["b"]
                assert len(consumer.partitions) == 2
            a.stream("orders").append("a again")
            assert take(consumer, 1) == ["a again"]
