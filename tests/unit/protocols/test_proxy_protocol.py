"""PROXY headers of both versions, byte for byte."""

from __future__ import annotations

import pytest

from tests.lab.dialogue import hear
from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Client, Network, OrigDst
from tproxyd.protocols.proxy_protocol import Header, Receiver, Tlv, TlvType, parse, render
from tproxyd.protocols.proxy_protocol.crc32c import crc32c

V4 = Client("192.0.2.1", 56324), OrigDst("198.51.100.1", 443)
V6 = Client("2001:db8::1", 56324), OrigDst("2001:db8::2", 443)
MAPPED = Client("::ffff:192.0.2.1", 56324), OrigDst("::ffff:198.51.100.1", 443)
SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4_BLOCK = bytes.fromhex("c0000201c6336401dc0401bb")
V6_BLOCK = bytes.fromhex("20010db8000000000000000000000001 20010db8000000000000000000000002 dc0401bb")
ALPN = Tlv(TlvType.ALPN, b"h2")
OWN = Tlv(0xE4, b"")


def v2(command: int, family: int, block: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + bytes([command, family]) + (len(block) if length is None else length).to_bytes(2, "big") + block


HEADERS = pytest.mark.parametrize(
    ("header", "wire"),
    [
        (Header(1), b"PROXY UNKNOWN\r\n"),
        (Header.of(1, Network.TCP, *V4), b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n"),
        (Header.of(1, Network.TCP, *V6), b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n"),
        (Header(2, local=True), v2(0x20, 0x00, b"")),
        (Header(2), v2(0x21, 0x00, b"")),
        (Header(2, tlvs=(ALPN,)), v2(0x21, 0x00, b"\1\0\2h2")),
        (Header.of(2, Network.TCP, *V4), v2(0x21, 0x11, V4_BLOCK)),
        (Header.of(2, Network.UDP, *V4), v2(0x21, 0x12, V4_BLOCK)),
        (Header.of(2, Network.TCP, *V6), v2(0x21, 0x21, V6_BLOCK)),
        (Header.of(2, Network.UDP, *V6), v2(0x21, 0x22, V6_BLOCK)),
        (
            Header.of(2, Network.TCP, *V4, tlvs=(ALPN, OWN, Tlv(TlvType.AUTHORITY, b"a.example"))),
            v2(0x21, 0x11, V4_BLOCK + b"\1\0\2h2" + b"\xe4\0\0" + b"\2\0\x09a.example"),
        ),
    ],
)


@HEADERS
def test_headers_are_written_as_specified(header: Header, wire: bytes) -> None:
    assert render(header) == wire


@HEADERS
def test_headers_are_read_as_specified_and_what_follows_is_kept(header: Header, wire: bytes) -> None:
    assert parse(wire + b"GET /") == (header, len(wire))
    receiver = Receiver()
    assert hear(receiver, wire + b"GET /") == [header]
    assert receiver.trailing == b"GET /"


@HEADERS
def test_of_every_beginning_more_is_wanted(header: Header, wire: bytes) -> None:
    assert [parse(wire[:length]) for length in range(len(wire))] == [None] * len(wire)


@pytest.mark.parametrize("version", [1, 2])
def test_two_mapped_addresses_are_ipv4(version: int) -> None:
    assert render(Header.of(version, Network.TCP, *MAPPED)) == render(Header.of(version, Network.TCP, *V4))
    line = b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:c633:6401 56324 443\r\n"
    assert parse(line) == (Header.of(1, Network.TCP, *V4), len(line))


def test_a_single_mapped_address_stays_ipv6() -> None:
    wire = render(Header.of(2, Network.TCP, MAPPED[0], V6[1]))
    found = parse(wire)
    assert found is not None
    assert found[0].destination == V6[1]
    assert found[0].source is not None
    assert found[0].source.version == 6


def test_the_longest_line_of_version_1_is_taken_and_a_longer_one_is_not() -> None:
    longest = b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n"
    assert len(longest) == 107
    assert parse(longest) == (Header(1), 107)
    assert parse(longest[:-2]) is None
    for too_long in (b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n", b"PROXY UNKNOWN " + b"f" * 92 + b"\r"):
        with pytest.raises(RemoteProtocolError, match="within 107 bytes"):
            parse(too_long)


@pytest.mark.parametrize(
    "line",
    [
        "TCP4 192.0.2.1 198.51.100.1 56324",
        "TCP4 192.0.2.1 198.51.100.1 56324 443 1",
        "TCP4  192.0.2.1 198.51.100.1 56324 443",
        "TCP4 192.0.2.1 198.51.100.1 56324 443 ",
        "TCP4 192.0.2.1 198.51.100.1 056324 443",
        "TCP4 192.0.2.1 198.51.100.1 56324 65536",
        "TCP4 192.0.2.1 198.51.100.1 56324 -1",
        "TCP4 192.0.2.01 198.51.100.1 56324 443",
        "TCP4 192.0.2 198.51.100.1 56324 443",
        "TCP4 2001:db8::1 2001:db8::2 56324 443",
        "TCP6 192.0.2.1 198.51.100.1 56324 443",
        "TCP6 fe80::1%lo fe80::2 56324 443",
        "TCP5 192.0.2.1 198.51.100.1 56324 443",
        "UDP4 192.0.2.1 198.51.100.1 56324 443",
        "UNKNOWNS",
        "UNKNOWN\n",
        "tcp4 192.0.2.1 198.51.100.1 56324 443",
        "",
    ],
)
def test_a_malformed_line_of_version_1_is_an_error(line: str) -> None:
    with pytest.raises(RemoteProtocolError, match="PROXY line"):
        parse(f"PROXY {line}\r\n".encode())


@pytest.mark.parametrize("data", [b"GET / HTTP", b"PROXY\t", b"proxy ", b"P\r", SIGNATURE[:-1] + b"\r", b"\0"])
def test_what_begins_otherwise_is_no_header(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="no PROXY header"):
        parse(data)


@pytest.mark.parametrize(
    ("wire", "what"),
    [
        (v2(0x11, 0x11, V4_BLOCK), "version and command 0x11"),
        (v2(0x22, 0x11, V4_BLOCK), "version and command 0x22"),
        (v2(0x21, 0x13, V4_BLOCK), "transport 0x13"),
        (v2(0x21, 0x41, V4_BLOCK), "transport 0x41"),
        (v2(0x21, 0x10, V4_BLOCK), "transport 0x10"),
        (v2(0x21, 0x11, V4_BLOCK[:-1]), "no room"),
        (v2(0x21, 0x21, V4_BLOCK), "no room"),
        (v2(0x21, 0x31, bytes(215)), "no room"),
        (v2(0x21, 0x11, b"", 4081), "4097 bytes"),
        (v2(0x21, 0x11, V4_BLOCK + b"\1\0"), "ends within a value"),
        (v2(0x21, 0x11, V4_BLOCK + b"\1\0\3h2"), "value of type 0x01"),
        (v2(0x21, 0x11, V4_BLOCK + b"\3\0\4\0\0\0\0"), "checksum is wrong"),
        (v2(0x21, 0x11, V4_BLOCK + b"\3\0\3\0\0\0"), "malformed checksum"),
        (v2(0x21, 0x11, V4_BLOCK + b"\3\0\4\0\0\0\0" * 2), "malformed checksum"),
    ],
)
def test_a_malformed_header_of_version_2_is_an_error(wire: bytes, what: str) -> None:
    receiver = Receiver()
    with pytest.raises(RemoteProtocolError, match=what):
        hear(receiver, wire)
    assert receiver.over


def test_the_longest_header_of_version_2_is_taken() -> None:
    header = Header.of(2, Network.TCP, *V4, tlvs=(Tlv(TlvType.SSL, bytes(4096 - 16 - 12 - 3)),))
    wire = render(header)
    assert parse(wire) == (header, 4096)
    with pytest.raises(LocalProtocolError, match="4097 bytes"):
        render(Header.of(2, Network.TCP, *V4, tlvs=(Tlv(TlvType.SSL, bytes(4096 - 16 - 12 - 2)),)))


def test_whatever_a_local_header_holds_is_discarded() -> None:
    wire = v2(0x20, 0x77, b"anything")
    assert parse(wire) == (Header(2, local=True), len(wire))


@pytest.mark.parametrize("family", [0x31, 0x32])
def test_unix_sockets_leave_the_connections_own_addresses(family: int) -> None:
    wire = v2(0x21, family, bytes(216) + b"\1\0\2h2")
    assert parse(wire) == (Header(2, tlvs=(ALPN,)), len(wire))


@pytest.mark.parametrize(("data", "checksum"), [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"", 0)])
def test_crc32c_of_known_data(data: bytes, checksum: int) -> None:
    """The check value of CRC-32C, and RFC 3720 §B.4."""
    assert crc32c(data) == checksum


@pytest.mark.parametrize("tlvs", [(), (ALPN, OWN)])
def test_a_checksum_is_rendered_and_verified(tlvs: tuple[Tlv, ...]) -> None:
    header = Header.of(2, Network.UDP, *V6, tlvs=tlvs, checksum=True)
    wire = render(header)
    assert parse(wire) == (header, len(wire))
    type_at = len(wire) - 7  # changed, it is no checksum any more
    for at in {*range(16, len(wire))} - {type_at}:
        broken = wire[:at] + bytes([wire[at] ^ 1]) + wire[at + 1 :]
        with pytest.raises(RemoteProtocolError):
            parse(broken)


def test_a_checksum_may_stand_before_other_values() -> None:
    zeroed = v2(0x21, 0x11, V4_BLOCK + b"\3\0\4\0\0\0\0" + b"\1\0\2h2")
    wire = zeroed.replace(b"\3\0\4\0\0\0\0", b"\3\0\4" + crc32c(zeroed).to_bytes(4, "big"))
    assert parse(wire) == (Header.of(2, Network.TCP, *V4, tlvs=(ALPN,), checksum=True), len(wire))


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (Header(3), "versions 1 and 2"),
        (Header.of(1, Network.UDP, *V4), "use version 2"),
        (Header(1, local=True), "use version 2"),
        (Header(1, checksum=True), "use version 2"),
        (Header.of(1, Network.TCP, *V4, tlvs=(ALPN,)), "use version 2"),
        (Header(2, local=True, tlvs=(ALPN,)), "nothing else"),
        (Header(2, source=V4[0]), "or none of them"),
        (Header(1, network=Network.TCP), "or none of them"),
        (Header.of(2, Network.TCP, V4[0], V6[1]), "two families"),
        (Header.of(1, Network.TCP, Client("a.example", 1), V4[1]), "not an IP address"),
        (Header.of(1, Network.TCP, V6[0], OrigDst("fe80::1%lo", 1)), "zone"),
        (Header.of(2, Network.TCP, V4[0], OrigDst("192.0.2.1", 65536)), "not a port"),
        (Header(2, tlvs=(Tlv(TlvType.CRC32C, bytes(4)),)), "asked for"),
        (Header(2, tlvs=(Tlv(256, b""),)), "fits no"),
        (Header(2, tlvs=(Tlv(1, bytes(65536)),)), "fits no"),
    ],
)
def test_what_a_header_can_not_say_is_refused(header: Header, what: str) -> None:
    with pytest.raises(LocalProtocolError, match=what):
        render(header)


@pytest.mark.parametrize("sent", [b"", b"PRO", SIGNATURE])
def test_a_sender_that_leaves_in_the_middle_is_an_error(sent: bytes) -> None:
    receiver = Receiver()
    if sent:
        assert hear(receiver, sent) == []
    with pytest.raises(RemoteProtocolError, match="closed the connection"):
        receiver.receive_data(b"")
