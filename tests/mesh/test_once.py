"""Once in effect: consumers are killed again and again, between any two steps, and in the end each
record has had its effect, once.

Each is tried without its remedy as well: then some records have theirs twice, so that the kills are
known to come where they hurt.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import Node
from tests.mesh.test_streams import kill_and_start_again
from tests.support.pages import snippets
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

_PROGRAM = "import sys; from tests.support import once_programs as p; p.{}(*sys.argv[1:])"
_PERIOD_S = 0.005
_SNIPPETS = snippets("docs/once.md")
_KILLS = ("between the steps", "any moment", "the log", "any moment")


class Shop:
    """A log in a process of its own, a producer, and consumers that are killed."""

    def __init__(self, folder: Path, programs: Programs, node: Node) -> None:
        self.appended: list[tuple[str, int]] = []
        """Account and cents, of which no two are the same."""
        self.killed: Counter[str] = Counter()
        self._luck = random.Random(5)
        self._programs = programs
        self._log = folder / "log"
        self._sidecar = programs.start(SIDECAR, str(self._log))
        self._sidecar.expect("ready")
        self.orders = node.stream("orders")
        self._ended = threading.Event()
        self._producer = threading.Thread(target=self._produce)
        self._producer.start()

    def _produce(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            payload = "abcde"[len(self.appended) % 5], len(self.appended) + 1
            self.orders.append(payload, timeout=30)
            self.appended.append(payload)

    def close(self) -> None:
        self._ended.set()
        self._producer.join(40)

    def run(self, program: str, *arguments: str, kills: int, members: int = 1) -> None:
        """So many of that program at a time, of which one is killed after the other; the last one
        is left alone until it has done what is left."""
        running: list[Program] = []
        for n in range(kills):
            how = _KILLS[n % len(_KILLS)]
            fatal = self._luck.randint(1, 30) if how == "between the steps" else 0
            newest = self.start(program, *arguments, str(fatal))
            running.append(newest)
            if fatal:
                newest.process.wait(30)
                running.remove(newest)
            elif len(running) == members:
                self._kill(running.pop(0), how)
            else:
                continue
            self.killed[how] += 1
        self.close()
        for each in running:
            each.kill()
        self.start(program, *arguments, "0").expect("drained", 50)

    def start(self, program: str, *arguments: str) -> Program:
        return self._programs.start(_PROGRAM.format(program), *arguments)

    def _kill(self, victim: Program, how: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.process.wait(self._luck.uniform(0.1, 0.8))
        if how == "the log":
            self._sidecar = kill_and_start_again(self._sidecar, self._programs, self._log)
        victim.kill()
        victim.process.wait(10)


@pytest.fixture
def node() -> Iterator[Node]:
    with Node("shop") as node:
        yield node


@pytest.fixture
def shop(tmp_path: Path, programs: Programs, node: Node) -> Iterator[Shop]:
    shop = Shop(tmp_path, programs, node)
    yield shop
    shop.close()


# -- Effects in a database


def effects(shop: Shop, folder: Path, remedy: str, *, batch: int = 1, kills: int) -> list[int]:
    """All that there are in the end, in cents."""
    with bank(folder) as (path, db):
        shop.run("apply", path, remedy, str(batch), kills=kills)
        return found_in(db)


@contextlib.contextmanager
def bank(folder: Path) -> Iterator[tuple[str, sqlite3.Connection]]:
    path = str(folder / "bank.db")
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
        with db:
            db.execute("CREATE TABLE accounts (name TEXT PRIMARY KEY, cents INTEGER)")
            db.executemany("INSERT INTO accounts VALUES (?, 0)", "abcde")
            db.execute("CREATE TABLE effects (cents INTEGER)")
            db.execute("CREATE TABLE done (partition TEXT PRIMARY KEY, last INTEGER)")
        yield path, db


def found_in(db: sqlite3.Connection) -> list[int]:
    found = [cents for (cents,) in db.execute("SELECT cents FROM effects ORDER BY cents")]
    assert db.execute("SELECT SUM(cents) FROM accounts").fetchone() == (sum(found),)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 20])
def test_with_its_position_beside_it_an_effect_happens_once(
    shop: Shop, tmp_path: Path, batch: int
) -> None:
    found = effects(shop, tmp_path, "positions", batch=batch, kills=4)
    assert found == [cents for _, cents in shop.appended]


@pytest.mark.slow
def test_without_its_position_some_effects_happen_twice(shop: Shop, tmp_path: Path) -> None:
    found = effects(shop, tmp_path, "none", kills=4)
    assert len(found) > len(set(found)) == len(shop.appended)


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["positions", "none"])
def test_a_consumer_that_wakes_up_when_another_has_done_its_records_changes_nothing(
    shop: Shop, tmp_path: Path, remedy: str
) -> None:
    shop.close()
    shop.orders.append_many(("a", n + len(shop.appended) + 1) for n in range(1000))
    count = len(shop.appended) + 1000
    with bank(tmp_path) as (path, db):
        sleeper = shop.start("apply", path, remedy, "1", "-100")
        sleeper.expect("asleep")
        shop.start("apply", path, remedy, "1", "0").expect("drained", 50)
        assert len(found_in(db)) == count
        sleeper.tell()
        sleeper.expect("drained", 50)
        found = found_in(db)
    assert len(set(found)) == count
    assert (len(found) > count) == (remedy == "none")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(200)
@pytest.mark.parametrize("batch", [1, 20])
def test_an_effect_happens_once_though_its_consumer_is_killed_forty_times(
    shop: Shop, tmp_path: Path, batch: int
) -> None:
    found = effects(shop, tmp_path, "positions", batch=batch, kills=40)
    assert found == [cents for _, cents in shop.appended]
    assert shop.killed == {"between the steps": 10, "any moment": 20, "the log": 10}


# -- Results in another stream


def results(shop: Shop, node: Node, remedy: str, *, members: int, kills: int) -> list[int]:
    """All that there are in the end, in cents."""
    shop.run("transform", remedy, members=members, kills=kills)
    return sorted(record.payload[1] for record in node.stream("invoices").replay())


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 2])
def test_what_was_derived_from_a_record_is_appended_once(
    shop: Shop, node: Node, members: int
) -> None:
    found = results(shop, node, "derived_from", members=members, kills=4)
    assert found == [cents for _, cents in shop.appended]


@pytest.mark.slow
def test_without_saying_so_some_results_are_appended_twice(shop: Shop, node: Node) -> None:
    found = results(shop, node, "none", members=1, kills=4)
    assert len(found) > len(set(found)) == len(shop.appended)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(200)
@pytest.mark.parametrize("members", [1, 3])
def test_what_was_derived_is_appended_once_though_consumers_are_killed_forty_times(
    shop: Shop, node: Node, members: int
) -> None:
    found = results(shop, node, "derived_from", members=members, kills=40)
    assert found == [cents for _, cents in shop.appended]


# -- The programs of docs/once.md, as they stand


@pytest.mark.slow
def test_the_documented_database_has_each_payment_once(tmp_path: Path, programs: Programs) -> None:
    path = tmp_path / "bank.db"
    source = _SNIPPETS[0].replace('"bank.db"', repr(str(path)))
    assert str(path) in source
    paid = 0
    with Node("shop", durable=tmp_path / "log") as node:
        payments = node.stream("payments")
        for _ in range(3):
            bank = programs.start(source)
            payments.append_many([{"name": "ann", "cents": 1}, {"name": "bob", "cents": 2}] * 50)
            paid += 50
            until(lambda paid=paid: balances(path) == {"ann": paid, "bob": 2 * paid})  # type: ignore[misc]
            bank.kill()
            bank.process.wait(10)
        until(lambda: balances(path) == {"ann": paid, "bob": 2 * paid})


def balances(path: Path) -> dict[str, int]:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return dict(db.execute("SELECT name, cents FROM account"))
    except sqlite3.OperationalError:  # there is no such table yet
        return {}


@pytest.mark.slow
def test_the_documented_pipeline_makes_an_invoice_of_each_order(
    tmp_path: Path, programs: Programs
) -> None:
    assert len(_SNIPPETS) == 3
    with Node("shop", durable=tmp_path / "log") as node:
        orders, invoices = node.stream("orders"), node.stream("invoices")
        orders.append_many({"id": n, "lamps": 2} for n in range(20))
        for n in range(20, 22):
            pricing = programs.start(_SNIPPETS[2])
            orders.append({"id": n, "lamps": 2})
            until(lambda n=n: invoices.bounds() and len(list(invoices.replay())) > n)  # type: ignore[misc]
            pricing.kill()
            pricing.process.wait(10)
        assert sorted(record.payload["order"] for record in invoices.replay()) == list(range(22))
