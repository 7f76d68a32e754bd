"""Connections that lead through proxies: connect to the first, then one dialogue after another over one socket.

An `Opening` is driven by the poller alone: no stream, no task. What is said to each proxy is an `Ask`; what is asked,
and what the answers mean, the backends know. Once it is open, the socket carries the flow and nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tproxyd.errors import RemoteProtocolError
from tproxyd.flow import Cause, Endpoint, Phase
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.relay import sockets
from tproxyd.relay.connect_errors import EXHAUSTED, cause_of_failed_connect
from tproxyd.relay.poller import Poller
from tproxyd.relay.resolver import Resolver

_READ_BYTES: Final = 4096
_FAILED: Final = select.EPOLLERR | select.EPOLLHUP


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no way.

    Attributes:
        text: for the operator.
        code: the errno whose ICMP error the client should see; 0 for none.
    """

    cause: Cause
    text: str
    code: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """What one proxy is asked for.

    Attributes:
        proxy: the backend's name, for messages.
        address: where the next proxy or the server is.
        resolve: a name is resolved here; the proxy gets an address.
        begin: makes the dialogue about an address.
        judge: tells what is wrong with the dialogue's event; None: granted.
    """

    proxy: str
    address: Address
    resolve: bool
    begin: Callable[[Address], Dialogue[Any]]
    judge: Callable[[Any], Failure | None]


@dataclass(frozen=True, slots=True)
class Means:
    """What openings work with.

    Attributes:
        mark: SO_MARK of sockets towards proxies.
        limit_s: how long an opening may take.
        complain: tells the operator what a backend (by its name) met, now and then.
    """

    loop: asyncio.AbstractEventLoop
    poller: Poller
    resolver: Resolver
    mark: int
    limit_s: float
    complain: Callable[[str, str], None]


class Owner(Protocol):
    """Whoever waits for an opening; told once, or never if it cancels before."""

    def opened(self, opening: Opening) -> None:
        """Take `opening.sock`, still registered with the poller, and what came over it."""

    def failed(self, failure: Failure) -> None:
        """Go on without."""

    def abort(self, error: Exception) -> None:
        """End: an unforeseen error; see `Watcher`."""


class Opening:
    """One connection on its way through proxies; closes its socket unless it opens.

    Attributes:
        phase: CONNECT until the first proxy has taken the connection, then HANDSHAKE.
        sock: the connection, once open.
        answer: the last proxy's event, once open.
        trailing: what came over the connection behind it: the first bytes of the flow.
        means: what it works with.
    """

    __slots__ = (
        "_asks",
        "_candidates",
        "_current",
        "_dialogue",
        "_entrance",
        "_owner",
        "_sock",
        "_timer",
        "_unsent",
        "answer",
        "means",
        "phase",
        "trailing",
    )

    def __init__(self, means: Means, entrance: Address, asks: list[Ask]) -> None:
        """Args: entrance: the first proxy; asks: what it and the ones behind it are asked for, at least one."""
        self.means = means
        self.phase = Phase.CONNECT
        self.answer: Any = None
        self.trailing = b""
        self._entrance = entrance
        self._asks = deque(asks)
        self._current = self._asks.popleft()
        self._candidates: deque[Endpoint] = deque()
        self._owner: Owner | None = None
        self._sock: sockets.Socket | None = None
        self._dialogue: Dialogue[Any] | None = None
        self._unsent = b""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def sock(self) -> sockets.Socket:
        """The connection, once open; the owner's."""
        assert self._sock is not None  # noqa: S101  # read when open
        return self._sock

    def start(self, owner: Owner, *, timed: bool = False) -> None:
        """Begin; the owner may be told of a failure before this returns.

        Args:
            owner: who is told.
            timed: give up after `means.limit_s`, for an owner that keeps no clock.
        """
        self._owner = owner
        if timed:
            self._timer = self.means.loop.call_later(self.means.limit_s, self._time_out)
        if isinstance(self._entrance, HostName):
            self.means.resolver.resolve(self._entrance.name, self._found)
        else:
            self._candidates.append(self._entrance)
            self._connect()

    def cancel(self, cause: Cause) -> None:
        """Give up, for `cause`; the owner is told nothing more."""
        if self._owner is None:
            return
        if cause is Cause.TIMED_OUT:
            said = "takes no connection" if self.phase is Phase.CONNECT else "gave no answer"
            self.means.complain(self._current.proxy, f"the proxy {said} within {self.means.limit_s:g} s")
        self._let_go()
        self._close()

    def on_event(self, fd: int, events: int) -> None:  # noqa: ARG002  # one socket at a time
        """Take an event of the socket."""
        if self._owner is None or self._sock is None:
            return
        if self.phase is Phase.HANDSHAKE:
            self._converse(self._sock)
        elif events & _FAILED:
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._try_next(code or errno.ECONNREFUSED)
        elif events & select.EPOLLOUT:
            self.phase = Phase.HANDSHAKE
            self._ask()

    def abort(self, error: Exception) -> None:
        """End after an unforeseen error."""
        if self._owner is not None:
            self._owner.abort(error)

    # The first proxy

    def _found(self, addresses: list[str]) -> None:
        """Take the first proxy's addresses."""
        if self._owner is None:
            return
        self._candidates.extend(Endpoint(address, self._entrance.port) for address in addresses)
        if self._candidates:
            self._connect()
        else:
            self._fail(self._unresolved(self._entrance))

    def _connect(self) -> None:
        peer = self._candidates.popleft()
        try:
            self._sock = sockets.tcp_server_side(peer.version, self.means.mark, transparent=False)
            code = self._sock.connect_ex(peer)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, f"connect to {peer}")
            self.means.poller.register(self._sock.fileno(), self)
        except OSError as error:
            self._try_next(error.errno or 0)

    def _try_next(self, code: int) -> None:
        """Take the next address of the first proxy."""
        self._close()
        if self._candidates and code not in EXHAUSTED:
            self._connect()
        else:
            what = f"no connection to the proxy {self._entrance}: {errno.errorcode.get(code, code)}"
            self._fail(Failure(cause_of_failed_connect(code), what, code))

    # The dialogues

    def _ask(self) -> None:
        address = self._current.address
        if self._current.resolve and isinstance(address, HostName):
            self.means.resolver.resolve(address.name, self._named)
        else:
            self._begin(address)

    def _named(self, addresses: list[str]) -> None:
        """Take the address of the next proxy, for one that is to be told no names."""
        if self._owner is None:
            return
        address = self._current.address
        if addresses:
            self._begin(Endpoint(addresses[0], address.port))
        else:
            self._fail(self._unresolved(address))

    def _begin(self, address: Address) -> None:
        self._dialogue = self._current.begin(address)
        self._unsent = self._dialogue.data_to_send()
        if self._sock is not None:
            self._converse(self._sock)

    def _converse(self, sock: sockets.Socket) -> None:
        """Go on until the proxy has to say or to take more, or all is said."""
        try:
            while self._dialogue is not None and self._send(sock):
                self._dialogue.receive_data(sock.recv(_READ_BYTES))
                if self._hear(self._dialogue):
                    return
        except BlockingIOError:
            return
        except RemoteProtocolError as error:
            self._fail(Failure(Cause.PROTOCOL, str(error)))
        except OSError as error:
            cause = cause_of_failed_connect(error.errno or 0)
            self._fail(Failure(cause, f"the connection to the proxy broke in the middle of the handshake: {error}"))

    def _send(self, sock: sockets.Socket) -> bool:
        """Send what waits; False if the socket takes no more."""
        if self._unsent:
            self._unsent = self._unsent[sock.send(self._unsent) :]
        return not self._unsent

    def _hear(self, dialogue: Dialogue[Any]) -> bool:
        """Take what the proxy said; True when this dialogue is over."""
        event = dialogue.next_event()
        self._unsent += dialogue.data_to_send()
        if event is None:
            return False
        failure = self._current.judge(event)
        if failure is not None:
            self._fail(failure, of_proxy=failure.cause is Cause.REJECTED)
        elif self._asks:
            self._go_on(dialogue.trailing)
        else:
            self._open(event, dialogue.trailing)
        return True

    def _go_on(self, trailing: bytes) -> None:
        """Speak to the next proxy; one that has spoken before it was spoken to speaks no such protocol."""
        self._dialogue = None
        self._current = self._asks.popleft()
        if trailing:
            self._fail(Failure(Cause.PROTOCOL, "the proxy spoke before it was asked"))
        else:
            self._ask()

    def _open(self, answer: Any, trailing: bytes) -> None:
        self.answer, self.trailing = answer, trailing
        owner = self._let_go()
        if owner is not None:
            owner.opened(self)

    # The end

    def _time_out(self) -> None:
        owner = self._owner
        self.cancel(Cause.TIMED_OUT)
        if owner is not None:
            owner.failed(Failure(Cause.TIMED_OUT, f"no answer from the proxy within {self.means.limit_s:g} s"))

    def _fail(self, failure: Failure, *, of_proxy: bool = True) -> None:
        """End; what is the proxy's fault rather than the server's, the operator should hear of."""
        if of_proxy:
            self.means.complain(self._current.proxy, failure.text)
        self._close()
        owner = self._let_go()
        if owner is not None:
            owner.failed(failure)

    def _let_go(self) -> Owner | None:
        owner, self._owner = self._owner, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return owner

    def _close(self) -> None:
        if self._sock is not None:
            self.means.poller.close_socket(self._sock)
            self._sock = None

    def _unresolved(self, address: Address) -> Failure:
        return Failure(Cause.UNRESOLVED, f"the name in {address} has no address", errno.EHOSTUNREACH)
