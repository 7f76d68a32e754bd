"""A worker: relays flows from the listening sockets it was handed, as its own user with the rights it needs.

`python -m tproxyd.daemon.worker CHANNEL POLICY tcp:FD udp:FD ...`: CHANNEL is a SOCK_SEQPACKET socket to the
supervisor. Its first message are the settings; then the supervisor asks, and the worker answers in JSON. POLICY is
a file that holds the packed rules, which may be larger than any message. When
the supervisor is gone, the worker takes nothing new and ends with its last flow.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import replace
from typing import Any, Final

from tproxyd.daemon.log import log_flow_end, set_up_logging
from tproxyd.daemon.privileges import drop_to, raise_descriptor_limit
from tproxyd.errors import TproxydError
from tproxyd.flow import Action, Client, FlowKey, OrigDst
from tproxyd.policy import Policy
from tproxyd.relay.backends.make import make_backends
from tproxyd.relay.context import Context
from tproxyd.relay.counters import Counters, RuleCounters
from tproxyd.relay.icmp import IcmpSender
from tproxyd.relay.learning import Learning
from tproxyd.relay.limits import FlowLimits
from tproxyd.relay.poller import Poller
from tproxyd.relay.settings import MESSAGE_BYTES, DirectSettings, RelaySettings
from tproxyd.relay.sockets import Socket
from tproxyd.relay.tcp import TcpRelay
from tproxyd.relay.udp import UdpRelay

_ORPHAN_CHECK_S: Final = 1.0
_LIKE_ROUTED: Final = DirectSettings(source="four-tuple", nat="full-cone")
"""How a flow is carried that a rule bypasses, where it has come to a worker all the same."""
_log = logging.getLogger(__name__)


def _with_bypass(settings: RelaySettings) -> RelaySettings:
    return replace(settings, backends={**settings.backends, Action.BYPASS: _LIKE_ROUTED})


class Worker:
    """Everything a worker owns, put together."""

    def __init__(
        self, settings: RelaySettings, policy: Policy, channel: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Build the relays; `serve` starts them."""
        self._loop = loop
        self._channel = channel
        self._done = loop.create_future()
        self._counters = Counters()
        self._rule_counters = RuleCounters(policy.names)
        self._poller = Poller(loop, self._counters)
        self._icmp = IcmpSender(settings.client_mark, self._counters)
        context = Context(
            loop=loop,
            poller=self._poller,
            policy=policy,
            backends=make_backends(_with_bypass(settings), loop, self._poller, self._counters),
            limits=FlowLimits(settings.max_flows, settings.max_flows_per_client),
            counters=self._counters,
            rule_counters=self._rule_counters,
            icmp=self._icmp,
            listener=settings.listener,
            on_end=log_flow_end if settings.log_flows else None,
            learning=Learning(loop, self._offer),
        )
        self._learning = context.learning
        self._tcp = TcpRelay(context, connect_s=settings.connect_s, idle_s=settings.tcp_idle_s)
        self._udp = UdpRelay(context, idle_s=settings.udp_idle_s, client_mark=settings.client_mark)

    async def serve(self, listeners: list[tuple[str, Socket]]) -> None:
        """Relay until told to stop, or until orphaned and idle."""
        for network, listener in listeners:
            (self._tcp if network == "tcp" else self._udp).listen(listener)
        self._loop.add_reader(self._channel.fileno(), self._on_message)
        self._tell({"ready": True})
        try:
            await self._done
        finally:
            self._tcp.close()
            self._udp.close()
            self._icmp.close()
            self._poller.close()

    def _on_message(self) -> None:
        try:
            message = self._channel.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._orphaned()
            return
        told = json.loads(message)
        match told["do"]:
            case "count":
                self._learning.versions = frozenset(told["learn"])
                # Without the names: with thousands of rules they would fill more than a message.
                self._tell({"counters": self._counters.as_dict(), "rules": list(self._rule_counters.values())})
            case "learned":
                self._udp.leave_to_kernel([_key(*flow) for flow in told["flows"]])
            case "returned":
                for *key, bytes_up, bytes_down, silent_s in told["flows"]:
                    self._udp.take_back(_key(*key), bytes_up=bytes_up, bytes_down=bytes_down, silent_s=silent_s)
            case "stop" if not self._done.done():
                self._done.set_result(None)

    def _offer(self, flows: list[FlowKey]) -> None:
        self._tell({"learn": [[*flow.client, *flow.orig_dst] for flow in flows]})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._channel.send(json.dumps(message).encode())
        except OSError:
            _log.debug("the supervisor does not listen")

    def _orphaned(self) -> None:
        self._loop.remove_reader(self._channel.fileno())
        _log.error("the supervisor is gone: taking nothing new, ending with the last of %d flows", self._counters.flows)
        self._tcp.stop_listening()
        self._udp.stop_listening()
        self._learning.versions = frozenset()
        self._udp.take_all_back()
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        if self._counters.flows:
            self._loop.call_later(_ORPHAN_CHECK_S, self._end_when_idle)
        elif not self._done.done():
            self._done.set_result(None)


def _key(client: str, client_port: int, server: str, server_port: int) -> FlowKey:
    return FlowKey(Client(client, client_port), OrigDst(server, server_port))


def main(arguments: list[str]) -> int:
    """Run a worker; see the module."""
    import uvloop

    channel = socket.socket(fileno=int(arguments[0]))
    listeners: list[tuple[str, Socket]] = []
    for argument in arguments[2:]:
        network, _, fd = argument.partition(":")
        listeners.append((network, Socket(fileno=int(fd))))
    settings = RelaySettings.from_json(channel.recv(MESSAGE_BYTES))
    channel.setblocking(False)
    for _, listener in listeners:
        listener.setblocking(False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they may go to the whole group: the supervisor decides
    raise_descriptor_limit()
    try:
        drop_to(settings.user)
    except TproxydError as error:
        channel.send(json.dumps({"failed": str(error)}).encode())
        return 1
    policy = Policy(_content(int(arguments[1])))
    set_up_logging(settings.log_level, settings.log_format)  # its thread must not keep what this one gave up

    async def serve() -> None:
        gc.freeze()
        await Worker(settings, policy, channel, asyncio.get_running_loop()).serve(listeners)

    uvloop.run(serve())
    return 0


def _content(file: int) -> bytes:
    """Read a file that other workers read, too, each from its beginning."""
    return os.pread(file, os.fstat(file).st_size, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
