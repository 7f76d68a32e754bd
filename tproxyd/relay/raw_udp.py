"""Datagrams with any source address and port, through a raw socket.

A socket bound to the original destination is the fast way to answer a client. It can't be had where a service
on this box holds the same port on the wildcard address without SO_REUSEADDR (a DNS server on 0.0.0.0:53): then
the answer is given its UDP header (RFC 768) here, and the kernel adds the rest.
"""

from __future__ import annotations

import socket
import struct

from tproxyd.flow import Endpoint
from tproxyd.relay import sockets
from tproxyd.relay.icmp import checksum


def datagram(source: Endpoint, target: Endpoint, payload: bytes | memoryview) -> bytes:
    """Build a UDP header with its checksum and the payload; pure."""
    length = 8 + len(payload)
    family = socket.AF_INET6 if source.version == 6 else socket.AF_INET
    addresses = socket.inet_pton(family, source.address) + socket.inet_pton(family, target.address)
    pseudo = addresses + struct.pack("!IHBB" if source.version == 6 else "!xBH", *_pseudo_tail(source.version, length))
    head = struct.pack("!HHH", source.port, target.port, length)
    body = bytes(payload)
    found = checksum(pseudo + head + b"\0\0" + body) or 0xFFFF  # 0 would mean "no checksum"
    return head + struct.pack("!H", found) + body


def _pseudo_tail(version: int, length: int) -> tuple[int, ...]:
    return (length, 0, 0, socket.IPPROTO_UDP) if version == 6 else (socket.IPPROTO_UDP, length)


class RawUdpSender:
    """Sends such datagrams; one raw socket a family, opened when first needed."""

    def __init__(self, mark: int) -> None:
        """Args: mark: SO_MARK of the client side."""
        self._mark = mark
        self._sockets: dict[int, sockets.Socket] = {}

    def send(self, source: Endpoint, target: Endpoint, payload: memoryview) -> None:
        """Send one datagram.

        Raises:
            OSError: as sendmsg(2).
        """
        version = source.version
        if version not in self._sockets:
            self._sockets[version] = sockets.raw_sender(version, socket.IPPROTO_UDP, self._mark)
        message = datagram(source, target, payload)
        self._sockets[version].sendmsg([message], sockets.sender_address(source.address), 0, (target.address, 0))

    def close(self) -> None:
        """Close the raw sockets."""
        for raw in self._sockets.values():
            raw.close()
        self._sockets.clear()
