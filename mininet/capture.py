"""What really crossed the wires: scapy listens on several nodes at once and keeps what a check needs of each packet."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from scapy.config import conf
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import CookedLinux  # noqa: F401  # scapy knows a link type only once its layer is loaded
from scapy.packet import Packet
from scapy.sendrecv import AsyncSniffer

_CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Endpoint(NamedTuple):
    """An address and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Seen:
    """A TCP or UDP packet on a node's interface, or the first fragment of one.

    Attributes:
        node: where it was seen.
        hops_left: TTL or hop limit; a router takes one away, a sender starts with 64.
        fragment: it is only a part of its datagram.
    """

    node: str
    network: str
    source: Endpoint
    destination: Endpoint
    hops_left: int
    fragment: bool

    @property
    def connection(self) -> frozenset[Endpoint]:
        """Both ends, whichever sent this."""
        return frozenset((self.source, self.destination))


class Capture:
    """Listens from `with` to its end.

    Only the first fragment of a datagram has ports, so the others are not kept.
    """

    def __init__(self, taps: dict[str, tuple[int, str]]) -> None:
        """Args: taps: by node, a process in its network namespace and the interface there."""
        self._taps = taps
        self._seen: list[Seen] = []
        self._start = 0
        self._old: set[frozenset[Endpoint]] = set()
        self._sockets: dict[Any, str] = {}
        self._sniffer: Any = None

    def __enter__(self) -> Self:
        for node, (pid, interface) in self._taps.items():
            with _network_namespace(pid):
                self._sockets[conf.L2listen(iface=interface, promisc=False)] = node
        self._sniffer = AsyncSniffer(opened_socket=self._sockets, store=False, prn=self._take)
        self._sniffer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sniffer.stop()
        for listener in self._sockets:
            listener.close()

    def forget(self) -> None:
        """Begin anew: neither what was seen so far nor the rest of those TCP connections is told any more."""
        self._start = len(self._seen)
        self._old = {packet.connection for packet in self._seen if packet.network == "tcp"}

    def seen(self) -> list[Seen]:
        """All packets since the start, or since `forget`."""
        return [packet for packet in self._seen[self._start :] if packet.connection not in self._old]

    def wait(self, condition: Callable[[list[Seen]], bool], timeout_s: float = 2.0) -> list[Seen]:
        """Wait until what was seen fulfils a condition or time is up; return it either way."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.seen()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.seen()

    def _take(self, packet: Packet) -> None:
        layer = next((layer for layer in (TCP, UDP) if layer in packet), None)
        ip = packet.getlayer(IP) or packet.getlayer(IPv6)
        if layer is None or ip is None:
            return
        four = isinstance(ip, IP)
        self._seen.append(
            Seen(
                node=str(packet.sniffed_on),
                network=layer.__name__.lower(),
                source=Endpoint(ip.src, packet[layer].sport),
                destination=Endpoint(ip.dst, packet[layer].dport),
                hops_left=ip.ttl if four else ip.hlim,
                fragment=bool(ip.flags.MF) if four else IPv6ExtHdrFragment in packet,
            )
        )


@contextmanager
def _network_namespace(pid: int) -> Iterator[None]:
    """Be in a process's network namespace for a moment: a socket stays where it was made."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(there)
        yield
    finally:
        _setns(home)
        os.close(there)
        os.close(home)


def _setns(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
