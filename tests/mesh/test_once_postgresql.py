"""The program of docs/once.md for PostgreSQL, as it stands there: whenever it is killed, and
whoever takes over from it, each payment is in its account once.

Each thing that the page says it takes is left out as well: then payments are lost, or there twice,
so that the kills are known to come where they hurt.
"""

from __future__ import annotations

import ast
import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from mesh import Node
from tests.mesh.test_streams import kill_and_start_again
from tests.support import postgresql
from tests.support.pages import snippets
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(200)]

SQLITE, RECIPE, _ = snippets("docs/once.md")
_TABLES: Final = re.findall(r'"(CREATE TABLE .*)"', SQLITE)
_AT_LINE: Final = (
    "import sys; from tests.support import once_programs as p; p.at_line(*sys.argv[1:])"
)
_LINES: Final = sorted({n.lineno for n in ast.walk(ast.parse(RECIPE)) if isinstance(n, ast.stmt)})
_TEXTS: Final = dict(enumerate(map(str.strip, RECIPE.splitlines()), 1))
_LOOP: Final = next(line for line in _LINES if _TEXTS[line].startswith("for "))
_STAGES: Final = [(line, nth) for line in _LINES if line >= _LOOP for nth in (2, 3)]
"""All that there is in the loop. Where its `with` begins and ends are every other time."""
_PERIOD_S: Final = 0.005


class Bank:
    """A log in a process of its own, payments, and accounts that each of them is to be in."""

    def __init__(
        self, folder: Path, programs: Programs, node: Node, server: postgresql.Server, db: Any
    ) -> None:
        self.paid: dict[str, int] = {}
        """Each into an account of its own, so that one that is there twice does not make up for one
        that is not."""
        self.recipe = RECIPE
        self.payments = node.stream("payments")
        self._server = server
        self._db = db
        self._programs = programs
        self._log = folder / "log"
        self._sidecar = programs.start(SIDECAR, str(self._log))
        self._sidecar.expect("ready")

    def pay(self, count: int) -> None:
        begin = len(self.paid) + 1
        paid = {f"account {n}": n for n in range(begin, begin + count)}
        self.payments.append_many(
            ({"name": name, "cents": cents} for name, cents in paid.items()), timeout=30
        )
        self.paid |= paid

    def start(self) -> Program:
        return self._programs.start(self.recipe, env=self._server.env)

    def start_until(self, line: int, nth: int, number: signal.Signals) -> Program:
        """It gets that signal as it comes to that line for the `nth` time."""
        arguments = (self.recipe, str(line), str(nth), str(int(number)))
        return self._programs.start(_AT_LINE, *arguments, env=self._server.env)

    def kill_the_log(self) -> None:
        self._sidecar = kill_and_start_again(self._sidecar, self._programs, self._log)

    @property
    def accounts(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT name, cents FROM account"))

    @property
    def waits(self) -> bool:
        """Whether somebody waits for a row."""
        return bool(self._db.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall())

    def finish(self) -> None:
        """Have one of them do all that is left, undisturbed."""
        last = self.start()
        until(self._is_acknowledged, "an acknowledgement of all", 50)
        last.kill()

    def _is_acknowledged(self) -> bool:
        groups = [stats.groups.get("bank") for stats in self.payments.stats().values()]
        return all(group is not None and not group.lag for group in groups)

    def check(self) -> None:
        assert self.accounts == self.paid
        ends = {partition: end - 1 for partition, (_, end) in self.payments.bounds().items()}
        assert dict(self._db.execute("SELECT partition, last FROM done")) == ends


@pytest.fixture(scope="module")
def server() -> Iterator[postgresql.Server]:
    with postgresql.server() as server:
        yield server


@pytest.fixture
def bank(tmp_path: Path, programs: Programs, server: postgresql.Server) -> Iterator[Bank]:
    with server.database("bank") as db, Node("shop") as node:
        for table in _TABLES:
            db.execute(table)
        yield Bank(tmp_path, programs, node, server, db)


def kill_at_each_line(bank: Bank) -> None:
    """Of the loop: in its second and third round."""
    for line, nth in [(line, 1) for line in _LINES if line < _LOOP] + _STAGES:
        bank.pay(3)
        victim = bank.start_until(line, nth, signal.SIGKILL)
        assert victim.finish()[::2] == (-signal.SIGKILL, ""), _TEXTS[line]
    bank.finish()


def test_a_payment_is_made_once_though_the_bank_is_killed_at_each_line(bank: Bank) -> None:
    kill_at_each_line(bank)
    bank.check()


def test_a_payment_is_made_once_though_bank_and_log_are_killed_at_any_moment(bank: Bank) -> None:
    luck, ended = random.Random(5), threading.Event()

    def pay() -> None:
        while not ended.wait(_PERIOD_S):
            bank.pay(1)

    paying = threading.Thread(target=pay)
    paying.start()
    try:
        for n in range(40):
            victim = bank.start()
            ended.wait(luck.uniform(0.2, 1.2))
            if n % 4 == 3:
                bank.kill_the_log()
            victim.kill()
            assert victim.finish()[::2] == (-signal.SIGKILL, "")
    finally:
        ended.set()
        paying.join(40)
    bank.finish()
    bank.check()


@pytest.mark.parametrize(
    ("line", "nth"), _STAGES, ids=[f"{_TEXTS[line]} {nth}" for line, nth in _STAGES]
)
def test_a_bank_that_wakes_up_when_another_has_taken_over_changes_nothing(
    bank: Bank, line: int, nth: int
) -> None:
    bank.recipe = RECIPE.replace('order="exclusive"', 'order="exclusive", ack_wait=1')
    bank.pay(10)
    sleeper = bank.start_until(line, nth, signal.SIGSTOP)
    until(lambda: os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOHANG), "its sleep", 20)
    other = bank.start()
    until(lambda: bank.waits or bank.accounts == bank.paid, "another", 20)
    in_the_midst = _TEXTS[line].startswith("db.execute(PAY") or (
        _TEXTS[line].startswith("with ") and nth % 2 == 0
    )
    assert bank.waits == in_the_midst
    sleeper.kill(signal.SIGCONT)
    until(lambda: bank.accounts == bank.paid, "the rest", 20)
    sleeper.kill()
    other.kill()
    bank.finish()
    bank.check()


# -- Without what the page says it takes


def test_without_autocommit_nothing_is_paid_though_all_is_acknowledged(bank: Bank) -> None:
    bank.recipe = without(", autocommit=True")
    bank.pay(10)
    bank.finish()
    assert bank.accounts == {}


def test_without_its_position_some_payments_are_made_twice(bank: Bank) -> None:
    bank.recipe = without("if db.execute(NEW, record.position).rowcount:", "if True:")
    kill_at_each_line(bank)
    times = {name: cents // bank.paid[name] for name, cents in bank.accounts.items()}
    assert times.keys() == bank.paid.keys()
    assert set(times.values()) > {1}


def test_without_a_transaction_some_payments_are_not_made(bank: Bank) -> None:
    bank.recipe = without("with db.transaction():", "if True:")
    kill_at_each_line(bank)
    assert bank.accounts.items() < bank.paid.items()


def test_acknowledged_before_they_are_committed_some_payments_are_not_made(bank: Bank) -> None:
    bank.recipe = without("record.ack()", "pass")
    early = "with (record.ack(), payments.flush(), db.transaction())[-1]:"
    bank.recipe = bank.recipe.replace("with db.transaction():", early)
    kill_at_each_line(bank)
    assert bank.accounts.items() < bank.paid.items()


def without(part: str, instead: str = "") -> str:
    assert RECIPE.count(part) == 1
    return RECIPE.replace(part, instead)
