"""The client's end of HTTP CONNECT (RFC 9110 §9.3.6, RFC 9112 §3.2.3) with Basic authentication (RFC 7617).

h11 reads and writes the messages. Where a head ends is found here, so that its size is bounded exactly, and nothing
behind it ever goes through h11. HTTP/2 and the other authentication schemes are not here.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import h11

from tproxyd.errors import LocalProtocolError
from tproxyd.flow import Cause, Endpoint
from tproxyd.protocols.address import Address, to_address
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.dialogue import Dialogue

# All heads up to the final one together: a proxy can't keep us with interim answers for ever.
MOST_HEAD_BYTES: Final = 16_384
PROXY_AUTHENTICATION_REQUIRED: Final = 407
_SUCCESSFUL: Final = range(200, 300)
_MOST_REASON: Final = 80
_BEGINNING: Final = b"HTTP/1."
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

# A status that is missing here tells of the proxy itself (its rules, its failure), not of the destination.
CAUSE_OF_STATUS: Final[Mapping[int, Cause]] = MappingProxyType(
    {502: Cause.UNREACHABLE, 503: Cause.UNREACHABLE, 504: Cause.TIMED_OUT}
)


@dataclass(frozen=True, slots=True)
class Connected:
    """2xx: what follows is the flow."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The proxy did not connect.

    Attributes:
        status: HTTP status code; `PROXY_AUTHENTICATION_REQUIRED`: credentials are wanted, or these are not taken.
        reason: the proxy's reason phrase, cut to 80 printable ASCII characters.
    """

    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.status} {self.reason}".rstrip()


ConnectEvent = Connected | Rejected


class Client(Dialogue[ConnectEvent]):
    """Asks an HTTP proxy for one connection; `over` after the event."""

    def __init__(self, address: Address, credentials: Credentials | None = None) -> None:
        """Have the request ready to be sent.

        Raises:
            LocalProtocolError: address or credentials can't be put into the request.
        """
        super().__init__("the HTTP proxy")
        authority = _authority(address)
        headers = [("Host", authority)]
        self._secret = ""
        if credentials:
            self._secret = _basic(credentials)
            headers.append(("Proxy-Authorization", f"Basic {self._secret}"))
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_HEAD_BYTES)
        self._to_send += self._http.send(h11.Request(method="CONNECT", target=authority, headers=headers)) or b""
        self._to_send += self._http.send(h11.EndOfMessage()) or b""
        self._heads_bytes = 0
        self._searched_bytes = 0

    def _step(self) -> ConnectEvent | None:
        if not self._received.startswith(_BEGINNING[: len(self._received)]):
            raise self._broken("answered in another protocol than HTTP/1")
        end = _HEAD_END.search(self._received, max(0, self._searched_bytes - 2))
        self._check_size(end.end() if end else len(self._received))
        self._searched_bytes = 0 if end else len(self._received)
        if end is None:
            return None
        self._heads_bytes += end.end()
        return self._on_head(self._take(end.end()))

    def _check_size(self, more_bytes: int) -> None:
        if self._heads_bytes + more_bytes > MOST_HEAD_BYTES:
            raise self._broken(f"answered with more than {MOST_HEAD_BYTES} bytes of headers")

    def _on_head(self, head: bytes) -> ConnectEvent | None:
        """RFC 9110 §15.2: interim responses are skipped. §9.3.6: 2xx has no body, whatever its fields say."""
        try:
            self._http.receive_data(head)
            event = self._http.next_event()
        except h11.RemoteProtocolError:
            # Its text quotes the peer, who may quote our credentials.
            raise self._broken("answered with a malformed HTTP/1 head") from None
        if not isinstance(event, h11.Response):
            return None
        if event.status_code in _SUCCESSFUL:
            self._over = True
            return Connected()
        self._end_in_vain()
        return Rejected(event.status_code, self._readable(event.reason))

    def _readable(self, reason: bytes) -> str:
        text = reason.decode("ascii", "replace").replace("\ufffd", "?")
        if self._secret:
            text = text.replace(self._secret, "***")
        return _CONTROL.sub("?", text)[:_MOST_REASON]


def _authority(address: Address) -> str:
    """RFC 9112 §3.2.3: host and port, IPv6 in brackets."""
    return str(to_address(address.address, address.port) if isinstance(address, Endpoint) else address)


def _basic(credentials: Credentials) -> str:
    """RFC 7617 §2, in UTF-8 (§2.1)."""
    if ":" in credentials.username:
        raise LocalProtocolError("a user name for HTTP Basic authentication has no colon")
    text = f"{credentials.username}:{credentials.password}"
    if _CONTROL.search(text):
        raise LocalProtocolError("a user name or password for HTTP Basic authentication has no control characters")
    try:
        return b64encode(text.encode("utf-8", "surrogateescape")).decode("ascii")
    except UnicodeEncodeError:  # its text would show the password
        raise LocalProtocolError("the user name or password for the HTTP proxy is not valid Unicode") from None
