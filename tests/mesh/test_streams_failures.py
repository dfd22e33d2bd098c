"""What each party of a stream sees when another is cut off, or gone for good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh import Node
from mesh.errors import Timeout
from tests.mesh.test_two_hosts import SECRET
from tests.support.hosts import Host
from tests.support.processes import Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

LOG = """
    import json, sys
    from mesh import Node
    node = Node("log", durable=sys.argv[1])
    node.on_peer(lambda event: print(event.kind, event.peer.name, event.reason, flush=True))
    orders = node.stream("orders")
    consumer = None
    for line in sys.stdin:
        if line == "take\\n":
            consumer = consumer or orders.consumer("billing")
            record = consumer.recv(30)
            print("took", record.payload, flush=True)
            record.ack()
        elif line == "all\\n":
            print(json.dumps([record.payload for record in orders.replay()]), flush=True)
"""

CLIENT = """
    import sys
    from mesh import Node, Timeout
    node = Node("client")
    node.on_peer(lambda event: print(event.kind, event.peer.name, event.reason, flush=True))
    orders = node.stream("orders")
    consumer = orders.consumer("billing")
    for line in sys.stdin:
        command, _, number = line.strip().partition(" ")
        if command == "append":
            try:
                print(orders.append(int(number), timeout=5 if number == "0" else 0.2).durability)
            except Timeout:
                print("not known")
        elif command == "hold":
            record = consumer.recv(10)
            print("holds", record.payload)
        elif command == "flush":
            orders.flush(timeout=30)
            print("flushed")
        elif command == "ack":
            record.ack()
            consumer.flush(timeout=30)
            print("heard")
            consumer.close()
        sys.stdout.flush()
"""


@pytest.mark.netns
@pytest.mark.slow
def test_a_cut_cable_costs_a_stream_nothing_and_repeats_no_append(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    one, two = hosts
    env = {"MESH_SECRET": SECRET}
    with one.start(LOG, str(tmp_path), env=env) as log, two.start(CLIENT, env=env) as client:
        client.expect("joined log ")
        client.tell("append 0")
        client.expect("fsynced")
        client.tell("hold")
        client.expect("holds 0")
        two.cut()
        for number in (1, 2):
            client.tell(f"append {number}")
            client.expect("not known")
        log.expect("left client silent")
        log.tell("take")
        log.expect("took 0")  # what was with who is cut off, goes to others
        two.heal()
        client.tell("flush")
        client.expect("flushed", timeout=40)
        client.tell("ack")
        client.expect("heard", timeout=40)
        log.tell("all")
        log.expect(json.dumps([0, 1, 2]))
        for number in (1, 2):
            log.tell("take")
            log.expect(f"took {number}")


@pytest.mark.slow
def test_a_log_that_is_gone_is_named_and_another_takes_what_may_be_anywhere(
    tmp_path: Path, programs: Programs
) -> None:
    logs, folders = {}, {}
    for name in ("a", "b"):
        sidecar = programs.start(SIDECAR, str(tmp_path / name))
        sidecar.expect("ready")
        partition = (tmp_path / name / "identity").read_text().strip()
        logs[partition], folders[partition] = sidecar, tmp_path / name
    with Node("writer") as node:
        until(lambda: len(node.peers) == 2)
        orders = node.stream("orders")
        gone = orders.append("before").partition
        bound = node.stream("orders", home=gone), node.stream("orders", producer="importer")
        assert [stream.append("before").partition for stream in bound] == [gone, gone]
        logs[gone].kill()
        until(lambda: len(node.peers) == 1)
        assert orders.append("after").partition != gone
        for stream in bound:
            with pytest.raises(Timeout):
                stream.append("after", timeout=0.2)
        replay = orders.replay()
        assert [record.payload for record in replay] == ["after"]
        assert replay.missing == {gone}
        with orders.consumer("billing") as consumer:
            record = consumer.recv(timeout=10)
            record.ack()
            assert record.payload == "after"
            assert consumer.missing == {gone}
            programs.start(SIDECAR, str(folders[gone])).expect("ready")
            before = [consumer.recv(timeout=10) for _ in range(3)]
            assert {record.partition for record in before} == {gone}
            assert consumer.missing == set()
