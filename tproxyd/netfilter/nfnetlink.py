"""The lease of an open gateway, renewed by raw nfnetlink (linux/netfilter/nf_tables.h).

libnftables reads the whole table before it adds one element, which with 100,000 excluded prefixes takes most of
a second and 200 MB. These few bytes take microseconds, and need no library.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from tproxyd.errors import RulesetError
from tproxyd.netfilter import nft

_NETLINK_NETFILTER: Final = 12
_SUBSYS_NFTABLES: Final = 10
_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_NEW_ELEMENT: Final = (_SUBSYS_NFTABLES << 8) | 12
_DELETE_ELEMENT: Final = (_SUBSYS_NFTABLES << 8) | 14
_NFPROTO: Final = {"inet": 1, 4: 2, 6: 10}
_REQUEST_ACK: Final = 0x1 | 0x4
_CREATE: Final = 0x400
_NESTED: Final = 0x8000
_ERROR_MESSAGE: Final = 2
_TIMEOUT_S: Final = 2.0


def renew_lease(versions: tuple[int, ...], lease_s: float) -> None:
    """Let an open gateway go on intercepting for `lease_s` seconds from now; 0 takes the lease back.

    Adding a live element again does not move its end before Linux 6.12, so it is deleted first; the `add`
    before that keeps the deletion from failing where the element has expired.

    Raises:
        RulesetError: the table or its set is gone, or CAP_NET_ADMIN is missing.
    """
    steps = [(_NEW_ELEMENT, 60.0), (_DELETE_ELEMENT, 0.0)]
    if lease_s:
        steps.append((_NEW_ELEMENT, lease_s))
    batch = _message(_BATCH_BEGIN, 0x1, 0, struct.pack("!BBH", 0, 0, _SUBSYS_NFTABLES))
    for number, (kind, timeout_s) in enumerate(steps, 1):
        flags = _REQUEST_ACK | (_CREATE if kind == _NEW_ELEMENT else 0)
        batch += _message(
            kind, flags, number, struct.pack("!BBH", _NFPROTO["inet"], 0, 0) + _elements(versions, timeout_s)
        )
    batch += _message(_BATCH_END, 0x1, len(steps) + 1, struct.pack("!BBH", 0, 0, _SUBSYS_NFTABLES))
    _send(batch, len(steps))


def _elements(versions: tuple[int, ...], timeout_s: float) -> bytes:
    elements = b""
    for version in versions:
        element = _attribute(1 | _NESTED, _attribute(1, bytes([_NFPROTO[version]])))
        if timeout_s:
            element += _attribute(4, struct.pack("!Q", int(timeout_s * 1000)))
        elements += _attribute(1 | _NESTED, element)
    table = nft.TABLE.split()[1].encode() + b"\0"
    return _attribute(1, table) + _attribute(2, nft.LEASE_SET.encode() + b"\0") + _attribute(3 | _NESTED, elements)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def _send(batch: bytes, replies: int) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        try:
            netlink.bind((0, 0))
            netlink.send(batch)
            while replies > 0:
                replies -= _acknowledged(netlink.recv(1 << 16))
        except OSError as error:
            raise RulesetError(f"nftables: the lease could not be renewed: {error}") from error


def _acknowledged(data: bytes) -> int:
    count = 0
    while data:
        length, kind = struct.unpack_from("=IH", data)
        if kind == _ERROR_MESSAGE:
            (code,) = struct.unpack_from("=i", data, 16)
            if code:
                raise OSError(-code, os.strerror(-code))
            count += 1
        data = data[(length + 3) & ~3 :]
    return count
