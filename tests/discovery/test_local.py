"""Files of nodes in the runtime directory: who lives, who is dead, and what is none of ours."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mesh import limits
from mesh.discovery import local
from mesh.discovery.local import (
    LocalSource,
    check_directory,
    runtime_directory,
    share,
    socket_path,
)
from mesh.discovery.source import Announcement, Sighting
from mesh.errors import InvalidOption, UnsafeRuntimeDir

ROOT = Path(__file__).parents[2]

OTHER_PROCESS = """
import os, socket, sys
from pathlib import Path
from mesh.discovery.local import LocalSource, socket_path
from mesh.discovery.source import Announcement

directory, node_id, role = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
source = LocalSource(directory)
source.start(Announcement(id=node_id, name="other", realm="r", endpoints=()))
if role == "looks":
    print(*sorted(s.announcement.id for s in source.sightings() if s.present), flush=True)
    sys.exit(source.close())
for label in ("control", "topics"):
    socket.socket(socket.AF_UNIX).bind(socket_path(directory, node_id, label))
child = os.fork() if role == "forks" else 0
if role == "lives" or child == 0:
    print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Path:
    return runtime_directory()


@pytest.fixture
def start() -> Iterator[Callable[..., LocalSource]]:
    sources = []

    def start(directory: Path, own: Announcement | None = None) -> LocalSource:
        source = LocalSource(directory)
        source.start(own or announcement())
        sources.append(source)
        return source

    yield start
    for source in sources:
        source.close()


def announcement(node_id: str = "", *endpoints: str) -> Announcement:
    node_id = node_id or secrets.token_hex(8)
    return Announcement(id=node_id, name="node", realm="r", endpoints=endpoints)


def node_files(directory: Path, node_id: str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.startswith(node_id))


@contextmanager
def other_process(directory: Path, role: str, node_id: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with a node, until it is killed; `role` as in `OTHER_PROCESS`."""
    command = [sys.executable, "-c", OTHER_PROCESS, str(directory), node_id, role]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def seen_by_another_process(directory: Path) -> set[str]:
    with other_process(directory, "looks", secrets.token_hex(8)) as process:
        out, _ = process.communicate()
        return set(out.split())


def ids(sightings: list[Sighting], *, present: bool) -> set[str]:
    return {s.announcement.id for s in sightings if s.present is present}


@pytest.mark.parametrize("role", ["lives", "forks"])
def test_a_killed_node_is_noticed_at_once_and_its_files_are_removed(
    directory: Path, start: Callable[..., LocalSource], role: str
) -> None:
    """Also when a child that it forked lives on, with all its descriptors."""
    source, dead = start(directory), secrets.token_hex(8)
    with other_process(directory, role, dead) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert ids(source.sightings(), present=True) == {dead}
        files = [f"{dead}.control", f"{dead}.node", f"{dead}.topics"]
        assert node_files(directory, dead) == files
        process.send_signal(signal.SIGKILL)
        assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ids(source.sightings(), present=False) == {dead}
        assert node_files(directory, dead) == []


def test_a_newcomer_is_not_told_of_the_dead(directory: Path) -> None:
    dead = secrets.token_hex(8)
    with other_process(directory, "lives", dead) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert node_files(directory, dead) != []
    assert seen_by_another_process(directory) == set()
    assert node_files(directory, dead) == []


def test_nodes_of_one_process_do_not_take_each_others_lock(
    directory: Path, start: Callable[..., LocalSource]
) -> None:
    """Whichever way they come to each other's files, and also after a change."""
    first, second = announcement(), announcement()
    one, two = start(directory, first), start(directory / ".." / directory.name, second)
    os.link(directory / f"{first.id}.node", directory / f"{secrets.token_hex(8)}.node")
    assert ids(one.sightings(), present=True) == {second.id}
    assert ids(two.sightings(), present=True) == {first.id}
    two.update(announcement(second.id, "tcp://10.0.0.1:5555"))
    assert ids(one.sightings(), present=True) == {second.id}
    assert seen_by_another_process(directory) == {first.id, second.id}


def test_a_forked_child_leaves_the_files_of_its_parent(
    directory: Path, start: Callable[..., LocalSource]
) -> None:
    source = start(directory, own := announcement())
    in_child(source.close)
    assert node_files(directory, own.id) == [f"{own.id}.node"]


def test_a_forked_child_sees_its_parent_as_another_process(
    directory: Path, start: Callable[..., LocalSource]
) -> None:
    start(directory, own := announcement())

    def look() -> None:
        source = LocalSource(directory)
        source.start(announcement())
        assert ids(source.sightings(), present=True) == {own.id}
        source.close()

    in_child(look)
    assert node_files(directory, own.id) == [f"{own.id}.node"]


def in_child(action: Callable[[], None]) -> None:
    """Run `action` in a forked child, and fail if it fails."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:  # noqa: BLE001 - it ends here either way, and is told
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_comes_into_sight_complete_and_locked(
    directory: Path, start: Callable[..., LocalSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, renamed = announcement(), []

    def rename(old: Path, new: Path) -> None:
        assert [name for name in os.listdir(directory) if name.endswith(".node")] == []
        in_child(lambda: assert_complete_and_locked(old, own))
        renamed.append(new)
        os.replace(old, new)

    monkeypatch.setattr(os, "rename", rename)
    start(directory, own)
    assert renamed == [directory / f"{own.id}.node"]


def assert_complete_and_locked(path: Path, own: Announcement) -> None:
    assert msgspec.json.decode(path.read_bytes(), type=Announcement) == own
    with path.open("rb+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_that_is_full_leaves_nothing_behind(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(OSError, match="bytes written"):
        LocalSource(directory).start(announcement())
    assert os.listdir(directory) == []


def test_an_update_that_fails_leaves_the_old_announcement(
    directory: Path, start: Callable[..., LocalSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = start(directory, own := announcement()), start(directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(OSError, match="0 of"):
            source.update(announcement(own.id, "tcp://10.0.0.1:5555"))
    assert [s.announcement for s in other.sightings()] == [own]


def test_a_node_that_replaces_its_file_while_it_is_looked_at_is_not_taken_for_dead(
    directory: Path, start: Callable[..., LocalSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up the lock on the old file, which is open here, and holds the new one's."""
    source, other = start(directory), announcement()
    old, new = directory / f"{other.id}.node", directory / "new"
    old.write_bytes(msgspec.json.encode(other))
    new.write_bytes(msgspec.json.encode(other))

    def lock_too_late(fd: int, how: int) -> None:
        new.replace(old)

    monkeypatch.setattr(fcntl, "lockf", lock_too_late)
    assert ids(source.sightings(), present=True) == {other.id}
    assert old.exists()


def test_strange_files_are_left_alone_and_counted_once(
    directory: Path, start: Callable[..., LocalSource], caplog: pytest.LogCaptureFixture
) -> None:
    good = announcement()
    content = msgspec.json.encode(good)
    big = announcement()
    path = directory / f"{good.id}.node"
    strange = {
        "empty.node": b"",
        "half.node": content[: len(content) // 2],
        "random.node": os.urandom(200),
        "nested.node": b"[" * 60_000,
        "other-types.node": b'{"id": 7}',
        "someone-elses.node": content,
        f"{big.id}.node": msgspec.json.encode(big) + b" " * limits.ANNOUNCEMENT_BYTES_MAX,
        "0123456789ABCDEF.node": msgspec.json.encode(announcement("0123456789ABCDEF")),
    }
    for name, data in strange.items():
        (directory / name).write_bytes(data)
    (directory / "directory.node").mkdir()
    (directory / "link.node").symlink_to(path)
    os.mkfifo(directory / "pipe.node")
    before = sorted(os.listdir(directory))
    source = start(directory)
    assert source.sightings() == []
    assert source.sightings() == []
    assert source.ignored == len(strange) + 3
    assert len(caplog.records) == len(strange) + 3
    assert "ignored pipe.node in the runtime directory: not a regular file" in caplog.messages
    assert f"ignored {big.id}.node in the runtime directory: over the limit" in caplog.text
    source.close()
    assert sorted(os.listdir(directory)) == before


def test_only_sockets_of_the_dead_node_are_removed(
    directory: Path, start: Callable[..., LocalSource]
) -> None:
    dead, other = announcement(), secrets.token_hex(8)
    for name in f"{dead.id}.control", f"{other}.control":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(directory / name))
    (directory / f"{dead.id}.node").write_bytes(msgspec.json.encode(dead))
    (directory / f"{dead.id}.log").write_text("a user's file")
    source = start(directory)
    assert source.sightings() == []
    assert node_files(directory, dead.id) == [f"{dead.id}.log"]
    assert node_files(directory, other) == [f"{other}.control"]


def orphan(path: str, *, age_s: float = 3600) -> str:
    """A socket that its process left behind."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
    then = os.stat(path).st_mtime - age_s
    os.utime(path, (then, then))
    return os.path.basename(path)


def test_sockets_of_the_dead_that_had_no_file_are_removed_by_the_next_node(
    directory: Path,
) -> None:
    """It used other sources only, or was killed after it had given its file up."""
    living, dead = secrets.token_hex(8), secrets.token_hex(8)
    orphan(socket_path(directory, dead, "control1"))
    orphan(socket_path(directory, dead, "pull2"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path := socket_path(directory, living, "control1"))
        listening.listen()
        os.utime(path, (0, 0))
        kept = {
            os.path.basename(path),
            orphan(socket_path(directory, living, "new2"), age_s=0),
            orphan(str(directory / "others.control1")),
        }
        source = LocalSource(directory)
        source.start(Announcement(id="a" * 16, name="n", realm="r", endpoints=()))
        assert set(os.listdir(directory)) == kept | {f"{'a' * 16}.node"}
        source.close()


def test_sockets_of_a_node_that_has_its_file_are_left_to_those_who_can_tell_its_death(
    directory: Path,
) -> None:
    first, second = LocalSource(directory), LocalSource(directory)
    first.start(Announcement(id="a" * 16, name="n", realm="r", endpoints=()))
    kept = orphan(socket_path(directory, "a" * 16, "closing1"))
    second.start(Announcement(id="b" * 16, name="n", realm="r", endpoints=()))
    assert kept in os.listdir(directory)
    first.close()
    second.close()


def test_nodes_over_the_limit_are_counted(
    directory: Path, start: Callable[..., LocalSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 2)
    source = start(directory)
    for _ in range(4):
        start(directory)
    assert len(source.sightings()) == 2
    assert source.ignored >= 1


def test_a_directory_that_cannot_be_read_withdraws_nobody(
    directory: Path, start: Callable[..., LocalSource]
) -> None:
    source, other = start(directory), start(directory)
    assert ids(source.sightings(), present=True) == {other._own_id}
    hidden = directory.rename(directory.with_name(f"{directory.name}-gone"))
    try:
        assert source.sightings() == []
        assert source.ignored == 1
    finally:
        hidden.rename(directory)
    assert source.sightings() == []


def test_a_directory_nobody_else_can_enter_is_safe(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    check_directory(directory, may_share=False)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o755, 0o711, 0o750, 0o707])
def test_a_directory_others_can_enter_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(UnsafeRuntimeDir, match=f"mode {mode:04o}.*chmod 700"):
        runtime_directory()
    with pytest.raises(UnsafeRuntimeDir):
        LocalSource(directory).start(announcement())


def test_a_link_to_a_directory_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (link := tmp_path / "link").symlink_to(directory)
    monkeypatch.setenv("MESH_RUNTIME_DIR", str(link))
    with pytest.raises(UnsafeRuntimeDir, match="symbolic link"):
        runtime_directory()


def test_a_file_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MESH_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(UnsafeRuntimeDir, match="not a directory"):
        runtime_directory()


def test_a_directory_of_another_user_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    owner = directory.stat().st_uid
    with pytest.raises(UnsafeRuntimeDir, match=f"belongs to user {owner}, not to 54321"):
        runtime_directory()


def test_a_directory_is_shared_with_a_group_only_where_it_was_named(directory: Path) -> None:
    directory.chmod(0o2770)
    assert runtime_directory() == directory
    with pytest.raises(UnsafeRuntimeDir, match="mode 2770"):
        check_directory(directory, may_share=False)


def test_a_directory_of_a_group_one_is_not_in_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.chmod(0o770)
    monkeypatch.setattr(os, "getegid", lambda: 54321)
    monkeypatch.setattr(os, "getgroups", lambda: [54322])
    with pytest.raises(UnsafeRuntimeDir, match=r"shared with group \d+, .* join it"):
        runtime_directory()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")
def test_users_of_one_group_find_and_reach_each_other(directory: Path) -> None:
    """One owns nothing of the other's; the umask that hides files is undone for the group."""
    group, node_id = 54321, secrets.token_hex(8)
    os.chown(directory, 0, group)
    directory.chmod(0o770)
    ready, done = os.pipe(), os.pipe()

    def lives() -> None:
        become(54001, group)
        source = LocalSource(directory)
        source.start(announcement(node_id))
        path = socket_path(directory, node_id, "control")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path)
            share(path, directory)
            bound.listen()
            os.write(ready[1], b"!")
            os.close(done[1])
            os.read(done[0], 1)

    def looks() -> None:
        become(54002, group)
        source = LocalSource(directory)
        source.start(announcement())
        assert ids(source.sightings(), present=True) == {node_id}
        with socket.socket(socket.AF_UNIX) as reaching:
            reaching.connect(socket_path(directory, node_id, "control"))
        source.close()

    if (child := os.fork()) == 0:
        try:
            lives()
        finally:
            os._exit(0)
    os.close(done[0])
    os.close(ready[1])
    try:
        assert os.read(ready[0], 1) == b"!"
        in_child(looks)
        assert stat.S_IMODE((directory / f"{node_id}.node").stat().st_mode) == 0o660
    finally:
        os.close(done[1])
        os.close(ready[0])
        os.waitpid(child, 0)


def become(user: int, group: int) -> None:
    """Give up root, in a process of one's own."""
    os.umask(0o077)
    os.setgroups([group])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def test_files_in_a_private_directory_are_private(
    directory: Path, start: Callable[..., LocalSource]
) -> None:
    start(directory, own := announcement())
    assert stat.S_IMODE((directory / f"{own.id}.node").stat().st_mode) == 0o600


def test_the_directory_is_the_users_own_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By uid: what the session or the job says of itself does not matter."""
    monkeypatch.delenv("MESH_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    monkeypatch.setattr(local, "_RUN_USER", tmp_path / "run")
    monkeypatch.setattr(local, "_TMP", tmp_path)
    uid = os.geteuid()
    assert runtime_directory() == tmp_path / f"mesh-{uid}"
    (tmp_path / "run" / str(uid)).mkdir(parents=True)
    assert runtime_directory() == tmp_path / "run" / str(uid) / "mesh"
    assert runtime_directory() == tmp_path / "run" / str(uid) / "mesh", "also when it is there"


def test_a_socket_path_too_long_for_linux_is_refused_with_the_numbers() -> None:
    directory = Path("/tmp") / ("d" * 79)
    assert len(socket_path(directory, "0" * 16, "control"[:5])) == 107
    with pytest.raises(
        InvalidOption, match="108 bytes over the limit of 107; set MESH_RUNTIME_DIR"
    ):
        socket_path(directory, "0" * 16, "control"[:6])
