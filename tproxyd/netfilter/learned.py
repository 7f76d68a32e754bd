"""Learned flows in the kernel's sets: put in, taken out, read with their counters. Raw nfnetlink, blocking.

What a flow needs to be forwarded well stands in the rules (`nft_learned`); who may be learned is not decided here.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tproxyd.flow import Endpoint, FlowKey
from tproxyd.netfilter import nfnetlink, nft_learned

_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_HEADER_BYTES: Final = {4: 28, 6: 48}
_SYSCTL: Final = Path("/proc/sys/net")
_UDP_TIMEOUT: Final = "netfilter/nf_conntrack_udp_timeout"


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of a learned flow since it was learned.

    Attributes:
        came: packets that came in.
        left: packets that went on, past every other rule.
        payload_bytes: what these held, without IP and UDP headers.
    """

    came: int = 0
    left: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the kernel knows of a learned flow.

    Attributes:
        alive: it has not been silent for too long.
    """

    alive: bool
    up: Way
    down: Way


def is_key(key: FlowKey) -> bool:
    """Tell whether addresses and ports are such that a set can hold them."""
    try:
        packed = _packed(*key)
    except (OSError, struct.error, UnicodeError, ValueError):
        return False
    return len(packed) == len(_packed(key.client, key.client)) and 0 not in (key.client.port, key.orig_dst.port)


def learn(keys: Iterable[FlowKey]) -> None:
    """Have the kernel forward these flows from now on.

    Raises:
        RulesetError: the table is gone or a set is full; no flow was learned then.
    """
    changes = []
    for version, some in _by_version(keys).items():
        ways = [packed for key in some for packed in (_packed(*key), _packed(key.orig_dst, key.client))]
        for counts in (nft_learned.LEFT, nft_learned.CAME):
            changes += nfnetlink.add(counts[version], ways)
        changes += nfnetlink.add(nft_learned.FLOWS[version], [_packed(*key) for key in some])
    nfnetlink.commit(changes)


def forget(keys: Iterable[FlowKey]) -> None:
    """Have the kernel hand these flows to the daemon again.

    Raises:
        RulesetError: the table is gone.
    """
    changes = []
    for version, some in _by_version(keys).items():
        changes += nfnetlink.remove(nft_learned.FLOWS[version], [_packed(*key) for key in some])
        ways = [packed for key in some for packed in (_packed(*key), _packed(key.orig_dst, key.client))]
        for counts in (nft_learned.LEFT, nft_learned.CAME):
            changes += nfnetlink.remove(counts[version], ways)
    nfnetlink.commit(changes)


def forget_all(versions: Iterable[int]) -> None:
    """Empty the sets.

    Raises:
        RulesetError: the table is gone.
    """
    sets = (nft_learned.FLOWS, nft_learned.LEFT, nft_learned.CAME)
    nfnetlink.commit([change for version in versions for each in sets for change in nfnetlink.flush(each[version])])


def traffic(version: int, keys: Iterable[FlowKey]) -> dict[FlowKey, Traffic]:
    """Read what these flows of a family have done.

    `came` is read before `left`, so that a packet on its way between the two is not taken for a lost one.

    Raises:
        RulesetError: the table is gone.
    """
    alive = {packed for packed, _, _ in nfnetlink.elements(nft_learned.FLOWS[version])}
    came = {key: packets for key, packets, _ in nfnetlink.elements(nft_learned.CAME[version])}
    left = {key: (packets, size) for key, packets, size in nfnetlink.elements(nft_learned.LEFT[version])}

    def way(sender: Endpoint, receiver: Endpoint) -> Way:
        packed = _packed(sender, receiver)
        packets, size = left.get(packed, (0, 0))
        return Way(came.get(packed, 0), packets, size - packets * _HEADER_BYTES[version])

    return {key: Traffic(_packed(*key) in alive, way(*key), way(key.orig_dst, key.client)) for key in keys}


def renew_lease(versions: Iterable[int], lease_s: float) -> None:
    """Let learned flows of these families pass for `lease_s` seconds from now; 0: no more.

    Raises:
        RulesetError: the table is gone.
    """
    nfnetlink.renew_lease(tuple(versions), lease_s, nft_learned.LEASE_SET)


def why_not(version: int, interfaces: Iterable[str], idle_s: int) -> str | None:
    """Say which setting of the box keeps flows of a family from being learned; None: nothing does."""
    family = {4: "ipv4", 6: "ipv6"}[version]
    for where in ("all", *interfaces) if version == 4 else ("all",):  # IPv6 asks no interface whether to forward
        if not _number(f"{family}/conf/{where}/forwarding", missing=1):
            return f"net.{family}.conf.{where}.forwarding is 0"
    kept_s = _number(_UDP_TIMEOUT, missing=idle_s + 1)
    if kept_s <= idle_s:
        return f"net.{_UDP_TIMEOUT.replace('/', '.')} is {kept_s}: a flow may be silent for {idle_s} s"
    return None


def _number(name: str, missing: int) -> int:
    """Read a sysctl; an interface that is not there yet is no reason."""
    try:
        return int((_SYSCTL / name).read_text())
    except OSError:
        return missing


def _by_version(keys: Iterable[FlowKey]) -> dict[int, list[FlowKey]]:
    found: dict[int, list[FlowKey]] = {}
    for key in keys:
        found.setdefault(key.version, []).append(key)
    return found


def _packed(sender: Endpoint, receiver: Endpoint) -> bytes:
    """A set's key: each field padded to 4 bytes."""
    return b"".join(
        socket.inet_pton(_FAMILY[each.version], each.address) + struct.pack("!Hxx", each.port)
        for each in (sender, receiver)
    )
