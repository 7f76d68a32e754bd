"""The client's end of SOCKS5: one request to one proxy (RFC 1928 §3 to §6, RFC 1929).

Every message waits for the answer to the one before: the RFC gives the server the choice of method first, so nothing
may be sent ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.protocols.address import Address
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.protocols.socks5.wire import AUTH_VERSION, VERSION, Command, Method, Reply, pack_address, unpack_address

_MOST_CREDENTIAL_BYTES: Final = 255
# RFC 1929 says 1; a good many servers answer with the version of SOCKS (as curl and tinyproxy know, too).
_AUTH_VERSIONS: Final = (AUTH_VERSION, VERSION)


@dataclass(frozen=True, slots=True)
class Connected:
    """The flow is up: `address` is what the proxy speaks from, or after BIND the peer that came."""

    address: Address


@dataclass(frozen=True, slots=True)
class Bound:
    """BIND's first reply: the proxy listens at `address`; `Connected` follows."""

    address: Address


@dataclass(frozen=True, slots=True)
class Associated:
    """The proxy takes datagrams at `address`; 0.0.0.0 or :: stands for the proxy's own address (the caller's part)."""

    address: Address


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request failed.

    Attributes:
        code: REP (RFC 1928 §6), perhaps one that `Reply` doesn't know; `CAUSE_OF_REPLY` tells what it means.
    """

    code: int

    def __str__(self) -> str:
        known = self.code in frozenset(Reply)
        return Reply(self.code).name.lower().replace("_", " ") if known else f"reply code {self.code}"


@dataclass(frozen=True, slots=True)
class Unauthenticated:
    """The proxy takes none of the methods that were offered, or not this user name and password.

    Attributes:
        offered: whether credentials were sent (False: it wants a method that was not on offer).
    """

    offered: bool

    def __str__(self) -> str:
        return "user name or password refused" if self.offered else "no authentication method in common"


ClientEvent = Connected | Bound | Associated | Rejected | Unauthenticated


class _State(Enum):
    METHOD = auto()
    AUTHENTICATION = auto()
    REPLY = auto()
    SECOND_REPLY = auto()


class Client(Dialogue[ClientEvent]):
    """Asks a proxy for one thing; `over` after `Connected`, `Associated`, `Rejected` or `Unauthenticated`."""

    def __init__(self, command: Command, address: Address, credentials: Credentials | None = None) -> None:
        """Have the greeting ready to be sent.

        Args:
            command: what to ask for.
            address: where to connect to, whom BIND waits for, or where UDP datagrams will come from (`UNSPECIFIED` if
                not known yet).
            credentials: offered beside no authentication at all; the proxy chooses.

        Raises:
            LocalProtocolError: address, user name or password can't be put into SOCKS5.
        """
        super().__init__("the SOCKS5 proxy")
        self._command = command
        self._request = bytes([VERSION, command, 0]) + pack_address(address)
        self._authentication = _authentication(credentials) if credentials else None
        offered = [Method.NONE, Method.USER_PASSWORD] if credentials else [Method.NONE]
        self._to_send += bytes([VERSION, len(offered), *offered])
        self._state = _State.METHOD

    def _step(self) -> ClientEvent | None:
        if len(self._received) < 2:
            return None
        match self._state:
            case _State.METHOD:
                return self._on_method()
            case _State.AUTHENTICATION:
                return self._on_authentication()
            case _State.REPLY | _State.SECOND_REPLY:
                return self._on_reply()

    def _on_method(self) -> Unauthenticated | None:
        """RFC 1928 §3: the server's choice."""
        version, method = self._take(2)
        self._check_version(version, (VERSION,))
        if method == Method.NO_ACCEPTABLE:
            self._end_in_vain()
            return Unauthenticated(offered=False)
        if method == Method.NONE:
            self._to_send += self._request
            self._state = _State.REPLY
        elif method == Method.USER_PASSWORD and self._authentication:
            self._to_send += self._authentication
            self._state = _State.AUTHENTICATION
        else:
            raise self._broken(f"chose authentication method {method}, which was not offered")
        return None

    def _on_authentication(self) -> Unauthenticated | None:
        """RFC 1929 §2: the server's verdict."""
        version, status = self._take(2)
        self._check_version(version, _AUTH_VERSIONS)
        if status:
            self._end_in_vain()
            return Unauthenticated(offered=True)
        self._to_send += self._request
        self._state = _State.REPLY
        return None

    def _on_reply(self) -> ClientEvent | None:
        """RFC 1928 §6. A failure is taken at its code: some servers leave out the address then."""
        version, code = self._received[:2]
        self._check_version(version, (VERSION,))
        if code != Reply.SUCCEEDED:
            self._end_in_vain()
            return Rejected(code)
        try:
            found = unpack_address(self._received, 3)
        except RemoteProtocolError as error:
            raise self._broken(f"sent a broken reply: {error}") from None
        if found is None:
            return None
        address, end = found
        self._take(end)
        return self._granted(address)

    def _granted(self, address: Address) -> ClientEvent:
        if self._command is Command.BIND and self._state is _State.REPLY:
            self._state = _State.SECOND_REPLY
            return Bound(address)
        self._over = True
        return Associated(address) if self._command is Command.UDP_ASSOCIATE else Connected(address)

    def _check_version(self, version: int, known: tuple[int, ...]) -> None:
        if version not in known:
            raise self._broken(f"answered with version {version}: no SOCKS5")


def _authentication(credentials: Credentials) -> bytes:
    """RFC 1929 §2. An empty password is let through, though the RFC wants one: proxies with tokens as names need it."""
    username = _field("the user name", credentials.username, 1)
    return bytes([AUTH_VERSION]) + username + _field("the password", credentials.password, 0)


def _field(what: str, text: str, least: int) -> bytes:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte; the error would show the text
        raise LocalProtocolError(f"{what} is not valid Unicode") from None
    if not least <= len(data) <= _MOST_CREDENTIAL_BYTES:
        raise LocalProtocolError(f"{what} of a SOCKS5 proxy has {least} to 255 bytes, not {len(data)}")
    return bytes([len(data)]) + data
