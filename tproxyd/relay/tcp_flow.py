"""One TCP flow: connected, pumped, ended; it was accepted and decided upon in `tcp`.

An abnormal end closes sockets that linger for 0 seconds, which sends RST: that is the default, so that a killed
process resets its flows too. Only the orderly end, both directions shut down, takes it back.
"""

from __future__ import annotations

import errno
import select
import socket
from time import monotonic
from typing import TYPE_CHECKING, Final

from tproxyd.flow import Cause, Client, Decision, FlowEnd, Layer, Network, OrigDst, Phase
from tproxyd.relay import icmp, sockets
from tproxyd.relay.connect_errors import cause_of_failed_connect
from tproxyd.relay.pump import Direction, SinkReset, SourceReset

if TYPE_CHECKING:
    from tproxyd.relay.opening import Failure, Opening
    from tproxyd.relay.tcp import TcpRelay

_RESET_GRACE_S: Final = 2.0
_RESET_CHECK_S: Final = 0.02

_READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_CALM: Final = select.EPOLLIN | select.EPOLLOUT
"""An event that tells of data and of nothing else."""
_FAILED: Final = select.EPOLLERR | select.EPOLLHUP
_TOLD_BY_ICMP: Final = frozenset({Cause.UNREACHABLE, Cause.REJECTED})
"""A refusal is a reset and nothing else."""


class TcpFlow:
    """One relayed TCP connection: two sockets, two directions.

    Attributes:
        last: monotonic seconds of its last event.
        phase: how far it has come.
    """

    __slots__ = (
        "_calm",
        "_client_fd",
        "_client_side",
        "_decision",
        "_down",
        "_early",
        "_opening",
        "_relay",
        "_reset_until",
        "_server_side",
        "_started",
        "_up",
        "client",
        "last",
        "orig_dst",
        "phase",
    )

    def __init__(self, relay: TcpRelay, client_side: sockets.Socket, client: Client, orig_dst: OrigDst) -> None:
        """Take over an accepted socket."""
        self._relay = relay
        self._client_side = client_side
        self._client_fd = client_side.fileno()
        self._server_side: sockets.Socket | None = None
        self._opening: Opening | None = None
        self._calm = False
        self._decision: Decision | None = None
        self._up: Direction | None = None
        self._down: Direction | None = None
        self._early = 0
        self._reset_until = 0.0
        self.client = client
        self.orig_dst = orig_dst
        self.phase = Phase.ACCEPT
        self._started = self.last = relay.poller.now

    def open(self, decision: Decision) -> None:
        """Connect the server side as decided."""
        self._decision = decision
        self.phase = Phase.CONNECT
        relay = self._relay
        try:
            way = relay.context.backends[decision.backend].connect(self.client, self.orig_dst)
            if isinstance(way, sockets.Socket):
                self._server_side = way
            else:
                self._opening = way
            relay.started_connecting(self)
            relay.poller.register(self._client_fd, self)  # first: what it tells is known when the server answers
            if self._server_side is not None:
                relay.poller.register(self._server_side.fileno(), self)
            elif self._opening is not None:
                self._opening.start(self)
        except OSError as error:
            self._fail_to_connect(error.errno or 0)

    def opened(self, opening: Opening) -> None:
        """Take over a connection that proxies have led through to the server."""
        self._opening = None
        self._server_side = opening.sock
        self._relay.poller.hand_over(opening.sock.fileno(), self)
        self._connected(opening.sock, select.EPOLLIN, opening.trailing)

    def failed(self, failure: Failure) -> None:
        """End: proxies have not led through to the server."""
        self._fail(failure.cause, failure.code)

    def refuse(self, cause: Cause, decision: Decision | None = None) -> None:
        """Reset a flow that was never taken in: the handshake is over, so silence is no choice even for a `drop`."""
        self._decision = decision
        self._relay.poller.close_socket(self._client_side)
        self._report(cause)

    def on_event(self, fd: int, events: int) -> None:
        """Take an event of either socket."""
        self.last = self._relay.poller.now
        from_client = fd == self._client_fd
        if self._calm:
            incoming = self._up if from_client else self._down
            assert incoming is not None  # noqa: S101  # a calm flow has both
            if events == _CALM and incoming.pass_on():
                return
        self._on_event(events, from_client=from_client)
        self._settle()

    def _on_event(self, events: int, *, from_client: bool) -> None:
        if self not in self._relay.flows:
            return
        if self.phase is Phase.CONNECT:
            self._while_connecting(events, from_client=from_client)
            return
        if self._up is None or self._down is None:
            return
        incoming, outgoing = (self._up, self._down) if from_client else (self._down, self._up)
        if self._reset_until:
            self._flush(outgoing)
            return
        if events & select.EPOLLRDHUP:
            incoming.hangup = True
        if events & select.EPOLLPRI:
            incoming.urgent = True
        if outgoing.blocked and events & (select.EPOLLOUT | _FAILED) and not self._advance(outgoing):
            return
        if incoming.eof and events & select.EPOLLERR:
            self._reset_by(incoming)
        elif events & _READABLE and not incoming.blocked and not incoming.eof:
            self._advance(incoming)

    def _advance(self, direction: Direction) -> bool:
        """Move small pieces now, and much of a bulk transfer after everyone's small pieces."""
        if not direction.bulk:
            return self._move(direction)
        direction.blocked = False
        self._relay.poller.later(self)
        return True

    def _settle(self) -> None:
        """Find out whether the next event may take the quick way; a flow that has ended, or half, never is calm."""
        up, down = self._up, self._down
        self._calm = up is not None and down is not None and up.calm and down.calm and self in self._relay.flows

    @property
    def patient(self) -> bool:
        """A direction is told of much data only, and must be run for the rest."""
        return any(direction and direction.patient and not direction.blocked for direction in (self._up, self._down))

    def resume(self) -> None:
        """Go on after a turn that was cut short."""
        self.last = self._relay.poller.now
        self._resume()
        self._settle()

    def _resume(self) -> None:
        if self not in self._relay.flows or self._up is None or self._down is None or self._reset_until:
            return
        for direction in (self._up, self._down):
            if not direction.blocked and not direction.eof and not self._move(direction):
                return

    def abort(self, error: Exception) -> None:  # noqa: ARG002  # logged by the supervisor of flows
        """End after an unforeseen error."""
        self.end(Cause.ERROR)

    def end(self, cause: Cause) -> None:
        """Free everything; what is still open is reset, unless the cause is DONE."""
        relay = self._relay
        if self not in relay.flows:
            return
        relay.flows.discard(self)
        relay.connecting.pop(self, None)
        relay.context.limits.give_back(self.client.address)
        relay.counters.flows -= 1
        self._report(cause)
        if self._opening is not None:
            self._opening.cancel(cause)
        for side in (self._client_side, self._server_side):
            if side is not None:
                if cause is Cause.DONE:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, sockets.LINGER_OFF)
                relay.poller.close_socket(side)
        for direction in (self._up, self._down):
            if direction is not None:
                direction.release()

    def _while_connecting(self, events: int, *, from_client: bool) -> None:
        if from_client:
            self._early |= events
            if events & _FAILED:
                self.end(Cause.CLIENT_RESET)
            return
        assert self._server_side is not None  # noqa: S101  # registered after it was made
        if events & _FAILED:
            self._fail_to_connect(self._error_of(self._server_side.fileno()) or errno.ECONNREFUSED)
        elif events & select.EPOLLOUT:
            self._connected(self._server_side, events)

    def _connected(self, server_side: sockets.Socket, events: int, trailing: bytes = b"") -> None:
        relay = self._relay
        relay.connecting.pop(self, None)
        self.phase = Phase.RELAY
        self._up = Direction(self._client_side, server_side, relay.pipes)
        self._down = Direction(server_side, self._client_side, relay.pipes)
        self._up.hangup = bool(self._early & select.EPOLLRDHUP)
        self._up.urgent = bool(self._early & select.EPOLLPRI)
        self._down.hangup = bool(events & select.EPOLLRDHUP)
        if trailing:
            self._down.hold(trailing)
        waiting = self._up.pass_on() if self._up.calm else False
        if (waiting or self._move(self._up)) and events & _READABLE:
            self._move(self._down)

    def _move(self, direction: Direction) -> bool:
        """Run a direction; False if that ended the flow or began its reset."""
        try:
            finished = direction.run()
        except SourceReset:
            self._reset_by(direction)
            return False
        except SinkReset:
            direction.release()
            return self._sink_lost(self._other(direction))
        if direction.patient:
            self._relay.tails.watch(self)
        if not finished:
            self._relay.poller.later(self)
        elif direction.eof:
            other = self._other(direction)
            if other.eof:
                self.end(Cause.DONE)
                return False
            other.last = True
        return True

    def _sink_lost(self, incoming: Direction) -> bool:
        """A write found the peer gone: pass on what it sent before, then its reset."""
        if incoming.eof or incoming.source_lost:
            self._reset_by(incoming)
            return False
        incoming.source_lost = True
        return self._move(incoming)

    def _reset_by(self, incoming: Direction) -> None:
        """The source of `incoming` is gone: reset the other side, once it has what came before the reset."""
        if incoming.empty and not incoming.unacknowledged():
            self._end_by_reset(incoming)
            return
        if not self._reset_until:
            self._reset_until = self._relay.poller.now + _RESET_GRACE_S
            self._relay.poller.unregister(incoming.source.fileno())
            self._relay.context.loop.call_later(_RESET_CHECK_S, self._flush_before_reset, incoming)

    def _flush_before_reset(self, incoming: Direction) -> None:
        if self not in self._relay.flows:
            return
        waiting = self._flush(incoming) and (not incoming.empty or incoming.unacknowledged() > 0)
        if waiting and monotonic() < self._reset_until:
            self._relay.context.loop.call_later(_RESET_CHECK_S, self._flush_before_reset, incoming)
        else:
            self._end_by_reset(incoming)

    def _flush(self, direction: Direction) -> bool:
        try:
            direction.flush()
        except SinkReset:
            direction.release()
            return False
        return True

    def _end_by_reset(self, incoming: Direction) -> None:
        self.end(Cause.CLIENT_RESET if incoming is self._up else Cause.SERVER_RESET)

    def _fail_to_connect(self, code: int) -> None:
        self._fail(cause_of_failed_connect(code), code)

    def _fail(self, cause: Cause, code: int) -> None:
        """Tell the client as the network would; `code` is an errno, 0 for none."""
        relay = self._relay
        relay.counters.connect_failures += 1
        error = icmp.from_errno(code, self.client.version)
        if error and cause in _TOLD_BY_ICMP:
            relay.context.icmp.send(
                error, Network.TCP, self.client, self.orig_dst, payload_bytes=0, now=relay.poller.now
            )
        self.end(cause)
        relay.pause_if_exhausted(code)

    def _other(self, direction: Direction) -> Direction:
        other = self._down if direction is self._up else self._up
        assert other is not None  # noqa: S101  # both are made at once
        return other

    def _error_of(self, fd: int) -> int:
        side = self._client_side if fd == self._client_side.fileno() else self._server_side
        return side.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if side is not None else 0

    def _report(self, cause: Cause) -> None:
        relay = self._relay
        up, down = (d.total if d else 0 for d in (self._up, self._down))
        relay.counters.bytes_up += up
        relay.counters.bytes_down += down
        if relay.context.on_end is None:
            return
        source = None
        if self._server_side is not None and self.phase is Phase.RELAY:
            name = self._server_side.getsockname()
            source = Client(name[0], name[1])
        relay.context.on_end(
            FlowEnd(
                flow=relay.describe(self),
                decision=self._decision,
                layer=Layer.SPLICE if any(d and d.spliced for d in (self._up, self._down)) else Layer.COPY,
                cause=cause,
                phase=self._opening.phase if self._opening is not None else self.phase,
                source=source,
                bytes_up=up,
                bytes_down=down,
                duration_s=relay.poller.now - self._started,
            )
        )
