"""Version 2: binary, with typed values behind the addresses (proxy-protocol.txt §2.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Final

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Network
from tproxyd.protocols.address import Ip
from tproxyd.protocols.proxy_protocol.crc32c import crc32c
from tproxyd.protocols.proxy_protocol.header import Header, Tlv, TlvType, ends_read, ends_to_write

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
# The whole header, as in nginx: room for a client's certificate; addresses and names alone stay below one MSS.
MOST_BYTES: Final = 4096
_HEAD: Final = struct.Struct("!12sBBH")
_PORTS: Final = struct.Struct("!HH")
_TLV: Final = struct.Struct("!BH")
_VERSION: Final = 2
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
_UNSPECIFIED: Final = 0x00
_CRC_BYTES: Final = 4
_UNIX_BYTES: Final = 216


@dataclass(frozen=True, slots=True)
class _Kind:
    """An address family with its transport: the 14th byte."""

    address: type[Ip]
    address_bytes: int
    network: Network

    @property
    def block_bytes(self) -> int:
        return 2 * self.address_bytes + _PORTS.size


_KINDS: Final[Mapping[int, _Kind]] = MappingProxyType(
    {
        0x11: _Kind(IPv4Address, 4, Network.TCP),
        0x12: _Kind(IPv4Address, 4, Network.UDP),
        0x21: _Kind(IPv6Address, 16, Network.TCP),
        0x22: _Kind(IPv6Address, 16, Network.UDP),
    }
)
_BYTE: Final = MappingProxyType({(kind.address, kind.network): byte for byte, kind in _KINDS.items()})
# Valid, but nothing that a relay of TCP and UDP could use: the connection's own addresses count (§2.2).
_WITHOUT_ENDS: Final = MappingProxyType({_UNSPECIFIED: 0, 0x31: _UNIX_BYTES, 0x32: _UNIX_BYTES})


def parse(data: bytes, most_bytes: int = MOST_BYTES) -> tuple[Header, int] | None:
    """Read a header that begins with the signature; return it and its length, None if more must come.

    Args:
        data: what has come so far.
        most_bytes: the longest header to take.

    Raises:
        RemoteProtocolError: another version, an unknown command or family, too short, too long, malformed values, or a
            wrong checksum.
    """
    if len(data) < _HEAD.size:
        return None
    _, version_command, family, block_bytes = _HEAD.unpack_from(data)
    length = _HEAD.size + block_bytes
    if version_command not in (_LOCAL, _PROXY):
        raise RemoteProtocolError(f"a PROXY header of version and command {version_command:#04x}")
    if length > most_bytes:
        raise RemoteProtocolError(f"a PROXY header of {length} bytes; at most {most_bytes} are taken")
    if len(data) < length:
        return None
    if version_command == _LOCAL:
        return Header(_VERSION, local=True), length  # §2.2: whatever else stands there is discarded
    return _proxied(data[:length], family), length


def _proxied(header: bytes, family: int) -> Header:
    kind = _KINDS.get(family)
    if kind is None and family not in _WITHOUT_ENDS:
        raise RemoteProtocolError(f"a PROXY header of unknown family and transport {family:#04x}")
    values_at = _HEAD.size + (kind.block_bytes if kind else _WITHOUT_ENDS[family])
    if len(header) < values_at:
        raise RemoteProtocolError(f"a PROXY header of {len(header)} bytes has no room for its addresses")
    tlvs, checksum = _checked(header, _tlvs(header, values_at))
    if kind is None:
        return Header(_VERSION, tlvs=tlvs, checksum=checksum)
    middle = _HEAD.size + kind.address_bytes
    end = middle + kind.address_bytes
    ips = kind.address(header[_HEAD.size : middle]), kind.address(header[middle:end])
    ends = ends_read(*ips, *_PORTS.unpack_from(header, end))
    return Header.of(_VERSION, kind.network, *ends, tlvs=tlvs, checksum=checksum)


def _tlvs(header: bytes, at: int) -> list[tuple[Tlv, int]]:
    """Return the values with the offset at which each begins."""
    found = []
    while at < len(header):
        start = at + _TLV.size
        if start > len(header):
            raise RemoteProtocolError("a PROXY header ends within a value")
        kind, length = _TLV.unpack_from(header, at)
        at = start + length
        if at > len(header):
            raise RemoteProtocolError(f"a PROXY header ends within a value of type {kind:#04x}")
        found.append((Tlv(kind, header[start:at]), start))
    return found


def _checked(header: bytes, tlvs: list[tuple[Tlv, int]]) -> tuple[tuple[Tlv, ...], bool]:
    """§2.2.3: verify the checksum, if there is one; return the other values, and whether it was there."""
    checksums = [(tlv.value, start) for tlv, start in tlvs if tlv.kind == TlvType.CRC32C]
    others = tuple(tlv for tlv, _ in tlvs if tlv.kind != TlvType.CRC32C)
    if not checksums:
        return others, False
    value, start = checksums[0]
    if len(checksums) > 1 or len(value) != _CRC_BYTES:
        raise RemoteProtocolError("a PROXY header with a malformed checksum")
    zeroed = header[:start] + bytes(_CRC_BYTES) + header[start + _CRC_BYTES :]
    if crc32c(zeroed) != int.from_bytes(value, "big"):
        raise RemoteProtocolError("a PROXY header whose checksum is wrong")
    return others, True


def render(header: Header, most_bytes: int = MOST_BYTES) -> bytes:
    """Write the header.

    Raises:
        LocalProtocolError: bad addresses, a LOCAL header that says more, a value that can't be written, or a header
            beyond `most_bytes`.
    """
    if header.local:
        if header != Header(_VERSION, local=True):
            raise LocalProtocolError("a LOCAL header of the PROXY protocol says nothing else")
        return _HEAD.pack(SIGNATURE, _LOCAL, _UNSPECIFIED, 0)
    family, block = _block(header)
    block += b"".join(_rendered(header.tlvs))
    if header.checksum:
        block += _TLV.pack(TlvType.CRC32C, _CRC_BYTES) + bytes(_CRC_BYTES)
    if _HEAD.size + len(block) > most_bytes:
        raise LocalProtocolError(f"a PROXY header of {_HEAD.size + len(block)} bytes; receivers take {most_bytes}")
    rendered = _HEAD.pack(SIGNATURE, _PROXY, family, len(block)) + block
    if header.checksum:
        rendered = rendered[:-_CRC_BYTES] + crc32c(rendered).to_bytes(_CRC_BYTES, "big")
    return rendered


def _block(header: Header) -> tuple[int, bytes]:
    """Return the 14th byte, addresses and ports."""
    if header.source is None or header.destination is None or header.network is None:
        return _UNSPECIFIED, b""
    source, destination = ends_to_write(header.source, header.destination)
    ports = _PORTS.pack(header.source.port, header.destination.port)
    return _BYTE[type(source), header.network], source.packed + destination.packed + ports


def _rendered(tlvs: Iterable[Tlv]) -> Iterable[bytes]:
    for tlv in tlvs:
        if tlv.kind == TlvType.CRC32C:
            raise LocalProtocolError("the checksum of a PROXY header is asked for by `checksum`")
        if not 0 <= tlv.kind <= 0xFF or len(tlv.value) > 0xFFFF:
            raise LocalProtocolError(f"a value of type {tlv.kind} and {len(tlv.value)} bytes fits no PROXY header")
        yield _TLV.pack(tlv.kind, len(tlv.value)) + tlv.value
