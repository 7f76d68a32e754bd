"""What all UDP flows of a worker share: listeners, first datagrams, whose answer is whose, limits, expiry.

A flow has a client side of its own (`udp_flow`). Its server side (`server_side`) is shared by all flows of a client
endpoint, and anyone may answer (full cone), or is its own as well (symmetric).
"""

from __future__ import annotations

import errno
import logging
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from tproxyd.flow import (
    LOOPBACK,
    Action,
    Cause,
    Client,
    Decision,
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
from tproxyd.relay.poller import LEVEL
from tproxyd.relay.raw_udp import RawUdpSender
from tproxyd.relay.server_side import DATAGRAM_BYTES, DATAGRAMS_A_TURN, ServerSide
from tproxyd.relay.socket_side import SocketSide, sock_of
from tproxyd.relay.udp_flow import UdpFlow

if TYPE_CHECKING:
    from tproxyd.relay.opening import Opening

_log = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_LOG_EVERY_S: Final = 10.0
_STRANGERS: Final = 64
"""Flows that others may begin with one client endpoint (full cone), which would otherwise be theirs to exhaust."""
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
        for _ in range(DATAGRAMS_A_TURN):
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


def _deafen_server_sides(flows: list[UdpFlow]) -> None:
    for flow in flows:
        sock = sock_of(flow.server_side)
        if flow.in_kernel and flow.server_side.connected_to is not None and sock is not None and sock.fileno() >= 0:
            sockets.deafen(sock)
