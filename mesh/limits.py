"""Every bound in one place.

A table, queue or cache that grows with what a peer sends has its bound here, and a counter for
what it refused. Units come last in a name. Users change the few that are options
(``mesh.options``); the rest are here to be read.
"""

from __future__ import annotations

from typing import Final

# Names
NAME_BYTES_MAX: Final = 255
"""UTF-8 bytes of a channel name or pattern. MQTT allows 65,535, file systems 255."""
NAME_LEVELS_MAX: Final = 32
NODE_NAME_BYTES_MAX: Final = 63
"""A DNS label, so that a node's name fits wherever mDNS tools show it."""

SECRET_CHARACTERS_MIN: Final = 16
"""Of a realm's secret: what is shorter can be guessed from a recorded handshake."""

# Frames
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Default of the option ``message_bytes_max``."""
FRAME_OVERHEAD_BYTES_MAX: Final = 128 * 1024
"""What a frame may have over `message_bytes_max`: name, header and headers, or a batch."""
FRAME_MESSAGES_MAX: Final = 4096
HEADERS_MAX: Final = 64
"""Entries in one message's headers."""
LETTER_HEADERS: Final = 6
"""What a dead letter says of itself, beside those of its record."""
HEADERS_BYTES_MAX: Final = 32 * 1024
"""All of them, as encoded."""
CONTROL_BYTES_MAX: Final = 1024 * 1024
SMALL_FRAME_BYTES_MAX: Final = 1024
"""Of a frame without payloads: a subscription, credit. A larger one ends the connection."""
SUBSCRIPTION_BYTES_MAX: Final = NAME_BYTES_MAX + 32

# MessagePack, as decoded from a socket. A claim of n items makes the decoder reserve 8n bytes
# before the first item is read, once per level of nesting.
DEPTH_MAX: Final = 32
ARRAY_ITEMS_MAX: Final = 1 << 20
MAP_ITEMS_MAX: Final = 1 << 20
CONTAINERS_MAX: Final = 1 << 20
"""Lists and maps in one payload. An empty one is a byte on the wire and some hundred in memory, and
the garbage collector looks at each: 63 MB of them took 23 s, during which no thread ran."""

# LZ4
COMPRESS_BYTES_MIN: Final = 1024
"""Below this a compressed body is rarely smaller (LZ4's own frame costs 15 to 19 bytes)."""

# Queues and tables
BUFFER_MESSAGES: Final = 1000
"""Default of ``buffer_messages``: libzmq's own high-water mark."""
BUFFER_BYTES: Final = 64 * 1024 * 1024
"""Default of ``buffer_bytes``: 256 full batches, or 64 messages of 1 MiB."""
SLOT_BYTES_MIN: Final = 256 * 1024
"""Smallest share of a buffer that one frame takes. With 64 KiB the pads behind a frame of 1 MiB
took a fifth of its time."""
PREFETCH: Final = 4
"""Default of ``puller(prefetch=)``: small, so that tasks stay where an idle worker can get them."""
PREFETCH_MAX: Final = 65536
RECORDING_BYTES_MAX: Final = BUFFER_BYTES
"""Of what was published and is to be recorded, and was not given to the log yet: as much as the
buffer of a subscriber."""
RECORDING_FRAME_BYTES: Final = 512
"""What a frame costs there besides its bytes."""
RECORDINGS_MAX: Final = 64
"""Of one node: each has a thread."""
RECORDING_PARTITIONS_MAX: Final = 16
"""Partitions that one recording has written to, which it says."""
REPAIR_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of what one subscriber holds behind gaps that are being repaired, and as much of what was found
for them out of turn."""
REPAIR_FLOWS_MAX: Final = 4096
"""Topics, each of one sender, in which one subscriber repairs gaps at a time."""
REPAIR_MESSAGE_BYTES: Final = 100
"""What a message that is held costs besides its bytes."""
RECORDINGS_MET_MAX: Final = 4096
"""Recordings of nodes that have gone, which are remembered."""
RECV_MANY_MAX: Final = 1_000_000
"""Largest `count_max` of a `recv_many`."""
RECV_MANY_BYTES: Final = 1 << 20
"""A `recv_many` that has so much reads no further: more than the processor's caches hold is slower,
and what stays with libzmq is bounded there."""
BACKLOG: Final = 1000
"""Requests a server holds that no handler has started."""
OUTSTANDING_MAX: Final = 65536
"""Requests one client waits for at a time."""
TRACKED_CHANNELS_MAX: Final = 100_000
"""(sender, topic) pairs whose sequence one subscriber follows."""
READERS_MAX: Final = 100_000
"""Subscriber addresses one node's publishers know."""
CHANNELS_PER_NODE_MAX: Final = 100_000
PEERS_MAX: Final = 1000
"""Peers of a node: each costs a socket or more, and a node's context allows 4096."""
LINKS_PER_PEER_MAX: Final = 256
"""Sockets made for what one peer offers: a quarter of the descriptors a process usually has."""
LINKS_MISSING_MAX: Final = 4096
"""Links that could not be made, and are tried again."""
UNTRUSTED_MAX: Final = 1000
INTRODUCTIONS_MAX: Final = PEERS_MAX
HANDSHAKES_MAX: Final = 1000
"""Accepted control links that have not proven themselves yet."""
DIALS_MAX: Final = 64
"""Control links being dialled at a time: each costs a socket. More wait their turn."""
DIALS_EACH_MAX: Final = 8
"""Of them, for one node: a host has a few addresses, a forged announcement as many as it likes."""
DIALS_EACH_MIN: Final = 2
"""Likewise, while many wait: one address that leads nowhere does not delay a node with two."""
GONE_MAX: Final = 4096
"""Ids of nodes that ended, so that stale hints do not bring back a ghost."""
HOOK_EVENTS_MAX: Final = 10_000
"""Events waiting for a user's hooks; more are dropped and counted."""
SIGHTINGS_MAX: Final = 4096
"""Announcements remembered from discovery; a new one takes the place of an old one of which nothing
else is known."""
ANNOUNCEMENT_BYTES_MAX: Final = 64 * 1024
"""A node's file in the runtime directory."""
SEEDS_MAX: Final = 64
"""Seeds of a node: each host name is resolved by a thread of its own."""
RESOLVING_MAX: Final = 64
"""Records of mDNS that came without their address and are being asked for."""
SOCKET_PATH_BYTES_MAX: Final = 107
"""Of a Unix socket, on Linux."""
ENDPOINTS_MAX: Final = 64
"""Endpoints of one node that are looked at."""

# The log
BATCH_BYTES_MAX: Final = 1 << 27
"""Payloads of one batch, decompressed: twice the largest message."""
BATCH_RECORDS_MAX: Final = 65_536
KEY_BYTES_MAX: Final = 1024
DELAY_S_MAX: Final = 365 * 86_400.0
"""Of a delayed record."""
WRITER_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of appends that wait for the writer of a partition: whoever brings more waits."""
TORN_BYTES_MAX: Final = BATCH_BYTES_MAX
"""Of the torn tails that are kept aside, together. A file may have grown by more than anybody
appended."""
TORN_FILES_MAX: Final = 16
READ_BYTES: Final = 1 << 20
"""Of a log, asked for at one time."""
READ_BYTES_MAX: Final = 16 << 20
DELIVERY_BYTES: Final = 2 << 20
"""Of records that a member of a group is sent at one time."""
READ_WAIT_MS: Final = 20_000
"""A sidecar that has nothing new for a reader or member says so after that long, and is asked
again."""
READ_WAIT_MS_MAX: Final = 60_000
LOG_READERS_MAX: Final = 10_000
"""That wait for what comes next in one partition."""
PARTITIONS_MET_MAX: Final = 4096
"""Of one stream, that a node remembers."""
STREAMS_MAX: Final = 10_000
"""Of one sidecar."""
OPENINGS_MAX: Final = 64
"""Streams that a sidecar opens at a time: others wait for their turn."""
STREAMS_GONE_MAX: Final = STREAMS_MAX
"""That nobody has any more, and of which a node remembers who had them."""
SYNC_INTERVAL_S: Final = 1.0
"""Of a stream with ``durability="interval"``. Redis' ``appendfsync everysec``."""
PRODUCERS_MAX: Final = 10_000
"""Producers that a partition remembers; the one idle longest is forgotten first."""
PRODUCER_BATCHES: Final = 256
"""Latest batches of each that are remembered exactly: more than a client has in flight. Kafka keeps
5, and allows no more in flight."""
DEDUP_WINDOW_S: Final = 120.0
"""Default of ``dedup_window_s``: JetStream's."""
DEDUP_IDS_MAX: Final = 100_000
"""Of a partition, within the window; the oldest are forgotten first."""
DEDUP_ID_BYTES_MAX: Final = 255
DERIVED_OUTPUTS_MAX: Final = 256
"""Records of one partition that one input may be turned into."""
DERIVED_SOURCES_MAX: Final = 4096
"""Outputs of sources whose inputs a partition remembers."""
DERIVED_INTERVALS_KEPT: Final = 32_768
"""Of one output: half of the offsets a group looks at, so that all of these are known even if every
other input has no output."""
DERIVED_INTERVALS_EACH: Final = 40_960
"""With so many the lowest are forgotten, down to those. 16 bytes each."""
DERIVED_INTERVALS_MAX: Final = 1 << 20
"""Of all of a partition's sources together: 16 MiB."""
DERIVED_LATEST_MAX: Final = 65_536
"""Derived records remembered with their offset."""

# Groups
GROUP_WINDOW: Final = 65536
"""Offsets beyond the committed one that a group looks at: what is beyond waits in the log."""
SETTLED_MAX: Final = GROUP_WINDOW
"""Of each kind in one message of a member: it holds no more records."""
GROUPS_MAX: Final = 1024
"""Of one partition."""
PREFETCH_BYTES_MAX: Final = 64 << 20
"""Of records that one member holds."""
LETTERS_BYTES_MAX: Final = 4 << 20
"""Of dead letters of one partition that are on their way to their stream: with so many, no more are
sent."""
GROUP_MEMBERS_MAX: Final = PEERS_MAX
REASON_CHARACTERS_MAX: Final = 255
"""Of the reason that a member gives for rejecting a record."""

# Times
WAIT_FOR_ROOM_S: Final = 0.002
"""Longest sleep of a sender waiting for room: an XPUB reports POLLOUT even when full."""
TICK_S: Final = 0.25
"""Longest sleep of a control thread. A topic quiet for one tells its subscribers where its sequence
stands."""
BATCH_WINDOW_MS: Final = 0.5
"""Default of ``batch_window_ms``: some 1,000 messages at full speed, and less than a thread that
computes holds the interpreter for at a time (5 ms)."""
HANDSHAKE_S: Final = 3.0
"""A control link that has not made a peer by then is given up."""
REDIAL_S_MIN: Final = 0.5
REDIAL_S_MAX: Final = 30.0
"""Pause between dials of one node: doubles from the one to the other."""
FORGET_S: Final = 600.0
"""A node that only peers spoke of, and that has not been reached for this long, is no longer
dialled. What a source sees is dialled until the source withdraws it."""
SILENT_HEARTBEATS: Final = 3
"""A peer on another host is gone when it was silent for this many heartbeats."""
SILENT_HEARTBEATS_SAME_HOST: Final = 10
"""On the same host the kernel tells of a death; a process that is only stopped may come back."""
NAK_DELAY_S_MAX: Final = 86400.0
"""Longest delay that a member may ask for: a record that waits holds up what is committed."""
