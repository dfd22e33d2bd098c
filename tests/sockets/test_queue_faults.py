"""What a queue does with misuse, hostile bytes and lost frames: nothing leaks, service goes on."""

from __future__ import annotations

import pytest

from mesh.errors import InvalidName, NotSerializable, PayloadTooLarge, Timeout
from mesh.options import PullerOptions
from mesh.sockets.dispatch import Dispatch
from mesh.sockets.frame import Codec, Flag, Kind, encode, wire_name
from mesh.sockets.home import node_text
from mesh.sockets.puller import Intake
from mesh.sockets.pusher import Pusher
from tests.support.homes import Homes
from tests.support.queues import PULLING, PUSHING, QUEUE, Net, core_of, outstanding, push_together

# -- Misuse and faults ---------------------------------------------------------------------------


def test_what_cannot_be_sent_is_an_error_before_anything_is_sent(homes: Homes) -> None:
    home = homes.make(PUSHING, message_bytes_max=1024)
    core = Dispatch(home, QUEUE)
    pusher = Pusher(core, None, lambda: None)
    with pytest.raises(NotSerializable):
        pusher.send(object())
    with pytest.raises(NotSerializable, match="headers"):
        pusher.send(1, headers={"a": [1]})
    with pytest.raises(PayloadTooLarge, match=r"payload of 2,003 bytes over the limit of 1,024"):
        pusher.send(bytes(2000))
    core.close(0)
    with pytest.raises(InvalidName):
        Dispatch(home, "jobs/*")
    with pytest.raises(InvalidName):
        Intake(home, "jobs/*", PullerOptions())


def task_frame(body: bytes = b"\x91\x2a", **fields: int) -> bytes:
    fields = {"kind": Kind.DATA, "sender": 5, "seq": 1} | fields
    return encode(wire_name(QUEUE), fields.pop("kind"), body, **fields)


MALFORMED = [
    [b""],
    [b"junk"],
    [b"/jobs\0" + bytes(36)],
    [task_frame(flags=Flag.DETACHED)],
    [task_frame(flags=Flag.DETACHED), b"second"],
    [encode(wire_name("other"), Kind.DATA, b"\x91\x2a", sender=5, seq=1)],
    [task_frame(kind=Kind.CREDIT)],
    [task_frame(kind=Kind.MARK)],
    [task_frame(b"\x92\x2a")],
    [task_frame(b"\xdd\xff\xff\xff\xff")],
    [task_frame(count=7)],
    [task_frame(flags=Flag.LZ4)],
    [task_frame(codec=Codec.RAW)],
]


def test_a_puller_drops_and_counts_what_is_no_task(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller()
    intake = net.intakes[0][1]
    raw = net.stranger(intake.endpoints()[0])
    for parts in MALFORMED:
        raw.send_multipart(parts)
    net.until(lambda: intake.counters.dropped.total() == len(MALFORMED))
    pusher.send("still here")
    assert puller.recv(timeout=5).payload == "still here"
    assert intake.counters.received == 1


def test_parts_that_a_task_does_not_announce_are_frames_of_their_own(net: Net) -> None:
    puller = net.puller()
    intake = net.intakes[0][1]
    raw = net.stranger(intake.endpoints()[0])
    raw.send_multipart([task_frame(), b"too", b"many"])
    raw.send_multipart([task_frame(), task_frame()])
    assert [puller.recv(timeout=5).payload for _ in range(3)] == [42] * 3
    assert intake.counters.dropped["malformed"] == 2
    assert intake.counters.received == 3


def test_a_pusher_drops_and_counts_what_is_no_credit(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    dispatch = core_of(pusher)
    raw = net.stranger(dispatch.endpoints()[0])
    number = next(iter(dispatch.ledger._accounts))
    forged = [
        [task_frame(kind=Kind.CREDIT, sender=5, remaining=number)],
        [task_frame(kind=Kind.CREDIT, sender=PULLING, seq=9, remaining=number)],
        [encode(wire_name("other"), Kind.CREDIT, b"", sender=PULLING, seq=0, remaining=number)],
    ]
    malformed = [parts for parts in MALFORMED if parts != [task_frame(kind=Kind.CREDIT)]]
    bad = [*malformed, [task_frame()], *forged]
    for parts in bad:
        raw.send_multipart(parts)
    net.until(lambda: dispatch.counters.dropped.total() == len(bad))
    pusher.send(1)
    with pytest.raises(Timeout):
        pusher.send(2, timeout=0)
    assert puller.recv(timeout=5).payload == 1
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    pusher.send(2, timeout=5)


def test_a_task_that_does_not_decode_leaks_no_credit(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    dispatch, intake = core_of(pusher), net.intakes[0][1]
    for _ in range(3):
        with dispatch.link:
            account = dispatch.ledger.choose()
            assert account is not None
            bad = task_frame(
                b"\xc1", sender=PUSHING, seq=account.sent + 1, remaining=account.number
            )
            dispatch._sockets[account.number][0].send(bad)
            dispatch.ledger.sent(account)
        net.until(lambda: outstanding(pusher) == 0)
    assert intake.counters.dropped == {"malformed": 3}
    pusher.send("good", timeout=0)
    assert puller.recv(timeout=5).payload == "good"


def test_a_task_lost_with_its_connection_leaks_no_credit_and_is_counted(net: Net) -> None:
    """As sent as it can be, and never arriving: nothing comes after it that would show the gap."""
    pusher, puller = net.pusher(), net.puller(prefetch=1)
    dispatch, intake = core_of(pusher), net.intakes[0][1]
    with dispatch.link:
        account = dispatch.ledger.choose()
        assert account is not None
        dispatch.ledger.sent(account)
    net.until(lambda: outstanding(pusher) == 0)
    assert intake.counters.lost == 1
    pusher.send("next", timeout=0)
    assert puller.recv(timeout=5).payload == "next"


def test_a_pusher_that_sends_more_than_it_has_credit_for_is_refused(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=2)
    dispatch, intake = core_of(pusher), net.intakes[0][1]
    ((number, (socket, _)),) = dispatch._sockets.items()
    for seq in (3, 1, 2):
        socket.send(task_frame(sender=PUSHING, seq=seq, remaining=number))
    assert [puller.recv(timeout=5).seq for _ in range(2)] == [1, 2]
    assert intake.counters.dropped == {"over credit": 1}


def test_a_frame_of_several_tasks_is_several_tasks(net: Net) -> None:
    pusher, puller = net.pusher(), net.puller(prefetch=3)
    push_together(pusher, [1, 2, 3])
    tasks = [puller.recv(timeout=5) for _ in range(3)]
    assert [(task.payload, task.seq) for task in tasks] == [(1, 1), (2, 2), (3, 3)]
    with pytest.raises(Timeout):
        puller.recv(timeout=0)
    net.until(lambda: outstanding(pusher) == 0)


def test_a_task_that_comes_twice_is_delivered_once(net: Net) -> None:
    net.pusher()
    puller = net.puller(prefetch=4)
    dispatch, intake = net.dispatches[0][1], net.intakes[0][1]
    ((number, (socket, _)),) = dispatch._sockets.items()
    for seq in (1, 1, 2):
        socket.send(task_frame(sender=PUSHING, seq=seq, remaining=number))
    assert [puller.recv(timeout=5).seq for _ in range(2)] == [1, 2]
    assert intake.counters.dropped == {"repeat": 1}


def test_a_program_that_knows_no_credit_may_push(net: Net) -> None:
    puller = net.puller(prefetch=1)
    raw = net.stranger(net.intakes[0][1].endpoints()[0])
    for seq in range(1, 101):
        raw.send(task_frame(b"\x91" + bytes([seq]), seq=seq))
    tasks = [puller.recv(timeout=5) for _ in range(100)]
    assert [task.payload for task in tasks] == list(range(1, 101))
    assert {task.sender for task in tasks} == {node_text(5)}
