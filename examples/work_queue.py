"""A queue: each task goes to one worker, and never waits behind a slow one.

python examples/work_queue.py work       # in one terminal, or several
python examples/work_queue.py            # in another
"""

import sys

from mesh import Node

if sys.argv[1:] == ["work"]:
    with Node("worker") as node, node.puller("numbers") as puller:
        for task in puller:
            print(task.payload, "squared is", task.payload**2, flush=True)
else:
    with Node("boss") as node, node.pusher("numbers") as pusher:
        pusher.on_loss(lambda loss: print("a worker went away with", loss.count, "tasks"))
        for number in range(10):
            pusher.send(number, timeout=30)  # waits while no worker has room
