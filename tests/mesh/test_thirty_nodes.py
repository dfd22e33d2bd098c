"""Thirty processes: all see each other, exchange, and survive ten of them being killed and started
again, with nobody left believing in a ghost."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import Program, Programs

COUNT, KILLED = 30, 10

MEMBER = """
    import json, sys, threading, time
    from mesh import Node

    me = int(sys.argv[1])
    node = Node(f"node-{me}")
    publisher = node.publisher(f"news/{me}", when_full="wait")
    subscriber = node.subscriber("news/*")
    heard = set()

    def listen():
        for message in subscriber:
            heard.add((message.sender, message.payload))

    threading.Thread(target=listen, daemon=True).start()
    print(node.id, flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "see":        # wait until exactly these peers are there
            wanted = set(json.loads(argument)) - {node.id}
            deadline = time.monotonic() + 30
            while set(node.peers) != wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            print(json.dumps(sorted(set(node.peers) ^ wanted)), flush=True)
        elif command == "say":
            count, text = argument.split()
            publisher.wait_for(int(count), timeout=30)
            publisher.send(text)
            print("said", flush=True)
        elif command == "heard":
            wanted = {(sender, argument.split()[0]) for sender in argument.split()[1:]}
            deadline = time.monotonic() + 30
            while not wanted <= heard and time.monotonic() < deadline:
                time.sleep(0.01)
            print(len(wanted - heard), sum(subscriber.lost.values()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_thirty_nodes_meet_exchange_and_survive_the_killing_of_ten(programs: Programs) -> None:
    members = [programs.start(MEMBER, str(i)) for i in range(COUNT)]
    ids = [member.line(60) for member in members]
    everyone_sees(members, ids)
    everyone_hears(members, ids, "first")
    for member in members[:KILLED]:
        member.kill()
    everyone_sees(members[KILLED:], ids[KILLED:])
    members[:KILLED] = [programs.start(MEMBER, str(i)) for i in range(KILLED)]
    ids[:KILLED] = [member.line(60) for member in members[:KILLED]]
    everyone_sees(members, ids)
    everyone_hears(members, ids, "second")


def everyone_sees(members: list[Program], ids: list[str]) -> None:
    for member in members:
        member.tell(f"see {json.dumps(ids)}")
    for i, member in enumerate(members):
        assert json.loads(member.line(60)) == [], f"node {i} is wrong about these"


def everyone_hears(members: list[Program], ids: list[str], text: str) -> None:
    for member in members:
        member.tell(f"say {len(members)} {text}")
    for member in members:
        assert member.line(60) == "said"
    for member in members:
        member.tell(f"heard {text} {' '.join(ids)}")
    for i, member in enumerate(members):
        assert member.line(60) == "0 0", f"node {i}: (not heard, lost)"
