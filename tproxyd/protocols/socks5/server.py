"""The server's end of SOCKS5: one client's request (RFC 1928 §3 to §6, RFC 1929).

The machine asks its caller twice: whether credentials are good, and how the request went. Until the answer is given,
nothing more is read; what came ahead waits, up to `MOST_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.protocols.address import Address
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.protocols.socks5.wire import (
    ADDRESS_TYPES,
    AUTH_VERSION,
    UNSPECIFIED,
    VERSION,
    Command,
    Method,
    Reply,
    pack_address,
    unpack_address,
)

# Greeting 257, credentials 513, request 262: the longest handshake; and one read of the relay sent ahead of the reply.
MOST_BYTES: Final = 1032 + 16_384
_CHOOSABLE: Final = frozenset({Method.NONE, Method.USER_PASSWORD})
_COMMANDS: Final = frozenset(Command)
_BAD: Final = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asks for (RFC 1928 §4); answer it with `Server.reply`."""

    command: Command
    address: Address


ServerEvent = Credentials | Request


class _State(Enum):
    GREETING = auto()
    CREDENTIALS = auto()
    CHECKING = auto()
    REQUEST = auto()
    REPLYING = auto()
    BOUND = auto()


class Server(Dialogue[ServerEvent]):
    """Reads one client's request; `over` after the (second, for BIND) reply, a refusal or an error.

    Where it raises RemoteProtocolError, `data_to_send` holds the answer that the protocol has for it, if any.
    """

    def __init__(self, methods: Sequence[Method] = (Method.NONE,)) -> None:
        """Args: methods: those the server takes, best first.

        Raises:
            LocalProtocolError: none, or one that can't be taken.
        """
        super().__init__("the SOCKS5 client")
        if not methods or not _CHOOSABLE.issuperset(methods):
            raise LocalProtocolError(f"a server can't choose from the methods {list(methods)}")
        self._methods = tuple(methods)
        self._command = Command.CONNECT
        self._state = _State.GREETING

    def receive_data(self, data: bytes) -> None:
        """As `Dialogue.receive_data`; stop reading while you check credentials or carry out the request.

        Raises:
            RemoteProtocolError: the client left, or sent more than `MOST_BYTES` without an answer.
            LocalProtocolError: the dialogue is over.
        """
        super().receive_data(data)
        if len(self._received) > MOST_BYTES:
            self._end_in_vain()
            raise self._broken(f"sent more than {MOST_BYTES} bytes ahead of an answer")

    def accept_credentials(self) -> None:
        """Let the client go on to its request (RFC 1929 §2).

        Raises:
            LocalProtocolError: no `Credentials` wait for an answer.
        """
        self._expect(_State.CHECKING)
        self._to_send += bytes([AUTH_VERSION, 0])
        self._state = _State.REQUEST

    def reject_credentials(self) -> None:
        """Refuse the client; send `data_to_send` and close (RFC 1929 §2).

        Raises:
            LocalProtocolError: no `Credentials` wait for an answer.
        """
        self._expect(_State.CHECKING)
        self._to_send += bytes([AUTH_VERSION, _BAD])
        self._end_in_vain()

    def reply(self, code: Reply, address: Address = UNSPECIFIED) -> None:
        """Answer the request (RFC 1928 §6); a BIND that succeeds is answered twice.

        Args:
            code: anything but SUCCEEDED ends the dialogue: send `data_to_send` and close.
            address: BND.ADDR and BND.PORT: the server-side socket's, for UDP ASSOCIATE where datagrams are taken.

        Raises:
            LocalProtocolError: no request waits for an answer, or the address can't be put into SOCKS5.
        """
        self._expect(_State.REPLYING, _State.BOUND)
        self._to_send += _reply(code, address)
        if code is not Reply.SUCCEEDED:
            self._end_in_vain()
        elif self._command is Command.BIND and self._state is _State.REPLYING:
            self._state = _State.BOUND
        else:
            self._over = True

    def _step(self) -> ServerEvent | None:
        match self._state:
            case _State.GREETING:
                self._on_greeting()
            case _State.CREDENTIALS:
                return self._on_credentials()
            case _State.REQUEST:
                return self._on_request()
        return None

    def _on_greeting(self) -> None:
        """RFC 1928 §3: choose one of the methods that the client offers."""
        if self._received and self._received[0] != VERSION:
            raise self._broken(f"began with byte {self._received[0]:#04x}: no SOCKS5")
        if len(self._received) < 2 or len(self._received) < 2 + self._received[1]:
            return
        offered = self._take(2 + self._received[1])[2:]
        method = next((method for method in self._methods if method in offered), Method.NO_ACCEPTABLE)
        self._to_send += bytes([VERSION, method])
        if method is Method.NO_ACCEPTABLE:
            raise self._broken(f"offered no authentication method that is taken here ({list(offered)[:8]})")
        self._state = _State.CREDENTIALS if method is Method.USER_PASSWORD else _State.REQUEST

    def _on_credentials(self) -> Credentials | None:
        """RFC 1929 §2. Empty names and passwords are taken (curl sends them): the check knows no such user."""
        data = self._received
        if data and data[0] != AUTH_VERSION:
            self._to_send += bytes([AUTH_VERSION, _BAD])
            raise self._broken(f"sent version {data[0]} of the user/password negotiation")
        password_at = 2 + data[1] + 1 if len(data) > 1 else 0
        if not password_at or len(data) < password_at or len(data) < password_at + data[password_at - 1]:
            return None
        message = self._take(password_at + data[password_at - 1])
        self._state = _State.CHECKING
        return Credentials(_text(message[2 : password_at - 1]), _text(message[password_at:]))

    def _on_request(self) -> Request | None:
        """RFC 1928 §4, §5."""
        if len(self._received) < 4:
            return None
        version, command, _, kind = self._received[:4]
        if version != VERSION:
            raise self._refused(Reply.GENERAL_FAILURE, f"sent a request of version {version}")
        if command not in _COMMANDS:
            raise self._refused(Reply.COMMAND_NOT_SUPPORTED, f"sent unknown command {command}")
        if kind not in ADDRESS_TYPES:
            raise self._refused(Reply.ADDRESS_TYPE_NOT_SUPPORTED, f"sent unknown address type {kind}")
        try:
            found = unpack_address(self._received, 3)
        except RemoteProtocolError as error:
            raise self._refused(Reply.GENERAL_FAILURE, f"asked for a bad destination: {error}") from None
        if found is None:
            return None
        address, end = found
        self._take(end)
        self._command = Command(command)
        self._state = _State.REPLYING
        return Request(self._command, address)

    def _refused(self, code: Reply, what: str) -> RemoteProtocolError:
        self._to_send += _reply(code, UNSPECIFIED)
        return self._broken(what)

    def _expect(self, *states: _State) -> None:
        if self._over or self._state not in states:
            raise LocalProtocolError("nothing waits for this answer")


def _reply(code: Reply, address: Address) -> bytes:
    return bytes([VERSION, code, 0]) + pack_address(address)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
