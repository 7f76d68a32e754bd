"""Set elements by raw nfnetlink (linux/netfilter/nf_tables.h): the lease of an open gateway, learned flows.

libnftables reads the whole table before it adds one element, which with 100,000 excluded prefixes takes most of
a second and 200 MB. These few bytes take microseconds, and need no library. Values and counters are in network
byte order.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from tproxyd.errors import RulesetError
from tproxyd.netfilter import nft

NFPROTO: Final = {"inet": 1, 4: 2, 6: 10}

_NETLINK_NETFILTER: Final = 12
_SUBSYS_NFTABLES: Final = 10
_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_NEW_ELEMENTS: Final = (_SUBSYS_NFTABLES << 8) | 12
_GET_ELEMENTS: Final = (_SUBSYS_NFTABLES << 8) | 13
_DELETE_ELEMENTS: Final = (_SUBSYS_NFTABLES << 8) | 14
_REQUEST: Final = 0x1
_ACK: Final = 0x4
_DUMP: Final = 0x300
_CREATE: Final = 0x400
_NESTED: Final = 0x8000
_TYPE_BITS: Final = 0x3FFF
_ERROR_MESSAGE: Final = 2
_DONE_MESSAGE: Final = 3
_TABLE, _SET, _ELEMENTS = 1, 2, 3
_KEY, _TIMEOUT, _EXPRESSION = 1, 4, 7
_DATA_VALUE: Final = 1
_EXPRESSION_DATA: Final = 2
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_TIMEOUT_S: Final = 2.0
_RECEIVE_BYTES: Final = 1 << 16
_KEYS_A_MESSAGE: Final = 512  # an attribute's length has 16 bits


@dataclass(frozen=True, slots=True)
class Change:
    """One message of a transaction: elements of one set come or go.

    Attributes:
        keys: None with `add` False: all that the set holds.
        timeout_s: of the new elements; None: as the set says.
    """

    name: str
    add: bool
    keys: tuple[bytes, ...] | None
    timeout_s: float | None = None


def add(name: str, keys: Iterable[bytes], timeout_s: float | None = None) -> list[Change]:
    """Let a set hold keys; one that it holds already stays as it is."""
    return [Change(name, True, part, timeout_s) for part in _parts(tuple(keys))]


def remove(name: str, keys: Iterable[bytes]) -> list[Change]:
    """Take keys out of a set. They are added first: to delete one that is not there fails the whole transaction."""
    found = []
    for part in _parts(tuple(keys)):
        found += [Change(name, True, part), Change(name, False, part)]
    return found


def flush(name: str) -> list[Change]:
    """Take everything out of a set."""
    return [Change(name, False, None)]


def commit(changes: list[Change]) -> None:
    """Make the changes, all or none.

    Raises:
        RulesetError: the table or a set is gone or full, or CAP_NET_ADMIN is missing.
    """
    if not changes:
        return
    batch = _message(_BATCH_BEGIN, _REQUEST, 0, _header(0, _SUBSYS_NFTABLES))
    for number, change in enumerate(changes, 1):
        kind, flags = (_NEW_ELEMENTS, _CREATE) if change.add else (_DELETE_ELEMENTS, 0)
        batch += _message(kind, _REQUEST | _ACK | flags, number, _body(change))
    batch += _message(_BATCH_END, _REQUEST, len(changes) + 1, _header(0, _SUBSYS_NFTABLES))
    try:
        with _open() as netlink:
            netlink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(batch))
            netlink.send(batch)
            left = len(changes)
            while left > 0:
                left -= sum(kind == _ERROR_MESSAGE for kind, _ in _messages(netlink.recv(_RECEIVE_BYTES)))
    except OSError as error:
        raise RulesetError(f"nftables: set {changes[0].name} could not be changed: {error}") from error


def elements(name: str) -> Iterator[tuple[bytes, int, int]]:
    """Read a set: each element's key, and the packets and bytes that its counter shows (0 where it has none).

    Raises:
        RulesetError: the table or the set is gone, or CAP_NET_ADMIN is missing.
    """
    try:
        with _open() as netlink:
            netlink.send(_message(_GET_ELEMENTS, _REQUEST | _DUMP, 1, _header(NFPROTO["inet"], 0) + _names(name)))
            while True:
                for kind, body in _messages(netlink.recv(_RECEIVE_BYTES)):
                    if kind in (_DONE_MESSAGE, _ERROR_MESSAGE):
                        return
                    listed = _attributes(body[4:]).get(_ELEMENTS, b"")
                    yield from (_element(element) for _, element in _each(listed))
    except OSError as error:
        raise RulesetError(f"nftables: set {name} could not be read: {error}") from error


def renew_lease(versions: tuple[int, ...], lease_s: float, name: str = nft.LEASE_SET) -> None:
    """Let a lease's families stand for `lease_s` seconds from now; 0 takes the lease back.

    Adding a live element again does not move its end before Linux 6.12, so it is deleted first.

    Raises:
        RulesetError: the table or its set is gone, or CAP_NET_ADMIN is missing.
    """
    keys = [bytes([NFPROTO[version]]) for version in versions]
    commit(remove(name, keys) + (add(name, keys, lease_s) if lease_s else []))


def _parts(keys: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    return [keys[at : at + _KEYS_A_MESSAGE] for at in range(0, len(keys), _KEYS_A_MESSAGE)]


def _open() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    netlink.settimeout(_TIMEOUT_S)
    netlink.bind((0, 0))
    return netlink


def _body(change: Change) -> bytes:
    body = _header(NFPROTO["inet"], 0) + _names(change.name)
    if change.keys is None:
        return body
    timeout = b"" if change.timeout_s is None else _attribute(_TIMEOUT, struct.pack("!Q", int(change.timeout_s * 1000)))
    listed = b"".join(
        _attribute(1 | _NESTED, _attribute(_KEY | _NESTED, _attribute(_DATA_VALUE, key)) + timeout)
        for key in change.keys
    )
    return body + _attribute(_ELEMENTS | _NESTED, listed)


def _names(name: str) -> bytes:
    table = nft.TABLE.split()[1]
    return _attribute(_TABLE, table.encode() + b"\0") + _attribute(_SET, name.encode() + b"\0")


def _element(data: bytes) -> tuple[bytes, int, int]:
    attributes = _attributes(data)
    key = _attributes(attributes[_KEY])[_DATA_VALUE]
    if _EXPRESSION not in attributes:
        return key, 0, 0
    counter = _attributes(_attributes(attributes[_EXPRESSION])[_EXPRESSION_DATA])
    return key, int.from_bytes(counter[_COUNTER_PACKETS], "big"), int.from_bytes(counter[_COUNTER_BYTES], "big")


def _header(family: int, resource: int) -> bytes:
    return struct.pack("!BBH", family, 0, resource)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    return dict(_each(data))


def _each(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        yield kind & _TYPE_BITS, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split what was received.

    Raises:
        OSError: the kernel says that a request failed.
    """
    at = 0
    while at < len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if kind == _ERROR_MESSAGE:
            (code,) = struct.unpack_from("=i", data, at + 16)
            if code:
                raise OSError(-code, os.strerror(-code))
        yield kind, data[at + 16 : at + length]
        at += (length + 3) & ~3
