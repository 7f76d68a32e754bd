"""The header of SOCKS5 datagrams (RFC 1928 §7). It runs for every datagram, so it is quick.

Render a header once for each destination and put it before each payload: `sendmsg([header, payload])`. A receiver that
knows what to expect compares: `datagram.startswith(header)` is quicker than decoding.
"""

from __future__ import annotations

import struct
from typing import Final, TypeVar

from tproxyd.errors import RemoteProtocolError
from tproxyd.flow import Endpoint
from tproxyd.protocols.address import Address
from tproxyd.protocols.socks5.wire import IPV4, pack_address, unpack_address

Datagram = TypeVar("Datagram", bytes, memoryview)

_IPV4_HEADER: Final = struct.Struct("!HBB4BH")
_IPV4_BYTES: Final = _IPV4_HEADER.size
_FRAGMENT_AT: Final = 2
_TYPE_AT: Final = 3


class Fragmented(RemoteProtocolError):
    """A fragment of a datagram: who doesn't put them together must drop them (RFC 1928 §7)."""


def datagram_header(address: Address) -> bytes:
    """Return what stands before a payload to (or from) `address`.

    Raises:
        LocalProtocolError: an endpoint that holds no address, or a port out of range.
    """
    return b"\0\0\0" + pack_address(address)


def decode_datagram(datagram: Datagram) -> tuple[Address, Datagram]:
    """Return where a datagram goes to (or comes from) and its payload, perhaps empty.

    Of a memoryview nothing is copied.

    Raises:
        Fragmented: FRAG is not 0.
        RemoteProtocolError: cut short, an unknown address type, or a name that is none.
    """
    if len(datagram) >= _IPV4_BYTES and datagram[_TYPE_AT] == IPV4:
        _, fragment, _, one, two, three, four, port = _IPV4_HEADER.unpack_from(datagram)
        if fragment:
            raise Fragmented(f"fragment {fragment} of a datagram")
        return Endpoint(f"{one}.{two}.{three}.{four}", port), datagram[_IPV4_BYTES:]
    return _decode_any(datagram)


def _decode_any(datagram: Datagram) -> tuple[Address, Datagram]:
    if len(datagram) > _FRAGMENT_AT and datagram[_FRAGMENT_AT]:
        raise Fragmented(f"fragment {datagram[_FRAGMENT_AT]} of a datagram")
    found = unpack_address(datagram, _TYPE_AT)
    if found is None:
        raise RemoteProtocolError(f"a SOCKS5 datagram of {len(datagram)} bytes is cut short")
    address, end = found
    return address, datagram[end:]
