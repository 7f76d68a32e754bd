"""Version 1: one line of text (proxy-protocol.txt §2.1)."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Network
from tproxyd.protocols.address import MOST_PORT, Ip
from tproxyd.protocols.proxy_protocol.header import Header, ends_read, ends_to_write

BEGINNING: Final = b"PROXY "
MOST_BYTES: Final = 107
_END: Final = b"\r\n"
_LINE: Final = re.compile(
    rb"PROXY (?:(?P<family>TCP[46]) (?P<source>[0-9A-Fa-f:.]+) (?P<destination>[0-9A-Fa-f:.]+)"
    rb" (?P<source_port>0|[1-9][0-9]{0,4}) (?P<destination_port>0|[1-9][0-9]{0,4})|UNKNOWN(?: [^\r\n]*)?)\r\n"
)
_ADDRESS: Final[dict[bytes, type[Ip]]] = {b"TCP4": IPv4Address, b"TCP6": IPv6Address}


def parse(data: bytes) -> tuple[Header, int] | None:
    """Read a header that begins as version 1 does; return it and its length, None if its end has not come yet.

    Raises:
        RemoteProtocolError: no CRLF within 107 bytes, or not the line that the specification has.
    """
    end = data.find(_END, 0, MOST_BYTES)
    if end < 0:
        if len(data) >= MOST_BYTES:
            raise RemoteProtocolError(f"a PROXY line that doesn't end within {MOST_BYTES} bytes")
        return None
    length = end + len(_END)
    found = _LINE.fullmatch(data, 0, length)
    if found is None:
        raise RemoteProtocolError(f"a malformed PROXY line: {data[:length]!r}")
    return (_header(found) if found["family"] else Header(1)), length


def _header(found: re.Match[bytes]) -> Header:
    address = _ADDRESS[found["family"]]
    ports = int(found["source_port"]), int(found["destination_port"])
    try:
        ips = address(found["source"].decode()), address(found["destination"].decode())
    except ValueError:
        raise RemoteProtocolError(f"a PROXY line without two addresses of its family: {found[0]!r}") from None
    if max(ports) > MOST_PORT:
        raise RemoteProtocolError(f"a PROXY line with a port beyond {MOST_PORT}: {found[0]!r}")
    return Header.of(1, Network.TCP, *ends_read(*ips, *ports))


def render(header: Header) -> bytes:
    """Write the line.

    Raises:
        LocalProtocolError: what only version 2 can say (UDP, LOCAL, values, checksum), or bad addresses.
    """
    if header.tlvs or header.checksum or header.local or header.network is Network.UDP:
        raise LocalProtocolError("PROXY version 1 knows no UDP, no LOCAL, no values and no checksum: use version 2")
    if header.source is None or header.destination is None:
        return b"PROXY UNKNOWN\r\n"
    source, destination = ends_to_write(header.source, header.destination)
    ports = f"{header.source.port} {header.destination.port}"
    return f"PROXY TCP{source.version} {source} {destination} {ports}\r\n".encode("ascii")
