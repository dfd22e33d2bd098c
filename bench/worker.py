"""One process of one side: ``python -m bench.worker CONFIG``, told what to do by lines of JSON.

CONFIG is an object with ``side``, ``role``, ``setting`` and ``address``. Each line of standard
input names a method of the role and its arguments, and is answered by one line. Between them it
blocks on the pipe, and uses no processor. It ends with its input, and
with whoever started it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bench import lifeline
from bench.roles import Role
from bench.roles_asyncio import AsyncServer
from bench.setting import Address, Setting
from bench.sides import module_of


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def obey(role: Role, line: str) -> None:
    command = json.loads(line)
    method = command.pop("do")
    if method in ("receive", "latencies"):
        say(listening=True)
    say(**(getattr(role, method)(**command) or {}))


def main() -> None:
    lifeline.hold()
    config = json.loads(sys.argv[1])
    make = module_of(config["side"]).ROLES[config["role"]]
    role: Role = make(Setting(**config["setting"]), Address(**config["address"]))
    if isinstance(role, AsyncServer):
        role.looped.run(role.start())
        say(ready=True)
        role.looped.run(role.serve())
    say(ready=True)
    while line := sys.stdin.readline():
        obey(role, line)


if __name__ == "__main__":
    main()
