"""The ipsets in the kernel (include/uapi/linux/netfilter/ipset/ip_set.h), by nfnetlink.

Our own messages rather than pyroute2's: that sends one per prefix (143 µs each, so 14 s for 100,000, where a
thousand to a message take 0.2 s), and it opens an event loop of its own, which a running uvloop refuses.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Final, Self

from tproxyd.errors import KernelUnsupported, PermissionDenied, RulesetError
from tproxyd.netfilter.iptables import HALVES, IpSet, lease_name
from tproxyd.netfilter.iptables_match import SET_PREFIX

_NEW_SET: Final = f"{SET_PREFIX}new"
"""Where a set is filled before it takes its place."""

_KINDS: Final = ("hash:net", "hash:ip,port,ip")
_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_VERSION: Final = {socket.AF_INET: 4, socket.AF_INET6: 6}
_LONGEST: Final = {4: 32, 6: 128}
_PREFIXES_A_MESSAGE: Final = 1024  # a nested attribute ends at 64 KiB; an IPv6 prefix takes 44 bytes

_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 6 << 8
_PROTOCOL_VERSION: Final = 6
_NLM_REQUEST, _NLM_ACK, _NLM_EXCL, _NLM_DUMP = 0x1, 0x4, 0x200, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_CREATE, _DESTROY, _FLUSH, _RENAME, _SWAP, _LIST, _ADD, _GET_TYPE = 2, 3, 4, 5, 6, 7, 9, 13
_PROTOCOL, _SETNAME, _TYPENAME, _REVISION, _FAMILY_ATTR, _FLAGS, _DATA, _ADT, _LINENO = range(1, 10)
_IP, _CIDR, _TIMEOUT, _MAXELEM, _HASHSIZE = 1, 3, 6, 19, 18
_LIST_NAMES_ONLY: Final = 1 << 1
_NESTED, _NETWORK_ORDER, _TYPE_BITS = 0x8000, 0x4000, 0x3FFF
_RECEIVE_BYTES: Final = 1 << 16
_TIMEOUT_S: Final = 20.0

_REASONS: Final = {
    errno.ENOENT: "no such set",
    errno.EEXIST: "the set exists already",
    4097: "ipset protocol error",
    4098: "the kernel lacks its set type (CONFIG_IP_SET_HASH_NET, CONFIG_IP_SET_HASH_IPPORTIP)",
    4099: "too many sets",
    4100: "rules still use it",
    4101: "the new name is taken",
    4102: "sets of different types can't be swapped",
    4103: "the prefix is in it already",
    4104: "a prefix that hash:net can't hold",
    4107: "the set was made without timeouts",
    4108: "rules still use it",
    4352: "the set is full",
}
"""Errno values, and those of enum ipset_errno."""


def names() -> list[str]:
    """Return the names of all sets that are ours, by their prefix; also a half-filled one.

    Raises:
        KernelUnsupported, PermissionDenied: as everywhere here.
    """
    with _Netlink() as kernel:
        return _names(kernel)


def read() -> tuple[IpSet, ...]:
    """Return our sets, in the order of their names, with sorted members (none for sets whose members expire).

    Raises:
        RulesetError, KernelUnsupported, PermissionDenied: the kernel refuses.
    """
    with _Netlink() as kernel:
        return tuple(_read(kernel, name) for name in _names(kernel))


def put(wanted: Iterable[IpSet]) -> None:
    """Bring these sets to what is wanted, each at one stroke; other sets stay.

    A set that holds the wanted prefixes already is not touched, nor is a lease that is there.

    Raises:
        As `read`.
    """
    with _Netlink() as kernel:
        held = set(_names(kernel))
        if _NEW_SET in held:
            kernel.change(_DESTROY, _NEW_SET, [])
        for ip_set in wanted:
            if ip_set.name in held and same(_read(kernel, ip_set.name), ip_set):
                continue
            _create(kernel, replace(ip_set, name=_NEW_SET))
            other_name = _text(_TYPENAME, ip_set.name)
            if ip_set.name in held:
                kernel.change(_SWAP, _NEW_SET, [other_name])
                kernel.change(_DESTROY, _NEW_SET, [])
            else:
                kernel.change(_RENAME, _NEW_SET, [other_name])


def keep_only(wanted: Iterable[IpSet]) -> None:
    """Destroy our sets that are not among these; no rule may use them any more.

    Raises:
        As `read`.
    """
    kept = {ip_set.name for ip_set in wanted}
    with _Netlink() as kernel:
        for name in _names(kernel):
            if name not in kept:
                kernel.change(_DESTROY, name, [])


def same(one: IpSet, other: IpSet) -> bool:
    """Tell whether two sets are alike, in whatever order their prefixes come."""
    alike = replace(one, prefixes=()) == replace(other, prefixes=())
    return alike and (one.timeout_s is not None or set(one.prefixes) == set(other.prefixes))


def renew_lease(versions: Iterable[int], lease_s: int) -> None:
    """Let the lease last `lease_s` seconds from now; 0 takes it back.

    Adding a live member again moves its end.

    Raises:
        RulesetError: the set is gone.
    """
    with _Netlink() as kernel:
        for version in versions:
            if lease_s:
                _add(kernel, lease_name(version), version, HALVES[version], timeout_s=lease_s)
            else:
                kernel.change(_FLUSH, lease_name(version), [])


def _names(kernel: _Netlink) -> list[str]:
    replies = kernel.dump([_number(_FLAGS, _LIST_NAMES_ONLY)])
    found = (attributes[_SETNAME].rstrip(b"\0").decode() for attributes in replies)
    return sorted(name for name in found if name.startswith(SET_PREFIX))


def _read(kernel: _Netlink, name: str) -> IpSet:
    found = IpSet(name, 4, ())
    prefixes: list[str] = []
    for attributes in kernel.dump([_text(_SETNAME, name)]):
        if _FAMILY_ATTR in attributes:
            found = _header(name, attributes)
        if _ADT in attributes and found.timeout_s is None:
            prefixes += [_prefix(member, found.version) for _, member in _attributes(attributes[_ADT])]
    return replace(found, prefixes=tuple(sorted(prefixes)))


def _header(name: str, attributes: dict[int, bytes]) -> IpSet:
    kind = attributes[_TYPENAME].rstrip(b"\0").decode()
    if kind not in _KINDS:
        raise RulesetError(f"ipset {name} exists and is not tproxyd's: rename or destroy it")
    version = _VERSION.get(socket.AddressFamily(attributes[_FAMILY_ATTR][0]), 0)
    timeout = dict(_attributes(attributes[_DATA])).get(_TIMEOUT)
    timeout_s = None if timeout is None else int.from_bytes(timeout, "big")
    return IpSet(name, version, (), timeout_s, kind)


def _create(kernel: _Netlink, ip_set: IpSet) -> None:
    family = _byte(_FAMILY_ATTR, _FAMILY[ip_set.version])
    (kind,) = kernel.request(_GET_TYPE, _NLM_ACK, [_text(_TYPENAME, ip_set.kind), family])
    settings = [
        _number(_HASHSIZE, max(1024, len(ip_set.prefixes) // 4)),
        _number(_MAXELEM, max(ip_set.max_members, len(ip_set.prefixes))),
    ]
    if ip_set.timeout_s is not None:
        settings.append(_number(_TIMEOUT, ip_set.timeout_s))
    head = [_text(_TYPENAME, ip_set.kind), _attribute(_REVISION, kind[_REVISION]), family]
    kernel.change(_CREATE, ip_set.name, [*head, _attribute(_DATA | _NESTED, b"".join(settings))], exclusive=True)
    _add(kernel, ip_set.name, ip_set.version, ip_set.prefixes)


def _add(kernel: _Netlink, name: str, version: int, prefixes: Iterable[str], timeout_s: int | None = None) -> None:
    timeout = b"" if timeout_s is None else _number(_TIMEOUT, timeout_s)
    rest = iter(prefixes)
    while batch := list(islice(rest, _PREFIXES_A_MESSAGE)):
        members = b"".join(_member(prefix, version, timeout) for prefix in batch)
        kernel.change(_ADD, name, [_attribute(_LINENO, struct.pack("=I", 0)), _attribute(_ADT | _NESTED, members)])


def _member(prefix: str, version: int, timeout: bytes) -> bytes:
    address, _, length = prefix.partition("/")
    packed = socket.inet_pton(_FAMILY[version], address)
    ip = _attribute(_IP | _NESTED, _attribute((1 if version == 4 else 2) | _NETWORK_ORDER, packed))
    cidr = _byte(_CIDR, int(length or _LONGEST[version]))
    return _attribute(_DATA | _NESTED, ip + cidr + timeout)


def _prefix(member: bytes, version: int) -> str:
    attributes = dict(_attributes(member))
    ((_, packed),) = _attributes(attributes[_IP])
    length = attributes[_CIDR][0] if _CIDR in attributes else _LONGEST[version]
    return f"{socket.inet_ntop(_FAMILY[version], packed)}/{length}"


class _Netlink:
    """A netlink socket for ipset requests (Documentation/userspace-api/netlink/intro.rst); close it, or use `with`.

    Raises:
        KernelUnsupported: the kernel has no ipset, or a set type is missing.
        PermissionDenied: without CAP_NET_ADMIN.
        RulesetError: any other refusal.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()

    def change(self, command: int, name: str, attributes: list[bytes], *, exclusive: bool = False) -> None:
        """Change one set; `exclusive`: it must not exist yet."""
        flags = _NLM_ACK | (_NLM_EXCL if exclusive else 0)
        with _naming(name):
            self.request(command, flags, [_text(_SETNAME, name), *attributes])

    def dump(self, attributes: list[bytes]) -> Iterator[dict[int, bytes]]:
        """Read sets; one that is not there gives nothing."""
        return self._exchange(_LIST, _NLM_DUMP, attributes)

    def request(self, command: int, flags: int, attributes: list[bytes]) -> list[dict[int, bytes]]:
        """Send one request and return the attributes of the answers to it."""
        return list(self._exchange(command, flags, attributes))

    def _exchange(self, command: int, flags: int, attributes: list[bytes]) -> Iterator[dict[int, bytes]]:
        self._sequence += 1
        payload = struct.pack("=BBH", socket.AF_INET, 0, 0) + _byte(_PROTOCOL, _PROTOCOL_VERSION) + b"".join(attributes)
        header = struct.pack("=IHHII", 16 + len(payload), _SUBSYSTEM | command, _NLM_REQUEST | flags, self._sequence, 0)
        self._socket.send(header + payload)
        while True:
            for kind, body in self._receive():
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", body)
                    if code:
                        raise _error(-code)
                    return
                if kind == _NLMSG_DONE:
                    return
                yield dict(_attributes(body[4:]))

    def _receive(self) -> Iterator[tuple[int, bytes]]:
        try:
            received = self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise RulesetError(f"no answer from the kernel: {error}") from error
        offset = 0
        while offset < len(received):
            length, kind, _flags, sequence, _port = struct.unpack_from("=IHHII", received, offset)
            if sequence == self._sequence:
                yield kind, received[offset + 16 : offset + length]
            offset += _aligned(length)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except RulesetError as error:
        raise RulesetError(f"ipset {name}: {error}") from error


def _error(code: int) -> KernelUnsupported | PermissionDenied | RulesetError:
    if code == errno.EPERM:
        return PermissionDenied("ipset: not permitted: run as root or with CAP_NET_ADMIN")
    if code == errno.EINVAL:
        return KernelUnsupported("the kernel has no ipset (CONFIG_IP_SET): set interception.ruleset: nftables")
    return RulesetError(_REASONS.get(code) or (os.strerror(code) if code < 4096 else f"ipset error {code}"))


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(_aligned(length) - length)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        yield kind & _TYPE_BITS, data[offset + 4 : offset + length]
        offset += _aligned(length)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _byte(kind: int, value: int) -> bytes:
    return _attribute(kind, bytes((value,)))


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind | _NETWORK_ORDER, struct.pack("!I", value))


def _aligned(length: int) -> int:
    return (length + 3) & ~3
