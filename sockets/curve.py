"""What a realm's secret becomes: one key, the CURVE key pair, and the answer to ZAP.

Every node of a realm derives the same key pair, so the handshake proves membership, not which
member. No I/O but the answers to ZeroMQ's own in-process questions.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from typing import Final

import msgspec
import zmq
from zmq.utils import z85

ZAP_DOMAIN: Final = b"mesh"
ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"


class Keys(msgspec.Struct, frozen=True):
    """A realm's keys. `repr` shows none of them."""

    realm_key: bytes
    public: bytes
    private: bytes

    def __repr__(self) -> str:
        return "Keys(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []  # a Struct has one of its own, which shows all


@functools.lru_cache(maxsize=8)
def derive_keys(realm: str, secret: str) -> Keys:
    """Keys from realm and secret by scrypt (RFC 7914; n=2¹⁴, r=8, p=1: about 50 ms and 16 MiB, the
    interactive parameters of its section 2)."""
    salt = b"mesh realm 1\0" + realm.encode()
    key = hashlib.scrypt(secret.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=32)
    private = z85.encode(hmac.digest(key, b"mesh curve private key 1", "sha256"))
    return Keys(key, zmq.curve_public(private), private)


def answer_zap(request: list[bytes], allowed: bytes) -> list[bytes]:
    """The reply to a ZAP request (ZeroMQ RFC 27): yes to CURVE with the `allowed` key, else no."""
    version, request_id, domain, _address, _identity, mechanism, *credentials = request
    known = (
        domain == ZAP_DOMAIN
        and mechanism == b"CURVE"
        and len(credentials) == 1
        and hmac.compare_digest(credentials[0], z85.decode(allowed))
    )
    status = [b"200", b"OK", b"member"] if known else [b"400", b"not of this realm", b""]
    return [version, request_id, *status, b""]
