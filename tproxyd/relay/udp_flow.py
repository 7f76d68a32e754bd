"""One UDP flow: its client side, what passes, and whether the kernel carries it meanwhile.

The client side is a socket bound to the original destination and connected to the client: an unconnected one would
steal other clients' datagrams.
"""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING, Final

from tproxyd.flow import Cause, Client, Decision, FlowKey, Network, OrigDst
from tproxyd.relay import icmp, sockets
from tproxyd.relay.learning import FIRST_OFFER, NEXT_OFFER
from tproxyd.relay.poller import LEVEL
from tproxyd.relay.server_side import DATAGRAMS_A_TURN, FULL, ServerSide, read_errors
from tproxyd.relay.socket_side import sock_of

if TYPE_CHECKING:
    from tproxyd.relay.udp import UdpRelay

_log = logging.getLogger(__name__)

_YOUNG_S: Final = 1.0
"""Far longer than a datagram is between the lookup of its socket and that socket's queue."""


class UdpFlow:
    """One client endpoint and one original destination.

    Attributes:
        invited: its client began it.
        last: monotonic seconds of its last datagram.
        in_kernel: the kernel carries it now, as far as we know.
        learned: the kernel has carried it.
    """

    __slots__ = (
        *("_datagrams", "_next_offer", "_relay", "_sock", "bytes_down", "bytes_up", "decision", "in_kernel", "invited"),
        *("last", "learned", "orig_dst", "server_side", "started"),
    )

    def __init__(
        self, relay: UdpRelay, server_side: ServerSide, orig_dst: OrigDst, decision: Decision, *, invited: bool
    ) -> None:
        """Make a flow without a client side; `open` adds it."""
        self._relay = relay
        self._sock: sockets.Socket | None = None
        self.server_side = server_side
        self.orig_dst = orig_dst
        self.decision = decision
        self.invited = invited
        self.bytes_up = self.bytes_down = 0
        self.in_kernel = self.learned = False
        self._datagrams = 0
        self._next_offer = FIRST_OFFER
        self.started = self.last = relay.poller.now

    @property
    def client(self) -> Client:
        """Whose flow this is."""
        return self.server_side.client

    def open(self) -> None:
        """Open the socket that speaks as the original destination.

        Where a service of this box holds that port, there is none: answers go out by raw socket, and the
        client's datagrams come by the listener.

        Raises:
            OSError: it could not be opened for another reason.
        """
        relay = self._relay
        sock = sockets.udp_client_side(self.client.version, relay.client_mark)
        try:
            sock.bind(self.orig_dst)
            sock.connect(self.client)
            relay.poller.register(sock.fileno(), self, LEVEL)
        except OSError as error:
            relay.poller.close_socket(sock)
            if error.errno not in sockets.CLASHES:
                raise
            _log.debug("port %d is held on the wildcard address: answering by raw socket", self.orig_dst.port)
            return
        self._sock = sock

    def take_early(self) -> None:
        """Read what found the socket between bind and connect: it may be other clients' and goes to their flows."""
        for _ in range(DATAGRAMS_A_TURN):
            if self._sock is None:
                return
            try:
                self._take_anyones(self._sock)
            except OSError:
                return

    def on_event(self, fd: int, events: int) -> None:  # noqa: ARG002  # one socket only
        """Take the client's datagrams in."""
        sock, buffer = self._sock, self._relay.buffer
        if sock is None:
            return
        if events & select.EPOLLERR:
            self._pass_errors_on(sock)
        young = self._relay.poller.now - self.started < _YOUNG_S
        for _ in range(DATAGRAMS_A_TURN):
            try:
                if young:
                    self._take_anyones(sock)
                else:
                    self.to_server(buffer[: sock.recv_into(buffer)])
            except BlockingIOError:
                return
            except OSError:
                self._pass_errors_on(sock)
            if self._datagrams >= self._next_offer:
                self._offer()

    def idle_s(self, now: float) -> float:
        """How long it has carried nothing; one that the kernel carries is never idle here."""
        return 0.0 if self.in_kernel else now - self.last

    def leave_to_kernel(self) -> None:
        """Hear no more of the client; answers that are still under way here go out by raw socket."""
        self.in_kernel = self.learned = True
        self._relay.counters.udp_learned += 1
        if self._sock is not None:
            sockets.deafen(self._sock)

    def take_back(self) -> None:
        """Hear again."""
        if not self.in_kernel:
            return
        self.in_kernel = False
        self._next_offer = self._datagrams + FIRST_OFFER
        for sock in (self._sock, sock_of(self.server_side)):
            if sock is not None:
                sockets.let_hear(sock)

    def abort(self, error: Exception) -> None:  # noqa: ARG002  # logged by the supervisor of flows
        """End after an unforeseen error."""
        self._relay.end(self, Cause.ERROR)

    def _take_anyones(self, sock: sockets.Socket) -> None:
        """Read one datagram of whoever sent it; connect(2) throws away nothing that is on its way to the queue.

        Raises:
            OSError: there was none.
        """
        relay = self._relay
        size, peer = sock.recvfrom_into(relay.buffer)
        client = Client(peer[0], peer[1])
        if client == self.client:
            self.to_server(relay.buffer[:size])
        else:
            relay.take(client, self.orig_dst, memoryview(bytes(relay.buffer[:size])), [])

    def to_server(self, payload: memoryview) -> None:
        """Send a datagram of the client on."""
        relay = self._relay
        self.last = relay.poller.now
        try:
            self.server_side.send(payload, self.orig_dst)
            self.bytes_up += len(payload)
            self._datagrams += 1
        except OSError as error:
            answer = icmp.from_errno(error.errno or 0, self.client.version)
            if answer:
                relay.icmp.send(
                    answer, Network.UDP, self.client, self.orig_dst, payload_bytes=len(payload), now=relay.poller.now
                )
            relay.drop(f"{self.client} to {self.orig_dst}: {error}")

    def to_client(self, payload: memoryview) -> None:
        """Send a datagram of the server on, from the address that the client asked."""
        relay, sock = self._relay, self._sock
        self.last = relay.poller.now
        try:
            if sock is None or self.in_kernel:
                relay.raw.send(self.orig_dst, self.client, payload)
                relay.counters.udp_raw_replies += 1
            else:
                self._send(sock, payload)
            self.bytes_down += len(payload)
            self._datagrams += 1
        except OSError as error:
            relay.drop(f"{self.orig_dst} to {self.client}: {error}")

    def close(self) -> None:
        """Close the client side."""
        if self._sock is not None:
            self._relay.poller.close_socket(self._sock)
            self._sock = None

    def _offer(self) -> None:
        """Offer it for learning, from its client's side: a socket that has been given a packet passes the next on.

        The kernel drops a packet that it gives to a connected socket and then forwards. That is what happens
        between learning and `deafen`, unless the socket knows a route for it from a packet before.
        """
        self._next_offer = self._datagrams + NEXT_OFFER
        if not self.in_kernel and self._relay.may_learn(self):
            self._relay.learning.offer(FlowKey(self.client, self.orig_dst))

    def _send(self, sock: sockets.Socket, payload: memoryview) -> None:
        try:
            sock.send(payload)
        except OSError as error:
            if error.errno in FULL or not self._pass_errors_on(sock):
                raise
            sock.send(payload)

    def _pass_errors_on(self, sock: sockets.Socket) -> bool:
        """Tell the server what the network said about its datagrams; False if there was nothing to read."""
        relay = self._relay
        found = False
        for error, _, size in read_errors(sock, self.client.version):
            found = True
            if error is not None:
                relay.icmp.send(
                    error, Network.UDP, self.orig_dst, self.client, payload_bytes=size, now=relay.poller.now
                )
        return found
