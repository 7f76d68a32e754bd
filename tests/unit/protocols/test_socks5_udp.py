"""Headers of SOCKS5 datagrams."""

from __future__ import annotations

import pytest

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Endpoint
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.socks5 import Fragmented, datagram_header, decode_datagram

KINDS = pytest.mark.parametrize(
    ("header", "address"),
    [
        ("00000001c00002010035", Endpoint("192.0.2.1", 53)),
        ("0000000420010db80000000000000000000000010035", Endpoint("2001:db8::1", 53)),
        ("0000000309612e6578616d706c650035", HostName("a.example", 53)),
    ],
)


@KINDS
@pytest.mark.parametrize("payload", [b"", b"x", b"x" * 1400])
def test_datagrams_to_every_kind_of_address(header: str, address: Address, payload: bytes) -> None:
    assert datagram_header(address).hex() == header
    assert decode_datagram(bytes.fromhex(header) + payload) == (address, payload)


@KINDS
def test_of_a_memoryview_nothing_is_copied(header: str, address: Address) -> None:
    buffer = bytearray(bytes.fromhex(header) + b"old")
    found, payload = decode_datagram(memoryview(buffer))
    buffer[-3:] = b"new"
    assert (found, bytes(payload)) == (address, b"new")


@KINDS
def test_every_cut_within_the_header_is_an_error(header: str, address: Address) -> None:
    whole = bytes.fromhex(header)
    for length in range(len(whole)):
        with pytest.raises(RemoteProtocolError, match="cut short"):
            decode_datagram(whole[:length])


@KINDS
@pytest.mark.parametrize("fragment", [1, 0x81])
def test_fragments_are_an_error_of_their_own(header: str, address: Address, fragment: int) -> None:
    whole = bytearray.fromhex(header)
    whole[2] = fragment
    with pytest.raises(Fragmented, match=str(fragment)):
        decode_datagram(bytes(whole) + b"payload")


@KINDS
def test_reserved_bytes_are_not_looked_at(header: str, address: Address) -> None:
    assert decode_datagram(b"\xff\xff" + bytes.fromhex(header)[2:]) == (address, b"")


@pytest.mark.parametrize(
    ("datagram", "what"),
    [("00000002c00002010035", "address type 2"), ("00000003000035", "1 to 255"), ("0000000301200035", "host name")],
)
def test_what_is_no_address_is_an_error(datagram: str, what: str) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        decode_datagram(bytes.fromhex(datagram))


def test_an_endpoint_without_address_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        datagram_header(Endpoint("a.example", 53))
