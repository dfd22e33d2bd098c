"""A topic: one process publishes, any number subscribe.

python examples/topic.py publish     # in one terminal
python examples/topic.py             # in another, or several
"""

import sys
import time

from mesh import Node

if sys.argv[1:] == ["publish"]:
    with Node("thermometer") as node, node.publisher("sensors/kitchen/temp") as publisher:
        publisher.wait_for(1)  # nothing is lost to a subscriber that is still connecting
        for i in range(10):
            publisher.send({"celsius": 20 + i / 10})
            time.sleep(0.1)
else:
    with Node("display") as node, node.subscriber("sensors/*/temp") as subscriber:
        for message in subscriber:
            print(message.seq, message.channel, message.payload, flush=True)
            if message.seq == 10:
                break
        print("lost:", sum(subscriber.lost.values()))
