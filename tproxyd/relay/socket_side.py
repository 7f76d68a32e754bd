"""The plain server side of UDP flows: one socket, unconnected (full cone) or connected to its only server."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

from tproxyd.flow import Client, Decision, Endpoint, Network, OrigDst
from tproxyd.relay import sockets
from tproxyd.relay.poller import LEVEL
from tproxyd.relay.server_side import DATAGRAMS_A_TURN, FULL, ServerSide, read_errors

if TYPE_CHECKING:
    from tproxyd.relay.udp import UdpRelay


class SocketSide(ServerSide):
    """A socket of its own: servers are spoken to as the backend says, answers come as they are."""

    __slots__ = ("sock",)

    def __init__(
        self, relay: UdpRelay, sock: sockets.Socket, client: Client, decision: Decision, connected_to: OrigDst | None
    ) -> None:
        """Take over an open socket."""
        super().__init__(relay, client, decision, connected_to)
        self.sock = sock

    def open(self) -> None:
        """Begin to listen for answers; see `ServerSide`."""
        self.relay.poller.register(self.sock.fileno(), self, LEVEL)

    def close(self) -> None:
        """Close the socket."""
        self.relay.poller.close_socket(self.sock)

    def source(self, orig_dst: OrigDst) -> Endpoint | None:
        """See `ServerSide`."""
        return sockets.source_towards(self.sock, orig_dst)

    def send(self, payload: memoryview, orig_dst: OrigDst) -> None:
        """Send one datagram.

        Raises:
            OSError: it was not sent; an error that an earlier datagram had left behind is not raised again.
        """
        try:
            self._send(payload, orig_dst)
        except OSError as error:
            if error.errno in FULL or not self._pass_errors_on():
                raise
            self._send(payload, orig_dst)

    def on_event(self, fd: int, events: int) -> None:  # noqa: ARG002  # one socket only
        """Take answers in."""
        if events & select.EPOLLERR:
            self._pass_errors_on()
        relay, sock, buffer = self.relay, self.sock, self.relay.buffer
        for _ in range(DATAGRAMS_A_TURN):
            try:
                if self.connected_to is not None:
                    size, source = sock.recv_into(buffer), self.connected_to
                else:
                    size, peer = sock.recvfrom_into(buffer)
                    source = OrigDst(peer[0], peer[1])
                    if not source.port:
                        self.relay.drop(f"port 0 can't be answered: {source} to {self.client}")
                        continue
            except BlockingIOError:
                return
            except OSError:
                self._pass_errors_on()
                continue
            relay.answer(self, source, buffer[:size])
            if not self.flows:
                return

    def abort(self, error: Exception) -> None:
        """Nothing to end: a datagram was lost, `error` has been logged."""

    def _send(self, payload: memoryview, orig_dst: OrigDst) -> None:
        if self.connected_to is not None:
            self.sock.send(payload)
        else:
            self.sock.sendto(payload, orig_dst)

    def _pass_errors_on(self) -> bool:
        """Tell the client what the network said about its datagrams; False if there was nothing to read."""
        relay, client = self.relay, self.client
        found = False
        for error, peer, size in read_errors(self.sock, client.version):
            found = True
            orig_dst = OrigDst(peer[0], peer[1])
            if error is not None and relay.flow_of(client, orig_dst) is not None:
                relay.icmp.send(error, Network.UDP, client, orig_dst, payload_bytes=size, now=relay.poller.now)
        return found


def sock_of(server_side: ServerSide) -> sockets.Socket | None:
    """Return the socket of a server side that has but one."""
    return server_side.sock if isinstance(server_side, SocketSide) else None
