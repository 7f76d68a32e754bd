"""Numbers and addresses of SOCKS5 as they stand on the wire (RFC 1928 §3 to §6)."""

from __future__ import annotations

from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Endpoint
from tproxyd.protocols.address import Address, check_port, to_address, to_ip, unmapped

VERSION: Final = 5
AUTH_VERSION: Final = 1
IPV4: Final = 1
DOMAIN: Final = 3
IPV6: Final = 4
ADDRESS_TYPES: Final = frozenset({IPV4, DOMAIN, IPV6})
UNSPECIFIED: Final = Endpoint("0.0.0.0", 0)
_PORT_BYTES: Final = 2
_LENGTH: Final = {IPV4: 4, IPV6: 16}


class Method(IntEnum):
    """How the client authenticates (RFC 1928 §3)."""

    NONE = 0x00
    USER_PASSWORD = 0x02
    NO_ACCEPTABLE = 0xFF


class Command(IntEnum):
    """What the client asks for (RFC 1928 §4)."""

    CONNECT = 1
    BIND = 2
    UDP_ASSOCIATE = 3


class Reply(IntEnum):
    """What the server says to a request (RFC 1928 §6)."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


def pack_address(address: Address) -> bytes:
    """Return ATYP, address and port (RFC 1928 §5).

    Raises:
        LocalProtocolError: an endpoint that holds no address, or a port out of range.
    """
    if isinstance(address, Endpoint):
        packed = unmapped(to_ip(address.address)).packed
        check_port(address.port)
        head = bytes([IPV4 if len(packed) == 4 else IPV6]) + packed
    else:
        head = bytes([DOMAIN, len(address.name)]) + address.name.encode("ascii")
    return head + address.port.to_bytes(_PORT_BYTES, "big")


def unpack_address(data: bytes | bytearray | memoryview, at: int) -> tuple[Address, int] | None:
    """Read ATYP, address and port (RFC 1928 §5) that begin at `at`; return them and where they end, None if cut short.

    Raises:
        RemoteProtocolError: unknown address type, or a name that is none (empty, odd bytes).
    """
    if len(data) <= at + 1:
        return None
    kind = data[at]
    if kind not in ADDRESS_TYPES:
        raise RemoteProtocolError(f"unknown address type {kind}")
    start = at + 2 if kind == DOMAIN else at + 1
    end = start + (data[at + 1] if kind == DOMAIN else _LENGTH[kind])
    if len(data) < end + _PORT_BYTES:
        return None
    port = int.from_bytes(data[end : end + _PORT_BYTES], "big")
    host = bytes(data[start:end])
    return _address(kind, host, port), end + _PORT_BYTES


def _address(kind: int, host: bytes, port: int) -> Address:
    if kind != DOMAIN:
        return Endpoint(str(IPv4Address(host) if kind == IPV4 else unmapped(IPv6Address(host))), port)
    try:
        return to_address(host.decode("latin-1"), port)
    except LocalProtocolError as error:
        raise RemoteProtocolError(str(error)) from None
