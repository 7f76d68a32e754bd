"""Either version of the PROXY protocol: which one it is, whether more must come, and what follows."""

from __future__ import annotations

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.protocols.proxy_protocol import v1, v2
from tproxyd.protocols.proxy_protocol.header import Header


def parse(data: bytes) -> tuple[Header, int] | None:
    """Read the header at the front of `data`; return it and its length, None if more must come.

    For a datagram, which holds its header as a whole, None means that it is cut short.

    Raises:
        RemoteProtocolError: no header of either version, or one that is malformed or too long.
    """
    if data.startswith(v2.SIGNATURE):
        return v2.parse(data)
    if data.startswith(v1.BEGINNING):
        return v1.parse(data)
    if v2.SIGNATURE.startswith(data) or v1.BEGINNING.startswith(data):
        return None
    raise RemoteProtocolError(f"no PROXY header: it begins with {data[: len(v2.SIGNATURE)]!r}")


def render(header: Header) -> bytes:
    """Write a header of either version.

    Raises:
        LocalProtocolError: bad addresses, or what this version can't say.
    """
    if (header.source is None, header.network is None) != (header.destination is None,) * 2:
        raise LocalProtocolError("a PROXY header has source, destination and network, or none of them")
    if header.version == 1:
        return v1.render(header)
    if header.version == 2:
        return v2.render(header)
    raise LocalProtocolError(f"the PROXY protocol has versions 1 and 2, not {header.version}")


class Receiver(Dialogue[Header]):
    """Takes the header off the front of a connection; `over` after it."""

    def __init__(self) -> None:
        super().__init__("the sender of a PROXY header")

    def _step(self) -> Header | None:
        found = parse(bytes(self._received))
        if found is None:
            return None
        header, length = found
        self._take(length)
        self._over = True
        return header
