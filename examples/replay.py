"""A stream is read again: from its beginning, from a time on, and on into what comes.

python examples/replay.py
"""

import tempfile
from datetime import UTC, datetime

from mesh import Node

with tempfile.TemporaryDirectory() as folder, Node("station", durable=folder) as node:
    readings = node.stream("readings")
    readings.append_many([18.5, 19.0, 19.5])
    noon = datetime.now(UTC)
    readings.append_many([20.0, 20.5])

    print("all:", [record.payload for record in readings.replay()])
    print("from noon on:", [record.payload for record in readings.replay(noon)])

    for record in readings.replay(follow=True):
        print("offset", record.offset, "is", record.payload)
        if record.payload == 20.5:
            readings.append(21.0)  # is read next, as is what other nodes append
        elif record.payload == 21.0:
            break
