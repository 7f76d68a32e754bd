"""Where a proxy is asked to connect to: an IP endpoint, or a name that the proxy resolves.

Names are ASCII host names; IDNA is the caller's. What looks like an address is an address, in whatever form it came:
a rule about 127.0.0.0/8 must not be passed by with the *name* "127.0.0.1", nor with ::ffff:127.0.0.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from tproxyd.errors import LocalProtocolError
from tproxyd.flow import Endpoint

MOST_NAME_BYTES: Final = 255
MOST_PORT: Final = 65535
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+\Z")
# No top-level domain is a number (RFC 1123 §2.1), but inet_aton(3) takes "127.1", "0x7f.1" and "2130706433".
_ENDS_IN_A_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?\Z")


@dataclass(frozen=True, slots=True)
class HostName:
    """A host name and a port; never an address in disguise.

    Raises:
        LocalProtocolError: not 1 to 255 ASCII letters, digits, dots, hyphens and underscores, or the last label is a
            number, or the port is out of range.
    """

    name: str
    port: int

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > MOST_NAME_BYTES:
            raise LocalProtocolError(f"a host name has 1 to {MOST_NAME_BYTES} characters, not {len(self.name)}")
        if not _NAME.match(self.name):
            raise LocalProtocolError(f"{self.name[:80]!a} is not a host name (IDNA names in their ASCII form)")
        if _ENDS_IN_A_NUMBER.match(self.name):
            raise LocalProtocolError(f"{self.name[:80]!a} is neither a host name nor an IP address")
        check_port(self.port)

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


Address = Endpoint | HostName
Ip = IPv4Address | IPv6Address


def to_address(host: str, port: int) -> Address:
    """Return an `Endpoint` if `host` is an IPv4 or IPv6 address (without brackets), a `HostName` otherwise.

    Raises:
        LocalProtocolError: `host` is neither, or an address with a zone, or the port is out of range.
    """
    if ":" not in host and not _ENDS_IN_A_NUMBER.match(host):
        return HostName(host, port)  # the usual case; ip_address() needs long to refuse a name
    try:
        found = ip_address(host)
    except ValueError:
        return HostName(host, port)  # which tells why it is none
    check_port(port)
    return Endpoint(str(unmapped(_without_zone(found))), port)


def to_ip(text: str) -> Ip:
    """Read an address.

    Raises:
        LocalProtocolError: it is none, or one with a zone.
    """
    try:
        return _without_zone(ip_address(text))
    except ValueError:
        raise LocalProtocolError(f"{text[:80]!a} is not an IP address") from None


def unmapped(address: Ip) -> Ip:
    """Take an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2) for the IPv4 that it is."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def check_port(port: int) -> None:
    """Let a port from 0 to 65535 pass.

    Raises:
        LocalProtocolError: it is none.
    """
    if not 0 <= port <= MOST_PORT:
        raise LocalProtocolError(f"{port} is not a port")


def _without_zone(address: Ip) -> Ip:
    if isinstance(address, IPv6Address) and address.scope_id:
        raise LocalProtocolError(f"{address}: an address with a zone makes no sense to another host")
    return address
