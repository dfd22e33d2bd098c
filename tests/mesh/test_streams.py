"""Streams between real nodes, on real disks: appended, replayed, and there after whatever ends."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mesh import Node
from mesh.durable.appending import Appending
from mesh.durable.check import check
from mesh.durable.replay import Replay
from mesh.durable.sidecar import Sidecar
from mesh.durable.storage import Disk
from mesh.durable.stream import Stream
from mesh.errors import (
    Closed,
    InvalidName,
    InvalidOption,
    LogFull,
    LogLocked,
    NoSidecar,
    NotSerializable,
    OptionsDiffer,
    PayloadTooLarge,
    ProducerFenced,
    StorageFailed,
    Timeout,
)
from mesh.message import Receipt
from mesh.options import StreamOptions
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

NAMED = SIDECAR.replace('"sidecar", durable=sys.argv[1]', "sys.argv[1], durable=sys.argv[2]")


def sound(directory: Path) -> None:
    """What a check of every log there finds, which is nothing amiss."""
    number = int((directory / "identity").read_text(), 16)
    for folder in (directory / "streams").iterdir():
        report = check(Disk(folder), number)
        assert not report.findings, report.findings


# -- Appending


def test_an_append_returns_where_its_record_is(node: Node) -> None:
    orders = node.stream("orders")
    receipt = orders.append({"id": 7}, key="customer-7842", headers={"trace": "x"})
    assert receipt == Receipt(receipt.partition, 0, 1, receipt.time_ns, "fsynced", False)
    assert len(receipt.partition) == 16
    assert orders.append(b"more").offset == 1
    first, second = orders.replay()
    assert (first.payload, first.key, first.headers) == (
        {"id": 7},
        b"customer-7842",
        {"trace": "x"},
    )
    assert (first.stream, first.partition, first.offset) == ("orders", receipt.partition, 0)
    assert first.time_ns == receipt.time_ns
    assert (second.payload, second.key, dict(second.headers)) == (b"more", None, {})


def test_many_records_are_appended_in_order_in_ranges(node: Node) -> None:
    orders = node.stream("orders")
    receipts = orders.append_many(range(5000))
    assert [(each.offset, each.count) for each in receipts] == [(0, 5000)]
    assert [record.payload for record in orders.replay()] == list(range(5000))
    assert orders.bounds() == {receipts[0].partition: (0, 5000)}
    assert orders.append_many([]) == []
    for one in ("abc", b"abc", {"id": 7}):
        with pytest.raises(InvalidOption, match="append_many takes several payloads"):
            orders.append_many(one)
    (bounds,) = orders.bounds().values()
    assert bounds == (0, 5000)


def test_each_of_many_records_may_have_its_key(node: Node) -> None:
    orders = node.stream("orders")
    (receipt,) = orders.append_many(range(5000), key=lambda n: f"customer-{n}" if n % 2 else None)
    assert (receipt.offset, receipt.count) == (0, 5000)
    read = [(record.payload, record.key) for record in orders.replay()]
    assert read == [(n, b"customer-%d" % n if n % 2 else None) for n in range(5000)]
    with pytest.raises(InvalidOption, match="key must be str or bytes, not int"):
        orders.append_many([1], key=lambda n: n)


def test_each_of_many_records_may_have_its_headers(node: Node) -> None:
    orders = node.stream("orders")

    def traced(n: int) -> dict[str, object] | None:
        return {"trace": f"t-{n}", "n": n} if n % 3 else None

    def keyed(n: int) -> str | None:
        return f"customer-{n}" if n % 2 else None

    (receipt,) = orders.append_many(range(3000), headers=traced)
    assert (receipt.offset, receipt.count) == (0, 3000)
    asyncio.run(orders.aappend_many(range(3000, 5000), key=keyed, headers=traced))
    read = [(record.payload, record.key, dict(record.headers)) for record in orders.replay()]
    assert read == [
        (n, b"customer-%d" % n if n >= 3000 and n % 2 else None, traced(n) or {})
        for n in range(5000)
    ]


def test_headers_of_many_that_cannot_be_are_told_as_those_of_one_are(node: Node) -> None:
    orders = node.stream("orders")
    with pytest.raises(NotSerializable, match="headers must be a mapping, not str"):
        orders.append_many([1], headers=lambda _: "t")  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidOption, match=r"headers takes a function, not \{'trace': '7'\}"):
        orders.append_many([1], headers={"trace": "7"})  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        orders.append_many([0], headers=lambda n: {"share": 1 / n})
    assert orders.append("x").offset == 0, "and nothing was appended"


def test_appends_under_way_are_waited_for_later(node: Node) -> None:
    orders = node.stream("orders")
    under_way = [orders.append_nowait(n) for n in range(300)]
    assert all(isinstance(each, Appending) for each in under_way)
    assert [each.wait(10).offset for each in under_way] == list(range(300))
    assert all(each.done for each in under_way)
    orders.append_nowait("last")
    orders.flush()
    assert [record.payload for record in orders.replay()] == [*range(300), "last"]


def test_appends_that_share_a_batch_have_each_its_receipt(node: Node) -> None:
    orders = node.stream("orders")
    under_way = [orders.append_nowait(n, key=str(n) if n % 50 == 0 else None) for n in range(2000)]
    assert [each.wait(10).offset for each in reversed(under_way)] == list(reversed(range(2000)))
    assert [record.payload for record in orders.replay()] == list(range(2000))


@pytest.mark.slow
def test_appends_go_on_by_themselves_though_nobody_waits_for_them(node: Node) -> None:
    orders = node.stream("orders")
    for n in range(1000):
        orders.append_nowait(n)
    until(lambda: orders.bounds()[next(iter(orders.bounds()))][1] == 1000)


def test_asyncio_has_the_same(node: Node) -> None:
    async def main() -> None:
        orders = node.stream("orders")
        assert (await orders.aappend(0)).offset == 0
        await asyncio.gather(*(orders.aappend(n) for n in range(1, 100)))
        assert (await orders.append_nowait("nowait")).offset == 100
        (receipt,) = await orders.aappend_many(["many", "more"])
        assert (receipt.offset, receipt.count) == (101, 2)
        assert await orders.abounds() == {receipt.partition: (0, 103)}
        await orders.aflush()
        records = [record.payload async for record in orders.replay()]
        assert records == [*range(100), "nowait", "many", "more"]

    asyncio.run(main())


def test_threads_share_a_handle(node: Node) -> None:
    orders = node.stream("orders")

    def append(thread: int) -> None:
        for n in range(100):
            orders.append([thread, n])

    threads = [threading.Thread(target=append, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    records = [tuple(record.payload) for record in orders.replay()]
    assert sorted(records) == [(thread, n) for thread in range(8) for n in range(100)]
    for number in range(8):
        assert [n for thread, n in records if thread == number] == list(range(100))


def test_a_dedup_id_is_appended_once(node: Node) -> None:
    orders, others = node.stream("orders"), node.stream("orders")
    first = orders.append("a", dedup_id="order-7")
    again = others.append("b", dedup_id="order-7")
    assert (again.offset, again.time_ns, again.repeated) == (first.offset, first.time_ns, True)
    assert others.append("c").offset == 1
    assert [record.payload for record in orders.replay()] == ["a", "c"]


def test_what_was_made_of_a_record_is_appended_once(node: Node) -> None:
    orders, bills = node.stream("orders"), node.stream("bills")
    orders.append_many(["a", "b"])
    for _ in range(2):  # as if a crash had come between the append and the acknowledgement
        with orders.consumer("billing") as consumer:
            for _ in range(2):
                record = consumer.recv(10)
                for output in range(2):
                    bills.append([record.payload, output], derived_from=record, output=output)
                record.nak()
    assert [each.payload for each in bills.replay()] == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]
    with pytest.raises(InvalidOption, match="derived_from takes a record"):
        bills.append("x", derived_from="a")  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_was_made_of_a_record_is_appended_once_wherever_it_is_made_again(
    tmp_path: Path,
) -> None:
    """Each of the two would append to the log in its own process, which does not know the other."""
    with Node("a", durable=tmp_path / "a") as a, Node("b", durable=tmp_path / "b") as b:
        home = a.stream("orders").append_many(range(4))[0].partition
        for node in (a, b):
            bills = node.stream("bills")
            with node.stream("orders").consumer("billing") as consumer:
                records = [consumer.recv(10) for _ in range(4)]
                under_way = [
                    bills.append_nowait(each.payload, derived_from=each) for each in records
                ]
                plain = bills.append("plain").partition
                assert (plain == home) == (node is a), "what is made of nothing stays near"
                receipts = [each.wait(10) for each in under_way]
                assert {each.partition for each in receipts} == {home}
                assert {each.repeated for each in receipts} == {node is b}
                again = asyncio.run(bills.aappend("x", derived_from=records[0]))
                assert (again.partition, again.repeated) == (home, True)
                bills.flush()
                for each in records:
                    each.nak()
        found = [each.payload for each in a.stream("bills").replay(partitions=2)]
        assert sorted(n for n in found if n != "plain") == [0, 1, 2, 3]
        pinned = b.stream("bills", home=plain)
        assert not pinned.append(0, derived_from=records[0]).repeated, "where it was asked to be"


def test_bad_input_is_refused_before_anything_is_appended(node: Node) -> None:
    orders = node.stream("orders")
    for payload, options, error in (
        (object(), {}, NotSerializable),
        (b"x" * (65 << 20), {}, PayloadTooLarge),
        ("x", {"key": 7}, InvalidOption),
        ("x", {"key": "k" * 2000}, NotSerializable),
        ("x", {"headers": {1: 2}}, NotSerializable),
        ("x", {"dedup_id": ""}, InvalidOption),
        ("x", {"delay": -1}, InvalidOption),
        ("x", {"timeout": -1}, InvalidOption),
    ):
        with pytest.raises(error):
            orders.append(payload, **options)
    with pytest.raises(NotSerializable, match="the key has 2,000 bytes over the limit of 1,024"):
        orders.append("x", key="k" * 2000)
    with pytest.raises(InvalidOption, match="delay must be 0 to 31,536,000 s, not '5'"):
        orders.append("x", delay="5")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="key takes a function, not 'k'"):
        orders.append_many(["x"], key="k")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="options must be StreamOptions or None, not"):
        node.stream("orders", options={})  # type: ignore[arg-type]
    for given in ({"start": "soon"}, {"start": 3}, {"start": datetime.datetime(2026, 1, 1)}):  # noqa: DTZ001
        with pytest.raises(InvalidOption):
            orders.replay(**given)
    orders.append("x")
    assert [record.payload for record in orders.replay()] == ["x"]


def test_a_stream_has_the_options_it_was_made_with(node: Node) -> None:
    node.stream("orders", options=StreamOptions(keep_count=10)).append("x")
    node.stream("orders").append("y")
    with pytest.raises(OptionsDiffer, match="keep_count=10, not None"):
        node.stream("orders", options=StreamOptions()).append("z")


def test_a_full_stream_refuses_and_says_so(node: Node) -> None:
    orders = node.stream("orders", options=StreamOptions(bytes_max=10_000))
    orders.append_many([b"x" * 1000] * 9)
    with pytest.raises(LogFull, match="bytes_max"):
        orders.append(b"x" * 1000)
    count = len(list(orders.replay()))
    assert count == 9
    assert orders.append(b"small").offset == count, "and what has room goes in"


def test_what_is_larger_than_a_stream_may_be_is_refused_though_it_would_wait(node: Node) -> None:
    orders = node.stream("orders", when_full="wait", options=StreamOptions(bytes_max=10_000))
    with pytest.raises(LogFull, match="11,"):
        orders.append(b"x" * 11_000)
    assert orders.append("y").offset == 0


def test_an_append_waits_for_room_if_it_is_to(node: Node) -> None:
    orders = node.stream("orders", when_full="wait", options=StreamOptions(bytes_max=10_000))
    orders.append_many([b"x" * 1000] * 9)
    with pytest.raises(Timeout):
        orders.append(b"y" * 1000, timeout=0.2)
    with pytest.raises(InvalidOption, match="when_full must be 'refuse' or 'wait', not 'drop'"):
        node.stream("orders", when_full="drop")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_timeout_names_what_was_given_and_not_what_was_left_of_it(node: Node) -> None:
    """Each of these waits more than once."""
    orders = node.stream("orders", when_full="wait", options=StreamOptions(bytes_max=10_000))
    orders.append_many([b"x" * 1000] * 9)
    large = b"y" * 1000
    no_receipt, no_end = (
        "no receipt within 0.2 s",
        "no answer to all appends to stream 'orders' within 0.2 s",
    )
    for wait, text in (
        (lambda: orders.append(large, timeout=0.2), no_receipt),
        (lambda: orders.append_nowait(large).wait(0.2), no_receipt),
        (lambda: orders.append_many([large], timeout=0.2), no_receipt),
        (lambda: orders.flush(timeout=0.2), no_end),
        (lambda: asyncio.run(orders.aappend(large, timeout=0.2)), no_receipt),
        (lambda: asyncio.run(orders.aappend_many([large], timeout=0.2)), no_receipt),
        (lambda: asyncio.run(orders.aflush(timeout=0.2)), no_end),
    ):
        with pytest.raises(Timeout) as late:
            wait()
        assert str(late.value) == text


def test_what_was_refused_leaves_no_hole_in_what_follows(node: Node) -> None:
    orders = node.stream("orders", options=StreamOptions(bytes_max=10_500))
    under_way = [
        orders.append_nowait(b"x" * 3000 if n % 3 == 0 else b"y", dedup_id=str(n))
        for n in range(30)
    ]
    outcomes: list[object] = []
    for each in under_way:
        try:
            outcomes.append(each.wait(10).offset)
        except LogFull:
            outcomes.append(None)
    written = [n for n, offset in enumerate(outcomes) if offset is not None]
    assert [outcomes[n] for n in written] == list(range(len(written)))
    assert None in outcomes
    assert max(written) > outcomes.index(None), "what was small had room still"
    read = [record.payload for record in orders.replay()]
    assert read == [b"x" * 3000 if n % 3 == 0 else b"y" for n in written]


def test_a_named_producer_goes_on_and_fences_the_run_before(node: Node) -> None:
    early = node.stream("orders", producer="importer")
    early.append("a")
    late = node.stream("orders", producer="importer")
    late.append("b")
    with pytest.raises(ProducerFenced):
        early.append("c")
    with pytest.raises(ProducerFenced):
        early.append("d")
    assert [record.payload for record in late.replay()] == ["a", "b"]


def test_a_stream_tells_what_it_holds_and_how_far_its_groups_have_come(node: Node) -> None:
    orders = node.stream("orders", options=StreamOptions(bytes_max=20_000))
    partition = orders.append_many(range(10))[0].partition
    with pytest.raises(LogFull):
        orders.append(b"x" * 30_000)
    with orders.consumer("billing") as consumer:
        records = [consumer.recv(10) for _ in range(5)]
        records[0].ack()
        records[1].nak()
        records[2].reject("never")
        assert consumer.recv(10).offset == 5
        consumer.flush()
        until(lambda: orders.stats()[partition].groups["billing"].committed == 1)
        (found,) = orders.stats().values()
        assert (found.start, found.end, found.records) == (0, 10, 10)
        assert found.segments == 2, "there was to be room for what was refused then"
        assert 100 < found.bytes < 2000
        assert (found.refused, found.failures, found.torn_bytes) == ({"large": 1}, 0, 0)
        billing = found.groups["billing"]
        assert (billing.lag, billing.members, billing.counters["dead"]) == (9, 1, 1)
        assert 2 < billing.in_flight <= 8
        until(lambda: orders.stats()[partition].groups["billing"].counters.get("redelivered"))
    assert asyncio.run(orders.astats())[partition].records == 10
    with pytest.raises(NoSidecar):
        node.stream("others").stats(timeout=0.1)


def test_what_the_sidecar_of_a_node_refuses_is_in_its_counters(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        orders = node.stream("orders", options=StreamOptions(bytes_max=2000))
        for _ in range(2):
            with pytest.raises(LogFull):
                orders.append(b"x" * 3000)
        assert node.stats().dropped["append large"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("of", ["sidecar", "reader"])
def test_whatever_a_node_lets_in_it_reads_and_consumes(
    of: str, tmp_path: Path, programs: Programs
) -> None:
    """Small records and large ones behind each other are more than one message may have."""
    bytes_max = 200_000
    program = SIDECAR
    if of == "sidecar":
        program = SIDECAR.replace("sys.argv[1])", f"sys.argv[1], message_bytes_max={bytes_max})")
    programs.start(program, str(tmp_path / "log")).expect("ready")
    payloads = [b"s" * 100_000, b"l" * 199_000, *[b"t" * 1000] * 1000, b"l" * 199_000]
    with Node("writer", message_bytes_max=bytes_max) as node:
        orders = node.stream("orders")
        for payload in payloads:
            orders.append_nowait(payload)
        orders.flush()
        assert [record.payload for record in orders.replay()] == payloads
        with orders.consumer("billing") as consumer:
            for payload in payloads:
                record = consumer.recv(10)
                assert record.payload == payload
                record.ack()


# -- Sidecars


def test_without_a_sidecar_it_says_what_to_do() -> None:
    with Node("writer") as node:
        began = time.monotonic()
        with pytest.raises(NoSidecar, match="mesh sidecar") as error:
            node.stream("orders").append("x", timeout=0.3)
        assert isinstance(error.value, Timeout)
        assert 0.25 < time.monotonic() - began < 5
        text = r"no partition within 0\.1 s: nobody has a stream 'orders': nothing was appended"
        with pytest.raises(NoSidecar, match=text):
            node.stream("orders").bounds(timeout=0.1)  # what is left of it is a little less
        with pytest.raises(NoSidecar, match="nobody has a stream 'orders'"):
            list(node.stream("orders").replay(timeout=0.1))


def test_who_appends_before_there_is_a_sidecar_waits_for_one(
    tmp_path: Path, programs: Programs
) -> None:
    with Node("writer") as node:
        receipts: list[Receipt] = []
        thread = threading.Thread(
            target=lambda: receipts.append(node.stream("orders").append("x", timeout=30))
        )
        thread.start()
        programs.start(SIDECAR, str(tmp_path / "log")).expect("ready")
        thread.join(30)
        assert [each.offset for each in receipts] == [0]


@pytest.mark.slow
def test_all_appends_go_to_the_node_that_is_named_and_stay_at_its_partition(
    tmp_path: Path, programs: Programs
) -> None:
    sidecars = {}
    for name in ("kitchen", "cellar"):
        sidecars[name] = programs.start(NAMED, name, str(tmp_path / name))
        sidecars[name].expect("ready")
    with Node("writer") as node:
        at = {name: node.stream("orders", home=name) for name in sidecars}
        partitions = {name: at[name].append(name).partition for name in sidecars}
        for name, partition in partitions.items():
            assert partition == (tmp_path / name / "identity").read_text().strip()
            assert node.stream("orders", home=partition).append("by id").partition == partition
            for start in ("earliest", 0):
                read = [r.payload for r in at[name].replay(start, partition=name)]
                assert read == [name, "by id"]
        for program in sidecars.values():  # the names are given the other way round
            program.kill()
            program.finish()
        programs.start(NAMED, "kitchen", str(tmp_path / "cellar")).expect("ready")
        moved = node.stream("orders", home="kitchen").append("new")
        assert moved.partition == partitions["cellar"]
        later = at["kitchen"].append_nowait("later")
        programs.start(NAMED, "cellar", str(tmp_path / "kitchen")).expect("ready")
        assert later.wait(10).partition == partitions["kitchen"]


@pytest.mark.slow
def test_of_two_nodes_of_one_name_none_is_guessed(tmp_path: Path, programs: Programs) -> None:
    partitions = []
    for folder in ("a", "b"):
        programs.start(NAMED, "kitchen", str(tmp_path / folder)).expect("ready")
        partitions.append((tmp_path / folder / "identity").read_text().strip())
    with Node("writer") as node:
        node.wait_for_peers(2, timeout=10)
        orders = node.stream("orders", home="kitchen")
        both = " or ".join(sorted(partitions))
        for partition in partitions:
            node.stream("orders", home=partition).append("x")
        with pytest.raises(InvalidOption, match=f"'kitchen' is the name of 2 nodes .* {both}"):
            orders.append("x")
        until(lambda: len(orders.bounds()) == 2)
        with pytest.raises(InvalidOption, match=both):
            list(orders.replay(partition="kitchen"))
        with pytest.raises(NoSidecar, match=rf"'attic' was not found .*{partitions[0]} \(kitchen"):
            node.stream("orders", home="attic").append("x", timeout=0.1)


def test_what_looks_like_a_partition_is_none_of_the_names_of_nodes(tmp_path: Path) -> None:
    with Node("0123456789abcdef", durable=tmp_path / "a") as node:
        with pytest.raises(NoSidecar, match=r"was not found .*\(0123456789abcdef\)"):
            node.stream("orders", home="0123456789abcdef").append("x", timeout=0.2)
        with pytest.raises(InvalidName):
            node.stream("orders", home="")
        with pytest.raises(InvalidName):
            node.stream("orders").replay(partition="")


def test_a_node_may_name_itself_as_the_home_of_its_appends(tmp_path: Path) -> None:
    with Node("shop", durable=tmp_path / "a") as shop, Node("other", durable=tmp_path / "b"):
        shop.wait_for_peers(1, timeout=10)
        own = (tmp_path / "a" / "identity").read_text().strip()
        other = (tmp_path / "b" / "identity").read_text().strip()
        assert shop.stream("orders", home="shop").append("x").partition == own
        assert shop.stream("orders", home="other").append("x").partition == other


def test_one_process_has_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    text = f"{path} is in use by process {os.getpid()}: nodes without `durable` find it"
    with Node("one", durable=path), pytest.raises(LogLocked, match=text):
        Node("other", durable=path)
    with Node("other", durable=tmp_path / "log") as node:
        node.stream("orders").append("x")


def test_where_no_log_can_be_the_node_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, why in (("file", ", which is no directory$"), ("file/log", ": .*Errno")):
        with pytest.raises(StorageFailed, match=f"no log can be kept in {tmp_path / place}{why}"):
            Node("one", durable=tmp_path / place)
    for nothing in (7, "", b"log"):
        with pytest.raises(InvalidOption, match="durable must be the path of a directory, not"):
            Node("one", durable=nothing)  # type: ignore[arg-type]


def test_a_stream_whose_dead_letters_would_have_no_place_is_not_made(node: Node) -> None:
    for name in ("x" * 255, "заказы" * 7):
        with pytest.raises(InvalidOption, match=r"leaves no room for .*where its dead letters go"):
            node.stream(name).append(1)
    for name in ("x" * 248, "заказы" * 6, "x" * 248 + ".dead"):
        assert node.stream(name).append(1).offset == 0


def test_a_handle_that_is_closed_asks_nothing(node: Node) -> None:
    orders = node.stream("orders")
    orders.append("x")
    orders.close()
    for ask in (orders.bounds, orders.stats, orders.replay, lambda: orders.append("y")):
        with pytest.raises(Closed, match="stream 'orders' is closed"):
            ask()
    for aask in (orders.abounds, orders.astats):
        with pytest.raises(Closed, match="stream 'orders' is closed"):
            asyncio.run(aask())


def test_a_stream_is_there_after_its_node_has_closed(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path / "log") as node:
        receipt = node.stream("orders").append("x")
    with Node("two", durable=tmp_path / "log") as node:
        (record,) = node.stream("orders").replay()
        assert (record.partition, record.offset) == (receipt.partition, 0)
        assert node.stream("orders").append("y").offset == 1
    sound(tmp_path / "log")


def test_a_node_is_closed_once_its_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or who opens that directory next finds it in use."""
    held, go_on = threading.Event(), threading.Event()
    close = Sidecar.close

    def held_up(sidecar: Sidecar, timeout: float = 5.0) -> None:
        held.set()
        assert go_on.wait(10)
        close(sidecar, timeout)

    monkeypatch.setattr(Sidecar, "close", held_up)
    node = Node("one", durable=tmp_path / "log")
    first, second = threading.Thread(target=node.close), threading.Thread(target=node.close)
    first.start()
    assert held.wait(10)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    go_on.set()
    first.join(10)
    second.join(10)
    Node("two", durable=tmp_path / "log").close()


def kill_and_start_again(program: Program, programs: Programs, directory: Path) -> Program:
    program.kill()
    program.finish()
    again = programs.start(SIDECAR, str(directory))
    again.expect("ready")
    return again


@pytest.mark.slow
def test_appends_survive_their_sidecar_being_killed_again_and_again(
    sidecar: Program, tmp_path: Path, programs: Programs
) -> None:
    """Each is there once, in order, and none was acknowledged that is not."""
    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append(0)
        under_way: list[Appending] = []
        for n in range(1, 2001):
            under_way.append(orders.append_nowait(n, timeout=30))
            if n % 500 == 0:
                sidecar = kill_and_start_again(sidecar, programs, tmp_path / "log")
        assert [each.wait(30).offset for each in under_way] == list(range(1, 2001))
        assert [record.payload for record in orders.replay()] == list(range(2001))
    sidecar.kill(signal.SIGINT)
    sidecar.finish()
    sound(tmp_path / "log")


@pytest.mark.slow
def test_a_timeout_leaves_the_append_under_way(sidecar: Program) -> None:
    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append("a")
        sidecar.kill(signal.SIGSTOP)
        with pytest.raises(Timeout):
            orders.append("b", timeout=0.2)
        later = orders.append_nowait("c")
        assert not later.done
        sidecar.kill(signal.SIGCONT)
        assert later.wait(10).offset == 2
        assert [record.payload for record in orders.replay()] == ["a", "b", "c"]


def test_waiting_for_an_append_ends_when_the_node_closes(sidecar: Program) -> None:
    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append("a")
        sidecar.kill(signal.SIGSTOP)
        under_way = orders.append_nowait("b")
        outcomes: list[object] = []

        def wait() -> None:
            try:
                under_way.wait(30)
            except Closed as closed:
                outcomes.append(closed)

        thread = threading.Thread(target=wait)
        thread.start()
        node.close()
        thread.join(10)
        assert len(outcomes) == 1
    sidecar.kill(signal.SIGCONT)


# -- Replay


def test_a_replay_begins_where_it_is_told(node: Node) -> None:
    orders = node.stream("orders")
    receipts = [orders.append(n) for n in range(5)]
    partition = receipts[0].partition
    assert [each.payload for each in orders.replay(3, partition=partition)] == [3, 4]
    assert list(orders.replay("latest")) == []
    assert list(orders.replay(5, partition=partition)) == []
    at = datetime.datetime.fromtimestamp(receipts[2].time_ns / 1e9 + 1e-6, datetime.UTC)
    assert [each.payload for each in orders.replay(at)] in ([3, 4], [2, 3, 4])
    past = datetime.datetime(1999, 1, 1, tzinfo=datetime.UTC)
    assert [each.payload for each in orders.replay(past)] == [0, 1, 2, 3, 4]
    future = datetime.datetime(2999, 1, 1, tzinfo=datetime.UTC)
    assert list(orders.replay(future)) == []


@pytest.mark.parametrize("follow", [False, True])
def test_a_replay_that_is_closed_reads_no_more(
    node: Node, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    monkeypatch.setattr("mesh.limits.READ_BYTES", 1000)
    orders = node.stream("orders")
    orders.append_many(str(n) * 500 for n in range(50))
    for n in range(50):
        orders.append(str(n) * 500)
    replay = orders.replay(follow=follow)
    records = iter(replay)
    next(records)
    replay.close()
    assert len(list(records)) < 60
    assert list(replay) == []


@pytest.mark.parametrize("follow", [False, True])
def test_a_replay_that_waits_is_ended_by_whoever_closes_it(sidecar: Program, follow: bool) -> None:
    """Though it would wait for ever for a sidecar that hangs."""
    with Node("reader") as node:
        orders = node.stream("orders")
        for n in range(12):  # more than is asked for ahead
            orders.append(str(n) * 700_000)
        replay = orders.replay(follow=follow, timeout=None)
        records = iter(replay)
        next(records)
        sidecar.kill(signal.SIGSTOP)
        thread = threading.Thread(target=lambda: list(records))
        thread.start()
        until(lambda: any(each.route.link._threads for each in replay._readers.values()))
        replay.close()
        thread.join(10)
        assert not thread.is_alive()
    sidecar.kill(signal.SIGCONT)


@pytest.mark.parametrize("what_is_missing", ["partition", "answer"])
def test_a_replay_that_cannot_begin_is_ended_by_whoever_closes_it(
    sidecar: Program, what_is_missing: str
) -> None:
    """Though it would wait for ever: for a stream that nobody has, or a sidecar that hangs."""
    with Node("reader") as node:
        orders = node.stream("orders")
        if what_is_missing == "answer":
            orders.append(0)
            sidecar.kill(signal.SIGSTOP)
        replay = orders.replay(timeout=None)
        thread = threading.Thread(target=lambda: list(replay))
        thread.start()
        until(lambda: waits(orders, replay))
        replay.close()
        thread.join(10)
        assert not thread.is_alive()
    sidecar.kill(signal.SIGCONT)


@pytest.mark.parametrize("what_is_missing", ["partition", "answer"])
def test_a_replay_in_asyncio_that_cannot_begin_is_ended_by_whoever_closes_it(
    sidecar: Program, what_is_missing: str
) -> None:

    async def main() -> None:
        async with Node("reader") as node:
            orders = node.stream("orders")
            if what_is_missing == "answer":
                await orders.aappend(0)
                sidecar.kill(signal.SIGSTOP)
            replay = orders.replay(timeout=None)

            async def read() -> list[int]:
                return [record.payload async for record in replay]

            task = asyncio.create_task(read())
            while not waits(orders, replay):
                await asyncio.sleep(0.01)
            replay.close()
            assert await asyncio.wait_for(task, 10) == []

    asyncio.run(main())
    sidecar.kill(signal.SIGCONT)


def waits(orders: Stream, replay: Replay) -> bool:
    """Whether a replay waits for what it needs to begin."""
    link = (replay._entering or orders._streams._hosts).link
    return bool(link._threads or link._waiting_loops)


def test_a_following_replay_goes_from_the_past_into_what_comes(node: Node) -> None:
    orders = node.stream("orders")
    orders.append_many(range(1000))
    replay = orders.replay(follow=True)
    read: list[int] = []

    def follow() -> None:
        for record in replay:
            read.append(record.payload)

    thread = threading.Thread(target=follow)
    thread.start()
    for n in range(1000, 1200):
        orders.append(n)
    until(lambda: len(read) >= 1200)
    replay.close()
    thread.join(10)
    assert not thread.is_alive()
    assert read == list(range(1200))


def test_a_following_replay_in_asyncio_is_cancelled_cleanly(node: Node) -> None:
    async def main() -> None:
        orders = node.stream("orders")
        await orders.aappend("past")
        read: list[str] = []

        async def follow() -> None:
            async for record in orders.replay(follow=True):
                read.append(record.payload)

        task = asyncio.create_task(follow())
        while not read:
            await asyncio.sleep(0.005)
        await orders.aappend("live")
        while len(read) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert read == ["past", "live"]

    asyncio.run(main())


def test_what_retention_has_removed_is_a_gap_in_a_replay(node: Node, tmp_path: Path) -> None:
    orders = node.stream("orders", options=StreamOptions(keep_bytes=1 << 20))
    orders.append_many([b"x" * 1000] * 40_000, timeout=60)
    partition = orders.append("last").partition
    segments = tmp_path / "log" / "streams" / "orders"
    until(lambda: len(list(segments.glob("*.log"))) == 1)
    replay = orders.replay(0, partition=partition)
    offsets = [record.offset for record in replay]
    assert offsets == list(range(offsets[0], 40_001))
    assert list(replay.gaps) == [(partition, 0, offsets[0] - 1)]


@pytest.mark.slow
def test_a_replay_keeps_the_latest_gaps_alone(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.durable.replay._GAPS_MAX", 2)
    orders = node.stream("orders", options=StreamOptions(bytes_max=40_000, keep_bytes=5_000))
    for _ in range(30):
        receipt = orders.append(b"x" * 1000)
    segments = tmp_path / "log" / "streams" / "orders"
    until(lambda: len(list(segments.glob("*.log"))) == 1)
    replay = orders.replay(0, partition=receipt.partition)
    for gaps in (1, 2, 2):  # read anew, it meets its gap again
        first = next(iter(replay)).offset
        assert len(replay.gaps) == gaps
        assert replay.gaps[-1] == (receipt.partition, 0, first - 1)


def test_a_replay_merges_partitions_by_time(tmp_path: Path) -> None:
    with (
        Node("a", durable=tmp_path / "a") as a,
        Node("b", durable=tmp_path / "b") as b,
        Node("reader") as reader,
    ):
        one, other = a.stream("orders"), b.stream("orders")
        for n in range(0, 20, 2):
            one.append(n)
            other.append(n + 1)
        replay = reader.stream("orders").replay(partitions=2)
        assert [record.payload for record in replay] == list(range(20))
        assert len(replay.partitions) == 2
        partition = one.append("x").partition
        only = [r.payload for r in reader.stream("orders").replay(partition=partition)]
        assert only == [*range(0, 20, 2), "x"]
        b.close()
        until(lambda: reader.stream("orders").replay().missing)
        assert [r.payload for r in reader.stream("orders").replay()] == only


def test_a_following_replay_takes_up_partitions_that_come_later(tmp_path: Path) -> None:
    with Node("a", durable=tmp_path / "a") as a, Node("reader") as reader:
        a.stream("orders").append("first")
        replay = reader.stream("orders").replay(follow=True)
        found: list[str] = []

        def follow() -> None:
            for record in replay:
                found.append(record.payload)

        following = threading.Thread(target=follow)
        following.start()
        until(lambda: found == ["first"])
        with Node("b", durable=tmp_path / "b") as b:
            b.stream("orders").append("second")
            until(lambda: found == ["first", "second"])
        a.stream("orders").append("third")
        until(lambda: found == ["first", "second", "third"])
        replay.close()
        following.join(10)
