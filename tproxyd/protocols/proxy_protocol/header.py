"""What a PROXY header says, in either version (proxy-protocol.txt §2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from tproxyd.errors import LocalProtocolError
from tproxyd.flow import Client, Endpoint, Network, OrigDst
from tproxyd.protocols.address import Ip, check_port, to_ip, unmapped


class TlvType(IntEnum):
    """Types of values behind the addresses that we know by name (§2.2)."""

    ALPN = 0x01
    AUTHORITY = 0x02
    CRC32C = 0x03
    NOOP = 0x04
    UNIQUE_ID = 0x05
    SSL = 0x20
    NETNS = 0x30


class Tlv(NamedTuple):
    """A value behind the addresses, as it stands on the wire."""

    kind: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Who a connection, or a datagram, comes from, and where it went first.

    Attributes:
        version: 1 or 2.
        source: who began; None: unknown (UNKNOWN, LOCAL, UNSPEC, or a Unix socket): take the connection's own.
        destination: where it was meant to go; None exactly where `source` is.
        network: TCP, or in version 2 UDP; None exactly where `source` is.
        local: version 2: the sender speaks for itself (a health check), so there is nothing else in the header.
        tlvs: version 2: in the order of the wire, unknown ones too; the checksum is not among them.
        checksum: version 2: render with a CRC32c; or: came with one, and it was right.
    """

    version: int
    source: Client | None = None
    destination: OrigDst | None = None
    network: Network | None = None
    local: bool = False
    tlvs: tuple[Tlv, ...] = ()
    checksum: bool = False

    @classmethod
    def of(
        cls,
        version: int,
        network: Network,
        source: Client,
        destination: OrigDst,
        *,
        tlvs: tuple[Tlv, ...] = (),
        checksum: bool = False,
    ) -> Header:
        """Return the header of a flow."""
        return cls(version, source, destination, network, tlvs=tlvs, checksum=checksum)


def ends_read(source: Ip, destination: Ip, source_port: int, destination_port: int) -> tuple[Client, OrigDst]:
    """Return both ends as they came from the wire, in canonical form."""
    source, destination = _of_one_family(source, destination)
    return Client(str(source), source_port), OrigDst(str(destination), destination_port)


def ends_to_write(source: Client, destination: OrigDst) -> tuple[Ip, Ip]:
    """Return the addresses of both ends, of one family; the ports were looked at, too.

    Raises:
        LocalProtocolError: not an address or a port, an address with a zone, or two families.
    """
    found = _of_one_family(_ip(source), _ip(destination))
    if found[0].version != found[1].version:
        raise LocalProtocolError(f"{source} and {destination} are of two families")
    return found


def _of_one_family(source: Ip, destination: Ip) -> tuple[Ip, Ip]:
    """Take two IPv4-mapped addresses (a dual-stack listener's) for IPv4; a single one has to stay IPv6."""
    plain = unmapped(source), unmapped(destination)
    return plain if plain[0].version == plain[1].version else (source, destination)


def _ip(endpoint: Endpoint) -> Ip:
    check_port(endpoint.port)
    return to_ip(endpoint.address)
