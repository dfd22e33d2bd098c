"""Putting messages on ZeroMQ: frame layout, codec, links, and one module for each pattern.

Only modules of this folder import zmq, msgpack or lz4. What decides (backlog, codec, control,
credit, failure, frame, outgoing, requests, sequences) holds no socket and reads no clock; the
shells over it hold almost no decisions.
"""
