"""Pictures: NumPy arrays travel with their dtype and shape, and arrive without a copy.

python examples/numpy_frames.py camera     # in one terminal
python examples/numpy_frames.py            # in another, or several
"""

import sys

import numpy as np

from mesh import Node

if sys.argv[1:] == ["camera"]:
    with Node("camera") as node, node.publisher("frames", when_full="wait") as publisher:
        publisher.wait_for(1)
        for i in range(10):
            picture = np.full((480, 640, 3), i, dtype=np.uint8)
            picture.flags.writeable = False  # nobody changes it any more: sent without a copy
            publisher.send({"n": i, "picture": picture})
else:
    with Node("viewer") as node, node.subscriber("frames") as subscriber:
        for message in subscriber:
            picture = message.payload["picture"]  # read-only, in the memory it was received in
            print(message.payload["n"], picture.shape, picture.dtype, picture.mean(), flush=True)
            if message.payload["n"] == 9:
                break
