"""What all TCP flows of a worker share: listeners, the decision about each flow, limits, timeouts."""

from __future__ import annotations

import errno
import logging
from time import monotonic
from typing import Final

from tproxyd.flow import LOOPBACK, Action, Cause, Client, Decision, Flow, Network, OrigDst
from tproxyd.policy import refusal
from tproxyd.relay import sockets
from tproxyd.relay.connect_errors import EXHAUSTED
from tproxyd.relay.context import Context
from tproxyd.relay.pipes import PipePool
from tproxyd.relay.poller import LEVEL
from tproxyd.relay.tails import Tails
from tproxyd.relay.tcp_flow import TcpFlow

_log = logging.getLogger(__name__)

_ACCEPTS: Final = 64
_PAUSE_S: Final = 0.1
_TICK_S: Final = 0.25
_SWEEPS_PER_IDLE: Final = 16
_GONE: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR, errno.ETIMEDOUT})
"""accept(2): the client left before it was accepted, or the firewall said no; the next one may be fine."""
_CAUSE_OF_REFUSAL: Final = {Action.REJECT: Cause.REJECTED, Action.DROP: Cause.DROPPED}


class TcpRelay:
    """All TCP flows of a worker."""

    def __init__(self, context: Context, *, connect_s: float, idle_s: float) -> None:
        """Args: connect_s, idle_s: how long a flow may take to connect, and be silent."""
        self.context = context
        self.poller = context.poller
        self.counters = context.counters
        self.pipes = PipePool()
        self.tails = Tails(context.loop, context.poller)
        self.flows: set[TcpFlow] = set()
        self.connecting: dict[TcpFlow, float] = {}
        self._listeners: dict[int, sockets.Socket] = {}
        self._paused = False
        self._connect_s = connect_s
        self._idle_s = idle_s
        self._next_sweep = 0.0
        self._timer = context.loop.call_later(_TICK_S, self._tick)

    def listen(self, listener: sockets.Socket) -> None:
        """Take flows in from a listening socket, which is then owned here."""
        if self.context.policy.asks_interface:
            sockets.ask_interface(listener)
        self._listeners[listener.fileno()] = listener
        self.poller.register(listener.fileno(), self, LEVEL)

    def stop_listening(self) -> None:
        """Take nothing new; running flows go on."""
        for listener in self._listeners.values():
            self.poller.close_socket(listener)
        self._listeners.clear()

    def close(self) -> None:
        """End all flows with a reset and free everything."""
        self.stop_listening()
        self._timer.cancel()
        self.tails.close()
        for flow in list(self.flows):
            flow.end(Cause.SHUTDOWN)
        self.pipes.close()

    def on_event(self, fd: int, events: int) -> None:  # noqa: ARG002  # a listener has one event
        """Accept what is waiting, but let others have their turn."""
        listener = self._listeners.get(fd)
        if listener is None:
            return
        for _ in range(_ACCEPTS):
            try:
                client_side, peer = sockets.accept(listener)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    continue
                self._pause(error)
                return
            self._take(client_side, Client(peer[0], peer[1]))
            if self._paused:
                return

    def abort(self, error: Exception) -> None:
        """Nothing to end: accepting goes on, `error` has been logged."""

    def _take(self, client_side: sockets.Socket, client: Client) -> None:
        try:
            name = client_side.getsockname()
        except OSError:
            client_side.close()
            return
        orig_dst = OrigDst(name[0], name[1])
        flow = TcpFlow(self, client_side, client, orig_dst)
        if orig_dst.address == LOOPBACK[orig_dst.version]:
            self.counters.refused_loop += 1
            flow.refuse(Cause.LOOP)
            return
        decision = self._decide(client_side, client, orig_dst)
        if (action := refusal(decision)) is not None:
            self.context.rule_counters[decision.rule] += 1
            flow.refuse(_CAUSE_OF_REFUSAL[action], decision)
        elif not self.context.limits.take(client.address):
            self.counters.refused_limit += 1
            flow.refuse(Cause.LIMIT)
        else:
            self.context.rule_counters[decision.rule] += 1
            self.counters.tcp_flows += 1
            self.counters.flows += 1
            self.flows.add(flow)
            flow.open(decision)

    def _decide(self, client_side: sockets.Socket, client: Client, orig_dst: OrigDst) -> Decision:
        context = self.context
        interface = sockets.interface_of_connection(client_side) if context.policy.asks_interface else ""
        return context.policy.decide(Flow(Network.TCP, client, orig_dst, context.listener, interface))

    def describe(self, flow: TcpFlow) -> Flow:
        """Return the flow for its log line."""
        return Flow(Network.TCP, flow.client, flow.orig_dst, self.context.listener)

    def started_connecting(self, flow: TcpFlow) -> None:
        """Bound how long a flow may take to connect."""
        self.connecting[flow] = self.poller.now + self._connect_s

    def pause_if_exhausted(self, code: int) -> None:
        """Stop accepting for a moment when descriptors or memory ran out."""
        if code in EXHAUSTED and not self._paused:
            self._pause(OSError(code, "opening a server-side socket"))

    def _pause(self, error: OSError) -> None:
        self.counters.accept_pauses += 1
        self._paused = True
        _log.warning("accepting no TCP flows for %.1f s: %s", _PAUSE_S, error)
        for fd in self._listeners:
            self.poller.unregister(fd)
        self.context.loop.call_later(_PAUSE_S, self._resume_accepting)

    def _resume_accepting(self) -> None:
        self._paused = False
        for fd in self._listeners:
            self.poller.register(fd, self, LEVEL)

    def _tick(self) -> None:
        self._timer = self.context.loop.call_later(_TICK_S, self._tick)
        now = self.poller.now = monotonic()
        while self.connecting:
            flow, deadline = next(iter(self.connecting.items()))
            if deadline > now:
                break
            self.counters.connect_failures += 1
            flow.end(Cause.TIMED_OUT)
        if now >= self._next_sweep:
            self._next_sweep = now + max(_TICK_S, self._idle_s / _SWEEPS_PER_IDLE)
            for flow in [flow for flow in self.flows if now - flow.last > self._idle_s]:
                flow.end(Cause.IDLE)
