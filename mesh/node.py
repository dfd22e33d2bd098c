"""The node: what a program makes to take part, and where its handles come from.

The roof over everything: it puts the parts together in the order in which they need each other, and
takes them apart again within a deadline. It decides nothing about peers or messages.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import secrets
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from mesh import host, limits
from mesh.control_loop import ControlLoop
from mesh.discovery.source import Source
from mesh.errors import Closed, Forked, Timeout
from mesh.hooks import Hooks
from mesh.membership import Membership
from mesh.message import PeerEvent, PeerInfo, Stats, Untrusted
from mesh.names import check_node_name
from mesh.options import (
    DiscoveryName,
    NodeOptions,
    PublisherOptions,
    PullerOptions,
    ServiceOptions,
    SubscriberOptions,
    WhenFull,
    check_count,
    check_timeout,
)
from mesh.sockets.client import Client, Requests
from mesh.sockets.control import Card, Marked, Offer, OfferKind
from mesh.sockets.control_link import ControlLink
from mesh.sockets.curve import derive_keys
from mesh.sockets.home import Core, Counters, Home, node_text
from mesh.sockets.publisher import Publisher, Topic, Topics
from mesh.sockets.puller import Puller, Tasks
from mesh.sockets.pusher import Pusher, Workers
from mesh.sockets.server import Server
from mesh.sockets.subscriber import Subscriber, Subscription
from mesh.sockets.transport import Transport
