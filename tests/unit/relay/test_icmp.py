"""ICMP errors as bytes; scapy reads them back."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.all import ICMP, IP, UDP, IPv6, raw
from scapy.layers.inet6 import ICMPv6DestUnreach

from tproxyd.flow import Endpoint, Network
from tproxyd.relay import icmp
from tproxyd.relay.raw_udp import datagram

CLIENT = {4: Endpoint("10.1.0.2", 40000), 6: Endpoint("fd01::2", 40000)}
SERVER = {4: Endpoint("10.2.0.2", 53), 6: Endpoint("fd02::2", 53)}


@given(st.binary(max_size=200))
def test_checksum_is_the_ones_complement_sum(data: bytes) -> None:
    padded = data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert icmp.checksum(data) in {~total & 0xFFFF, 0xFFFF - total % 0xFFFF}
    if total:
        assert icmp.checksum(data) % 0xFFFF == (~total & 0xFFFF) % 0xFFFF


def test_port_unreachable_quotes_the_datagram() -> None:
    message = icmp.unreachable(icmp.PORT_UNREACHABLE[4], Network.UDP, CLIENT[4], SERVER[4], 12)
    assert (ICMP(message).type, ICMP(message).code) == (3, 3)
    assert icmp.checksum(message) % 0xFFFF == 0
    quoted = IP(message[8:])
    assert (quoted.src, quoted.dst, quoted.len) == ("10.1.0.2", "10.2.0.2", 40)
    assert icmp.checksum(message[8:28]) % 0xFFFF == 0
    assert (quoted[UDP].sport, quoted[UDP].dport, quoted[UDP].len) == (40000, 53, 20)


def test_port_unreachable_over_ipv6_quotes_the_datagram() -> None:
    message = icmp.unreachable(icmp.PORT_UNREACHABLE[6], Network.UDP, CLIENT[6], SERVER[6], 12)
    assert (ICMPv6DestUnreach(message).type, ICMPv6DestUnreach(message).code) == (1, 4)
    quoted = IPv6(message[8:])
    assert (quoted.src, quoted.dst, quoted.plen) == ("fd01::2", "fd02::2", 20)
    assert (quoted[UDP].sport, quoted[UDP].dport) == (40000, 53)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("code", [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES])
def test_every_way_of_not_arriving_has_an_icmp_error(code: int, version: int) -> None:
    error = icmp.from_errno(code, version)
    assert error is not None
    assert error.kind == {4: 3, 6: 1}[version]


def test_errors_of_our_own_making_have_none() -> None:
    assert icmp.from_errno(errno.EMFILE, 4) is None


def extended_error(origin: int, kind: int, code: int, info: int = 0) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_IP, 11, struct.pack("=IBBBxII", errno.ECONNREFUSED, origin, kind, code, info, 0))]


def test_the_error_queue_gives_type_code_and_mtu() -> None:
    assert icmp.from_error_queue(extended_error(2, 3, 4, 1400), 4) == icmp.IcmpError(3, 4, 1400)


def test_other_icmp_types_are_not_passed_on() -> None:
    assert icmp.from_error_queue(extended_error(2, 5, 0), 4) is None
    assert icmp.from_error_queue([], 4) is None


@given(st.binary(max_size=2000), st.sampled_from([4, 6]))
def test_raw_datagrams_are_valid_udp(payload: bytes, version: int) -> None:
    segment = datagram(SERVER[version], CLIENT[version], payload)
    layer = {4: IP, 6: IPv6}[version]
    whole = layer(src=SERVER[version].address, dst=CLIENT[version].address) / UDP(segment)
    assert (whole[UDP].sport, whole[UDP].dport) == (53, 40000)
    given_checksum = whole[UDP].chksum
    del whole[UDP].chksum
    assert layer(raw(whole))[UDP].chksum == given_checksum
    assert segment[8:] == payload
