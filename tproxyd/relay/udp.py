"""UDP flows: first datagram, sockets on both sides, answers, ICMP errors, expiry.

The client side of a flow is a socket bound to the original destination and connected to the client: an
unconnected one would steal other clients' datagrams. The server side is one unconnected socket for each client
endpoint, which anyone may answer (full-cone), or one connected socket a flow (symmetric).
"""

from __future__ import annotations

import errno
import logging
import select
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from tproxyd.flow import (
    LOOPBACK,
    Action,
    Cause,
    Client,
    Decision,
    Endpoint,
    Flow,
    FlowEnd,
    FlowKey,
    Layer,
    Network,
    OrigDst,
    Phase,
)
from tproxyd.policy import refusal
from tproxyd.relay import icmp, sockets
from tproxyd.relay.context import Context
from tproxyd.relay.learning import FIRST_OFFER, NEXT_OFFER
from tproxyd.relay.poller import LEVEL
from tproxyd.relay.raw_udp import RawUdpSender
from tproxyd.relay.server_side import DATAGRAM_BYTES, FULL, ServerSide, read_errors

if TYPE_CHECKING:
    from tproxyd.relay.opening import Opening

_log = logging.getLogger(__name__)

_DATAGRAMS: Final = 64
_TICK_S: Final = 1.0
_LOG_EVERY_S: Final = 10.0
_STRANGERS: Final = 64
"""Flows that others may begin with one client endpoint (full cone), which would otherwise be theirs to exhaust."""
_YOUNG_S: Final = 1.0
"""Far longer than a datagram is between the lookup of its socket and that socket's queue."""
_STRAGGLING_S: Final = 0.25


class UdpRelay:
    """All UDP flows of a worker."""

    def __init__(self, context: Context, *, idle_s: float, client_mark: int) -> None:
        """Args: idle_s: how long a flow may be silent; client_mark: SO_MARK of client-side sockets."""
        self.poller = context.poller
        self.counters = context.counters
        self.icmp = context.icmp
        self.raw = RawUdpSender(client_mark)
        self.buffer = memoryview(bytearray(DATAGRAM_BYTES))
        self.client_mark = client_mark
        self.learning = context.learning
        self._context = context
        self._limits = context.limits
        self._listeners: dict[int, sockets.Socket] = {}
        self._flows: dict[tuple[Client, OrigDst], UdpFlow] = {}
        self._server_sides: dict[tuple[str, Client], ServerSide] = {}
        self._idle_s = idle_s
        self._logged_s = 0.0
        self._timer = context.loop.call_later(_TICK_S, self._tick)

    def listen(self, listener: sockets.Socket) -> None:
        """Take flows in from a listening socket, which is then owned here."""
        if self._context.policy.asks_interface:
            sockets.ask_interface(listener)
        self._listeners[listener.fileno()] = listener
        self.poller.register(listener.fileno(), self, LEVEL)

    def stop_listening(self) -> None:
        """Take nothing new; running flows go on."""
        for listener in self._listeners.values():
            self.poller.close_socket(listener)
        self._listeners.clear()

    def close(self) -> None:
        """End all flows and free everything."""
        self.stop_listening()
        self._timer.cancel()
        for flow in list(self._flows.values()):
            self.end(flow, Cause.SHUTDOWN)
        self.raw.close()

    def on_event(self, fd: int, events: int) -> None:  # noqa: ARG002  # a listener has one event
        """Take datagrams of new flows in."""
        listener = self._listeners.get(fd)
        if listener is None:
            return
        for _ in range(_DATAGRAMS):
            try:
                size, ancillary, _, peer = listener.recvmsg_into([self.buffer], sockets.ORIG_DST_SPACE)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about something sent long ago
            orig_dst = sockets.orig_dst_of_datagram(ancillary)
            if orig_dst is None:
                self.counters.udp_without_orig_dst += 1
            elif orig_dst.address == LOOPBACK[orig_dst.version]:
                self.counters.refused_loop += 1
            elif not peer[1] or not orig_dst.port:
                self.drop(f"port 0 can't be answered: {peer[0]} to {orig_dst}")  # connect(2) to port 0 connects nothing
            else:
                self.take(Client(peer[0], peer[1]), orig_dst, self.buffer[:size], ancillary)

    def abort(self, error: Exception) -> None:
        """Nothing to end: listening goes on, `error` has been logged."""

    def leave_to_kernel(self, keys: list[FlowKey]) -> None:
        """Stop hearing flows that the kernel carries from now on.

        The client's side first: what was given to it before goes on through the server's side, which so hears
        (and, where it is connected, takes) answers for a moment more.
        """
        flows = [flow for key in keys if (flow := self._flows.get(key)) is not None and not flow.in_kernel]
        for flow in flows:
            flow.leave_to_kernel()
        self._context.loop.call_later(_STRAGGLING_S, _deafen_server_sides, flows)

    def take_back(self, key: FlowKey, *, bytes_up: int, bytes_down: int, silent_s: float) -> None:
        """Take a flow back that the kernel no longer carries, with what it has counted."""
        flow = self._flows.get(key)
        if flow is None:
            return
        flow.bytes_up += bytes_up
        flow.bytes_down += bytes_down
        flow.last = max(flow.last, monotonic() - silent_s)
        flow.take_back()

    def take_all_back(self) -> None:
        """Take all flows back: nobody is left who could say when the kernel ceases to carry one."""
        for flow in self._flows.values():
            if flow.in_kernel:
                flow.last = monotonic()
                flow.take_back()

    def take(
        self, client: Client, orig_dst: OrigDst, payload: memoryview, ancillary: list[tuple[int, int, bytes]]
    ) -> None:
        """Send a client's datagram on, in its flow or a new one; `ancillary` is what came with it."""
        flow = self._flows.get((client, orig_dst))
        if flow is not None:
            flow.take_back()  # the kernel let this one through: it may have ceased to carry the flow
            flow.to_server(payload)
        elif (flow := self._open(client, orig_dst, len(payload), ancillary)) is not None:
            flow.to_server(payload)
            flow.take_early()

    def answer(self, server_side: ServerSide, source: OrigDst, payload: memoryview) -> None:
        """Take a datagram that reached a client's server side; anyone may send one to a full cone."""
        flow = self._flows.get((server_side.client, source))
        if flow is not None:
            flow.to_client(payload)
        elif server_side.strangers >= _STRANGERS:
            self.drop(f"{server_side.client} has {_STRANGERS} flows that others began")
        elif (flow := self._start(server_side, source, server_side.decision, invited=False)) is not None:
            flow.to_client(payload)
            flow.take_early()

    def may_learn(self, flow: UdpFlow) -> bool:
        """Tell whether the kernel can carry a flow so that neither end sees a difference.

        The connection must be one that its client began, under its own port. The box's own flows cross no
        interface of clients.
        """
        server_side = flow.server_side
        return (
            flow.client.version in self.learning.versions
            and flow.invited
            and self._context.backends[server_side.decision.backend].keeps_four_tuple
            and isinstance(server_side, SocketSide)
            and (server_side.connected_to is None or flow.bytes_down > 0)
            and server_side.sock.getsockname()[:2] == flow.client
            and not sockets.is_local(flow.client.address)
        )

    def flow_of(self, client: Client, orig_dst: OrigDst) -> UdpFlow | None:
        """Return a live flow."""
        return self._flows.get((client, orig_dst))

    def end(self, flow: UdpFlow, cause: Cause) -> None:
        """Free a flow, and its server side with the last flow on it."""
        if self._flows.pop((flow.client, flow.orig_dst), None) is None:
            return
        if flow.invited:
            self._limits.give_back(flow.client.address)
        else:
            flow.server_side.strangers -= 1
        self.counters.flows -= 1
        self.counters.bytes_up += flow.bytes_up
        self.counters.bytes_down += flow.bytes_down
        self._report(flow, cause)
        flow.close()
        server_side = flow.server_side
        server_side.flows -= 1
        if not server_side.flows:
            self._server_sides.pop((server_side.decision.backend, server_side.client), None)
            server_side.close()

    def drop(self, why: str) -> None:
        """Count a datagram that could not go on; say so now and then."""
        self.counters.udp_dropped += 1
        if self.poller.now - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = self.poller.now
            _log.warning("UDP datagrams are dropped (%d so far): %s", self.counters.udp_dropped, why)

    def _open(
        self, client: Client, orig_dst: OrigDst, size: int, ancillary: list[tuple[int, int, bytes]]
    ) -> UdpFlow | None:
        decision = self._decide(client, orig_dst, ancillary)
        if decision is None:
            return None
        if (action := refusal(decision)) is not None:
            self._context.rule_counters[decision.rule] += 1
            if action is Action.REJECT:
                error, now = icmp.PORT_UNREACHABLE[client.version], self.poller.now
                self.icmp.send(error, Network.UDP, client, orig_dst, payload_bytes=size, now=now)
            return None
        if not self._limits.has_room(client.address):
            self.counters.refused_limit += 1
            return None
        self._context.rule_counters[decision.rule] += 1
        backend = self._context.backends[decision.backend]
        server_side = self._server_sides.get((decision.backend, client)) if backend.full_cone else None
        if server_side is None:
            try:
                server_side = self._server_side(client, decision, None if backend.full_cone else orig_dst)
            except OSError as error:
                self.counters.udp_not_carried += error.errno == errno.EACCES
                self.refuse(client, orig_dst, error)
                return None
        flow = self._start(server_side, orig_dst, decision)
        if not server_side.flows:
            server_side.close()
        return flow

    def _decide(self, client: Client, orig_dst: OrigDst, ancillary: list[tuple[int, int, bytes]]) -> Decision | None:
        """Ask the policy; None, and the datagram is dropped, where it wants to know an interface that nobody told.

        That happens to what arrived at another flow's socket between its bind and its connect.
        """
        context = self._context
        interface = sockets.interface_of_datagram(ancillary) if context.policy.asks_interface else ""
        if context.policy.asks_interface and not interface:
            self.drop(f"no interface is known for {client} to {orig_dst}")
            return None
        return context.policy.decide(Flow(Network.UDP, client, orig_dst, context.listener, interface))

    def _server_side(self, client: Client, decision: Decision, connect_to: OrigDst | None) -> ServerSide:
        open_datagram = self._context.backends[decision.backend].open_datagram
        way = open_datagram(client, connect_to)
        if isinstance(way, sockets.Socket):
            return SocketSide(self, way, client, decision, connect_to)
        from tproxyd.relay.association import Association

        return Association(self, client, decision, way, lambda: cast("Opening", open_datagram(client, connect_to)))

    def _start(
        self, server_side: ServerSide, orig_dst: OrigDst, decision: Decision, *, invited: bool = True
    ) -> UdpFlow | None:
        """Start a flow; one that a stranger began (`invited` is False) never counts against its client's limit."""
        client = server_side.client
        flow = UdpFlow(self, server_side, orig_dst, decision, invited=invited)
        try:
            flow.open()
            if not server_side.flows:
                server_side.open()
        except OSError as error:
            flow.close()
            self.drop(f"no socket for {client}: {error}")
            return None
        if invited:
            self._limits.take(client.address)
        else:
            server_side.strangers += 1
        server_side.flows += 1
        if server_side.connected_to is None:
            self._server_sides[server_side.decision.backend, client] = server_side
        self._flows[client, orig_dst] = flow
        self.counters.udp_flows += 1
        self.counters.flows += 1
        return flow

    def refuse(self, client: Client, orig_dst: OrigDst, error: OSError) -> None:
        """Tell a client that its datagram went nowhere, by ICMP where `error` has one."""
        answer = icmp.from_errno(error.errno or 0, client.version)
        if answer:
            self.icmp.send(answer, Network.UDP, client, orig_dst, payload_bytes=0, now=self.poller.now)
        self.drop(f"no way from {client} to {orig_dst}: {error}")

    def _report(self, flow: UdpFlow, cause: Cause) -> None:
        if self._context.on_end is None:
            return
        try:
            source = flow.server_side.source(flow.orig_dst)
        except OSError:
            source = None  # no way there any more
        self._context.on_end(
            FlowEnd(
                flow=Flow(Network.UDP, flow.client, flow.orig_dst, self._context.listener),
                decision=flow.decision,
                layer=Layer.LEARNED if flow.learned else Layer.COPY,
                cause=cause,
                phase=Phase.RELAY,
                source=source,
                bytes_up=flow.bytes_up,
                bytes_down=flow.bytes_down,
                duration_s=flow.last - flow.started,
            )
        )

    def _tick(self) -> None:
        self._timer = self._context.loop.call_later(_TICK_S, self._tick)
        now = self.poller.now = monotonic()
        for flow in [flow for flow in self._flows.values() if flow.idle_s(now) >= self._idle_s]:
            self.end(flow, Cause.IDLE)


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
        for _ in range(_DATAGRAMS):
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
        for _ in range(_DATAGRAMS):
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
        for _ in range(_DATAGRAMS):
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
        for sock in (self._sock, _sock_of(self.server_side)):
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


def _deafen_server_sides(flows: list[UdpFlow]) -> None:
    for flow in flows:
        sock = _sock_of(flow.server_side)
        if flow.in_kernel and flow.server_side.connected_to is not None and sock is not None and sock.fileno() >= 0:
            sockets.deafen(sock)


def _sock_of(server_side: ServerSide) -> sockets.Socket | None:
    return server_side.sock if isinstance(server_side, SocketSide) else None
