"""What the relays of one worker share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tproxyd.flow import FlowEnd
from tproxyd.policy import Policy
from tproxyd.relay.backends.backend import Backend
from tproxyd.relay.counters import Counters, RuleCounters
from tproxyd.relay.icmp import IcmpSender
from tproxyd.relay.learning import Learning
from tproxyd.relay.limits import FlowLimits
from tproxyd.relay.poller import Poller


@dataclass(frozen=True, slots=True)
class Context:
    """Made once a worker.

    Attributes:
        listener: name of the listener that flows come in by.
        on_end: told of each flow's end; None where nobody listens.
        learning: where UDP flows are offered that the kernel could carry.
    """

    loop: asyncio.AbstractEventLoop
    poller: Poller
    policy: Policy
    backends: Mapping[str, Backend]
    limits: FlowLimits
    counters: Counters
    rule_counters: RuleCounters
    icmp: IcmpSender
    listener: str
    on_end: Callable[[FlowEnd], None] | None
    learning: Learning
