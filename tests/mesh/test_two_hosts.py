"""Two hosts on one LAN: real multicast, real CURVE, a real cable pulled for five seconds."""

from __future__ import annotations

import json

import pytest

from tests.support.hosts import Host

SECRET = "correct horse battery staple"

SERVER = """
    import sys, threading, time
    from mesh import Node
    node = Node("server", interfaces=sys.argv[1:] or None)
    publisher = node.publisher("t", when_full="drop")
    node.service("double")(lambda request: request * 2)
    puller = node.puller("q")

    def work():
        for task in puller:
            print("worked", task.payload, flush=True)

    threading.Thread(target=work, daemon=True).start()
    node.on_peer(lambda event: print(event.kind, event.peer.name, event.reason, flush=True))
    n = 0
    while True:
        publisher.send(n)
        n += 1
        time.sleep(0.02)
"""

CLIENT = """
    import json, sys, threading
    from mesh import Node
    node = Node("client")
    node.on_peer(lambda event: print(event.kind, event.peer.name, event.reason, flush=True))
    subscriber, pusher, client = node.subscriber("t"), node.pusher("q"), node.client("double")
    seen, sender = set(), None
    for line in sys.stdin:
        command = line.strip()
        if command == "peers":
            print(json.dumps([[p.transport, p.address, p.same_host] for p in node.peers.values()]))
        elif command == "topic":        # one message, received just now
            while True:
                try:
                    seen.add(subscriber.recv(timeout=0).seq)
                except TimeoutError:
                    break
            seen.add(subscriber.recv(timeout=10).seq)
            print("got", flush=True)
        elif command == "account":      # everything between the first and the last was seen or lost
            span = max(seen) - min(seen) + 1
            print(json.dumps([span, len(seen), sum(subscriber.lost.values())]), flush=True)
        elif command == "service":
            print("doubled", client.request(21, timeout=10), flush=True)
        elif command == "queue":
            pusher.send("task", timeout=10)
            print("pushed", flush=True)
        sys.stdout.flush()
"""


@pytest.mark.netns
@pytest.mark.slow
def test_two_hosts_find_each_other_and_survive_a_cut_cable(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    env = {"MESH_SECRET": SECRET}
    with one.start(SERVER, env=env) as server, two.start(CLIENT, env=env) as client:
        server.expect("joined client ")
        client.expect("joined server ")
        client.tell("peers")
        [(transport, address, same_host)] = json.loads(client.line())
        assert (transport, same_host) == ("tcp", False)
        assert address.startswith(f"tcp://{one.address}:")
        for command, answer in [("topic", "got"), ("service", "doubled 42"), ("queue", "pushed")]:
            client.tell(command)
            client.expect(answer)
        server.expect("worked task")

        two.cut()
        server.expect("left client silent", timeout=10)
        client.expect("left server silent", timeout=10)
        pause_while_cut(5.0)
        two.heal()
        server.expect("joined client ", timeout=40)
        client.expect("joined server ", timeout=40)
        for command, answer in [("topic", "got"), ("service", "doubled 42"), ("queue", "pushed")]:
            client.tell(command)
            client.expect(answer)
        server.expect("worked task")
        client.tell("account")
        span, seen, lost = json.loads(client.line())
        assert lost > 0
        assert seen + lost == span, "what was sent while the cable was out is counted to the last"


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("interfaces", [(), ("eth0",)], ids=["any", "named"])
def test_a_host_whose_address_changes_is_found_again_and_reached(
    hosts: tuple[Host, Host], interfaces: tuple[str, ...]
) -> None:
    one, two = hosts
    env = {"MESH_SECRET": SECRET}
    with one.start(SERVER, *interfaces, env=env) as server, two.start(CLIENT, env=env) as client:
        server.expect("joined client ")
        client.expect("joined server ")
        client.tell("topic")
        client.expect("got")
        one.move(77)
        client.expect("left server silent", timeout=10)
        client.expect("joined server ", timeout=20)
        client.tell("peers")
        [(_, address, _)] = json.loads(client.line())
        assert address.startswith("tcp://10.213.7.77:")
        server.expect("joined client ")
        for command, answer in [("topic", "got"), ("service", "doubled 42"), ("queue", "pushed")]:
            client.tell(command)
            client.expect(answer)
        server.expect("worked task")


def pause_while_cut(seconds: float) -> None:
    """The cut itself is what lasts; nothing is waited for."""
    import threading

    threading.Event().wait(seconds)
