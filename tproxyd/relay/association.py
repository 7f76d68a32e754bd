"""UDP through a SOCKS5 proxy (RFC 1928 §7): one association for each client endpoint, shared by all its flows.

An association is a TCP connection that keeps it alive and a UDP socket that speaks with the proxy's relay. When the
connection drops, or the relay is gone, another association takes its place; the flows stay. What a client sends
meanwhile waits, a little of it.
"""

from __future__ import annotations

import errno
import select
import socket
from collections import deque
from collections.abc import Callable
from ipaddress import ip_address
from time import monotonic
from typing import TYPE_CHECKING, Final

from tproxyd.errors import RemoteProtocolError
from tproxyd.flow import Cause, Client, Decision, Endpoint, OrigDst
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.socks5 import datagram_header, decode_datagram
from tproxyd.relay import icmp, sockets
from tproxyd.relay.opening import Failure, Opening
from tproxyd.relay.poller import LEVEL
from tproxyd.relay.server_side import FULL, ServerSide, read_errors

if TYPE_CHECKING:
    from tproxyd.relay.udp import UdpRelay

_DATAGRAMS: Final = 64
_WAITING: Final = 32
_WAITING_BYTES: Final = 65536
_AGAIN_S: Final = 1.0
_HEADERS: Final = 1024
_CONTROL_BYTES: Final = 4096
_GONE: Final = frozenset({icmp.PORT_UNREACHABLE[4], icmp.PORT_UNREACHABLE[6]})


class Association(ServerSide):
    """The server side of a client endpoint that speaks through a SOCKS5 proxy."""

    __slots__ = (
        "_again",
        "_again_at",
        "_control",
        "_failure",
        "_headers",
        "_opening",
        "_sock",
        "_waiting",
        "_waiting_bytes",
    )

    def __init__(
        self, relay: UdpRelay, client: Client, decision: Decision, opening: Opening, again: Callable[[], Opening]
    ) -> None:
        """Args: opening: ends in an association; again: makes another like it."""
        super().__init__(relay, client, decision, None)
        self._opening: Opening | None = opening
        self._again = again
        self._control: sockets.Socket | None = None
        self._sock: sockets.Socket | None = None
        self._failure: Failure | None = None
        self._again_at = 0.0
        self._headers: dict[OrigDst, bytes] = {}
        self._waiting: deque[tuple[bytes, OrigDst]] = deque()
        self._waiting_bytes = 0

    def open(self) -> None:
        """Ask for the first association."""
        if self._opening is not None:
            self._opening.start(self, timed=True)

    def close(self) -> None:
        """Cancel what is under way, and let the association go."""
        if self._opening is not None:
            self._opening.cancel(Cause.SHUTDOWN)
            self._opening = None
        self._drop_sockets()
        self._waiting.clear()

    def source(self, orig_dst: OrigDst) -> Endpoint | None:
        """The address and port that the proxy's relay sees."""
        return sockets.source_towards(self._sock, orig_dst) if self._sock is not None else None

    def send(self, payload: memoryview, orig_dst: OrigDst) -> None:
        """Send one datagram, or have it wait for the association.

        Raises:
            OSError: it was not sent: too large with its header (EMSGSIZE), too many wait (ENOBUFS), the proxy said no.
        """
        if self._sock is not None:
            try:
                self._send(self._sock, payload, orig_dst)
                return
            except OSError as error:
                if error.errno in FULL or not self._read_errors(self._sock):
                    raise
            if self._sock is not None:
                self._send(self._sock, payload, orig_dst)
                return
        self._wait(payload, orig_dst)

    # The owner of an opening

    def opened(self, opening: Opening) -> None:
        """Take an association over, and send what waits."""
        self._opening = None
        self._control = opening.sock
        try:
            relay_at = self._place(opening.answer.address, opening.sock)
            sockets.keep_alive(opening.sock)
            self._sock = sockets.udp_server_side(relay_at.version, opening.means.mark, transparent=False)
            self._sock.connect(relay_at)
            self.relay.poller.register(self._sock.fileno(), self, LEVEL)
            self.relay.poller.hand_over(opening.sock.fileno(), self, LEVEL)
        except OSError as error:
            self._drop_sockets()
            self.failed(Failure(Cause.ERROR, f"no socket towards the proxy's relay: {error}", error.errno or 0))
            return
        self._failure = None
        self._send_waiting()

    def failed(self, failure: Failure) -> None:
        """Refuse what waits; ask again when a client sends something, but not at once."""
        self._opening = None
        self._failure = failure
        self._again_at = monotonic() + _AGAIN_S
        waiting, self._waiting, self._waiting_bytes = self._waiting, deque(), 0
        for _, orig_dst in waiting:
            self.relay.refuse(self.client, orig_dst, OSError(failure.code, failure.text))

    def abort(self, error: Exception) -> None:
        """Go on with another association; `error` has been logged."""
        self._lose(f"an unforeseen error: {error!r}")

    # A watcher of two sockets

    def on_event(self, fd: int, events: int) -> None:
        """Take datagrams from the relay, or the end of the connection that keeps it alive."""
        if self._control is not None and fd == self._control.fileno():
            self._hear_control(self._control)
        elif self._sock is not None and fd == self._sock.fileno():
            if events & select.EPOLLERR:
                self._read_errors(self._sock)
            self._receive()

    def _hear_control(self, control: sockets.Socket) -> None:
        """Nothing is said on it any more; it ends, or breaks."""
        try:
            if control.recv(_CONTROL_BYTES):
                return
            why = "the proxy closed the connection"
        except BlockingIOError:
            return
        except OSError as error:
            why = str(error)
        self._lose(why)

    def _receive(self) -> None:
        buffer = self.relay.buffer
        for _ in range(_DATAGRAMS):
            if self._sock is None:
                return
            try:
                size = self._sock.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError:
                self._read_errors(self._sock)
                continue
            self._take(buffer[:size])
            if not self.flows:
                return

    def _take(self, datagram: memoryview) -> None:
        try:
            source, payload = decode_datagram(datagram)
        except RemoteProtocolError as error:
            self.relay.drop(f"the proxy sent {self.client} {error}")
            return
        sender = self._sender(source)
        if sender is None:
            self.relay.drop(f"the proxy sent {self.client} a datagram of {source}, who can't be answered")
        else:
            self.relay.answer(self, sender, payload)

    def _sender(self, source: Address) -> OrigDst | None:
        """Return whose datagram it is, None unless it is someone whom this client could have asked.

        A proxy is trusted with addresses of the network, not with those that have a meaning on this box.
        """
        if isinstance(source, HostName) or source.version != self.client.version or not source.port:
            return None
        sender = OrigDst(*source)
        if self.relay.flow_of(self.client, sender) is None:
            address = ip_address(source.address)
            if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
                return None
        return sender

    # The association

    def _associate(self) -> None:
        self._opening = self._again()
        self._opening.start(self, timed=True)

    def _lose(self, why: str) -> None:
        """Go on with another association; at once unless this one was as short-lived as to promise little."""
        if self._opening is not None or self._sock is None:
            return
        self._drop_sockets()
        self.relay.counters.udp_associations_lost += 1
        now = monotonic()
        self._failure = Failure(Cause.SERVER_RESET, f"the association with the proxy is lost: {why}")
        if now >= self._again_at:
            self._again_at = now + _AGAIN_S
            self._associate()

    def _drop_sockets(self) -> None:
        if self._control is not None:
            self._control.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, sockets.LINGER_OFF)
            self.relay.poller.close_socket(self._control)
        if self._sock is not None:
            self.relay.poller.close_socket(self._sock)
        self._control = self._sock = None

    def _place(self, address: Endpoint, control: sockets.Socket) -> Endpoint:
        """Return where the relay is; 0.0.0.0 and :: stand for the proxy's own address."""
        if ip_address(address.address).is_unspecified:
            return Endpoint(control.getpeername()[0], address.port)
        return address

    # Datagrams

    def _send(self, sock: sockets.Socket, payload: memoryview | bytes, orig_dst: OrigDst) -> None:
        header = self._headers.get(orig_dst)
        if header is None:
            if len(self._headers) >= _HEADERS:
                self._headers.clear()
            header = self._headers[orig_dst] = datagram_header(orig_dst)
        sock.sendmsg([header, payload])

    def _wait(self, payload: memoryview, orig_dst: OrigDst) -> None:
        if self._opening is None and monotonic() >= self._again_at:
            self._associate()
        if self._opening is None:
            failure = self._failure
            raise OSError(failure.code, failure.text) if failure else OSError("no association")
        if len(self._waiting) >= _WAITING or self._waiting_bytes + len(payload) > _WAITING_BYTES:
            raise OSError(errno.ENOBUFS, "too much waits for the proxy")
        self._waiting.append((bytes(payload), orig_dst))
        self._waiting_bytes += len(payload)

    def _send_waiting(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, deque(), 0
        for payload, orig_dst in waiting:
            try:
                self.send(memoryview(payload), orig_dst)
            except OSError as error:
                self.relay.drop(f"{self.client} to {orig_dst}: {error}")

    def _read_errors(self, sock: sockets.Socket) -> bool:
        """Read what the network says about our datagrams to the relay; False if there was nothing to read."""
        version = 6 if sock.family == socket.AF_INET6 else 4
        errors = [error for error, _, _ in read_errors(sock, version)]
        if any(error in _GONE for error in errors):
            self._lose("the proxy's relay is gone")
        return bool(errors)
