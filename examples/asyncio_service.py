"""A service and its clients in asyncio: a hundred calls at once, all in one event loop.

python examples/asyncio_service.py
"""

import asyncio

from mesh import Node


async def main() -> None:
    async with Node("server") as server, Node("caller") as caller:

        @server.service("slow-echo", concurrency=100)
        async def slow_echo(request: int) -> int:
            await asyncio.sleep(0.05)
            return request

        async with caller.client("slow-echo") as client:
            calls = [client.arequest(i, timeout=10) for i in range(100)]
            print(sum(await asyncio.gather(*calls)))


asyncio.run(main())
