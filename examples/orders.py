"""A consumer is killed in the middle of its work, and goes on: nothing is lost, nothing done twice.

python examples/orders.py
"""

import os
import sqlite3
import subprocess
import sys
import tempfile

from mesh import Node

NEW = """INSERT INTO done VALUES (?, ?) ON CONFLICT (partition)
         DO UPDATE SET last = excluded.last WHERE done.last < excluded.last"""


def bill(path: str) -> None:
    db = sqlite3.connect(path)
    with Node("billing") as node:
        orders = node.stream("orders").consumer("billing", order="exclusive")
        orders.resume_from(db.execute("SELECT partition, last FROM done"))
        for record in orders:
            with db:  # one transaction: the bill, and how far the bills have come
                if db.execute(NEW, record.position).rowcount:
                    db.execute("INSERT INTO bills VALUES (?)", (record.payload["id"],))
            print(f"order {record.payload['id']} is billed", flush=True)
            record.ack()


def main(folder: str) -> bool:
    os.environ["MESH_REALM"] = os.path.basename(folder)  # nobody else is in it
    db = sqlite3.connect(f"{folder}/bills.db")
    db.executescript("CREATE TABLE bills (id); CREATE TABLE done (partition PRIMARY KEY, last)")
    with Node("shop", durable=f"{folder}/log") as node:
        node.stream("orders").append_many({"id": number} for number in range(300))
        print("300 orders are appended")
        for number in (99, 199, 299):
            command = [sys.executable, __file__, f"{folder}/bills.db"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as billing:
                for line in billing.stdout or ():
                    if line == f"order {number} is billed\n":
                        billing.kill()
            print(f"order {number} is billed, and billing is killed with -9")
    billed = [number for (number,) in db.execute("SELECT id FROM bills ORDER BY id")]
    print(len(billed), "bills for", len(set(billed)), "orders")
    return billed == list(range(300))


if sys.argv[1:]:
    bill(sys.argv[1])
else:
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if main(folder) else 1)
