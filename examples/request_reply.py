"""A service: a request goes to one server, and its answer or its error comes back.

python examples/request_reply.py serve   # in one terminal, or several
python examples/request_reply.py         # in another
"""

import sys
import threading

from mesh import Node, RemoteError

if sys.argv[1:] == ["serve"]:
    with Node("server") as node:

        @node.service("divide")
        def divide(request: dict[str, float]) -> float:
            return request["dividend"] / request["divisor"]

        threading.Event().wait()  # until Ctrl-C
else:
    with Node("caller") as node, node.client("divide") as client:
        print(client.request({"dividend": 7, "divisor": 2}, timeout=30))
        try:
            client.request({"dividend": 7, "divisor": 0}, timeout=1.0)
        except RemoteError as error:
            print("the server said:", error)
