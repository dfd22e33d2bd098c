"""The durable log beside a node: records, acknowledgements, replay.

Nothing of it is in this version. It will live here, above `mesh.sockets` and beside
`mesh.membership`, and only its storage module will touch files.
"""
