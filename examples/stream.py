"""A stream: what was appended is there after the program has ended, and is read again.

python examples/stream.py DIRECTORY      # several times: it goes on where it was
"""

import sys

from mesh import Node

with Node("shop", durable=sys.argv[1]) as node:
    orders = node.stream("orders")
    receipt = orders.append({"item": "lamp"}, key="customer-7842")
    print("order", receipt.offset, "is", receipt.durability)
    with orders.consumer("billing") as billing:
        record = billing.recv(timeout=5)
        print("billing", record.offset, record.payload)
        record.ack()
    print("orders so far:", [record.offset for record in orders.replay()])
