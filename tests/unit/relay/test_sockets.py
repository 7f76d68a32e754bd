"""Ancillary messages, read and written."""

from __future__ import annotations

import socket
import struct

from tproxyd.flow import OrigDst
from tproxyd.relay import sockets


def test_original_destination_of_an_ipv4_datagram() -> None:
    data = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 53, socket.inet_aton("198.51.100.7"))
    assert sockets.orig_dst_of_datagram([(0, 20, data)]) == OrigDst("198.51.100.7", 53)


def test_original_destination_of_an_ipv6_datagram() -> None:
    address = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    data = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", 53, 0, address, 0)
    assert sockets.orig_dst_of_datagram([(41, 74, data)]) == OrigDst("2001:db8::7", 53)


def test_a_datagram_without_it_has_none() -> None:
    assert sockets.orig_dst_of_datagram([]) is None
    assert sockets.orig_dst_of_datagram([(socket.SOL_IP, socket.IP_TTL, b"\x40\0\0\0")]) is None


def test_the_boxes_own_addresses_are_local_and_others_not() -> None:
    assert sockets.is_local("127.0.0.1")
    assert not sockets.is_local("198.51.100.7")
    assert not sockets.is_local("2001:db8::7")
