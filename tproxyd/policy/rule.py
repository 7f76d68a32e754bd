"""A rule as values: what it asks of a flow, and what becomes of a flow that answers. No configuration, no kernel.

Also the naive evaluator, one flow against one rule: what every faster form has to agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from tproxyd.flow import Action, Decision, Endpoint, Flow, Network

Prefix = IPv4Network | IPv6Network
Ports = tuple[int, int]
"""The first and the last port of a range, both included."""

DEFAULT: Final = "default"
"""The name under which flows that no rule takes are logged and counted."""


class Field(StrEnum):
    """What a rule can ask for, as the configuration names it."""

    NETWORK = "network"
    INTERFACE = "interface"
    LISTENER = "listener"
    SOURCE = "source"
    DESTINATION = "destination"
    SOURCE_PORT = "source_port"
    PORT = "port"


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule asks of a flow: all fields that are not empty, of each any one value."""

    networks: tuple[Network, ...] = ()
    interfaces: tuple[str, ...] = ()
    listeners: tuple[str, ...] = ()
    sources: tuple[Prefix, ...] = ()
    destinations: tuple[Prefix, ...] = ()
    source_ports: tuple[Ports, ...] = ()
    ports: tuple[Ports, ...] = ()

    def failing(self, flow: Flow) -> Field | None:
        """Return the first field that this flow does not answer to, None if the rule takes it; slow and plain."""
        asked = (
            (Field.NETWORK, self.networks, flow.network in self.networks),
            (Field.INTERFACE, self.interfaces, flow.interface in self.interfaces),
            (Field.LISTENER, self.listeners, flow.listener in self.listeners),
            (Field.SOURCE, self.sources, holds(self.sources, flow.client)),
            (Field.DESTINATION, self.destinations, holds(self.destinations, flow.orig_dst)),
            (Field.SOURCE_PORT, self.source_ports, _spans(self.source_ports, flow.client.port)),
            (Field.PORT, self.ports, _spans(self.ports, flow.orig_dst.port)),
        )
        return next((field for field, values, answered in asked if values and not answered), None)


@dataclass(frozen=True, slots=True)
class Rule:
    """A match, and the decision for the flows that it takes; the decision bears the rule's name."""

    match: Match
    decision: Decision

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.decision.rule


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules in their order, and the last word.

    Attributes:
        default: name of the backend for flows that no rule takes.
    """

    rules: tuple[Rule, ...]
    default: str

    @property
    def last_word(self) -> Decision:
        """The decision for flows that no rule takes."""
        return Decision(rule=DEFAULT, backend=self.default)

    @property
    def names(self) -> tuple[str, ...]:
        """The rules' names in their order, then that of the last word."""
        return (*(rule.name for rule in self.rules), DEFAULT)

    def until_packets_do_not_tell(self) -> tuple[Rule, ...]:
        """Return the rules that whoever sees only packets can go by, in their order: layer 0.

        They end with the last one that needs no backend. What stands behind it, only a worker can carry out.
        Every field that there is today can be read off a packet, so this takes rules for backends in, too: the
        kernel must know which flows they take away from the rules behind them.
        """
        last = max((number for number, rule in enumerate(self.rules, 1) if rule.decision.action), default=0)
        return self.rules[:last]


def decide_naively(rules: Rules, flow: Flow) -> Decision:
    """First match wins, rule by rule."""
    taken = (rule.decision for rule in rules.rules if rule.match.failing(flow) is None)
    return next(taken, rules.last_word)


def refusal(decision: Decision) -> Action | None:
    """Return what is done with a flow that nobody carries; None where one does."""
    return decision.action if decision.action in (Action.REJECT, Action.DROP) else None


def holds(prefixes: Sequence[Prefix], end: Endpoint) -> bool:
    """Tell whether an address lies in one of the prefixes; those of the other family hold none of this one."""
    address = ip_address(end.address)
    return any(address in prefix for prefix in prefixes)


def _spans(ranges: Sequence[Ports], port: int) -> bool:
    return any(first <= port <= last for first, last in ranges)
