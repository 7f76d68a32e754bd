"""The policy's rules as iptables rules; pure. Which chains they stand in, and what leads there, `iptables` knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from tproxyd.flow import Action, Network
from tproxyd.netfilter.iptables_match import SET_PREFIX, Rule, port_matches
from tproxyd.netfilter.rules import KernelRule, RulePrefixes, with_refusals_left_to_workers

_WORKER: Final = "worker"


@dataclass(frozen=True, slots=True)
class Targets:
    """Where a chain of rules sends packets on.

    Attributes:
        relay: of a flow for a backend, and of what no rule takes.
        refuse: of a refused one.
        worker: of one that a worker is to refuse.
    """

    relay: Rule
    refuse: Rule
    worker: Rule


def rule_chain(rules: Iterable[KernelRule], version: int, targets: Targets, *, own_traffic: bool = False) -> list[Rule]:
    """Return a chain of TCP and UDP packets that would be intercepted; each rule bears its name as a comment.

    A flow that stays routed returns from the chain, which nothing may have jumped to but by `goto`.

    Args:
        rules: in the policy's order, both families'.
        version: the family the chain is for.
        targets: where it leads.
        own_traffic: the chain is asked about what the box itself sends, which has come in by no interface.
    """
    verdicts: dict[Action | str | None, Rule | str] = {
        _WORKER: targets.worker,
        Action.BYPASS: "RETURN",
        Action.DROP: "DROP",
        Action.REJECT: targets.refuse,
        None: targets.relay,
    }
    found: list[Rule] = [
        {
            **asked,
            "comment": {"comment": rule.name},
            "target": targets.worker if rule.by_worker else verdicts[rule.action],
        }
        for rule in with_refusals_left_to_workers(rules)
        if rule.version in (None, version) and rule.concerns(own_traffic=own_traffic)
        for asked in _asked(rule, own_traffic=own_traffic)
    ]
    return [*found, {"target": targets.relay}]


def _asked(rule: KernelRule, *, own_traffic: bool) -> Iterator[Rule]:
    """Yield the ways to match; more than one for several interfaces, for many ports, for ports of TCP and UDP."""
    incoming: list[Rule] = [{"in-interface": name} for name in rule.client_interfaces]
    sides = _sides(rule)
    for interface in [{}] if own_traffic or not incoming else incoming:
        for transport in _transports(rule):
            yield {**sides, **interface, **transport}


def _sides(rule: KernelRule) -> Rule:
    """Return the matches of the addresses: one prefix alone needs no set."""
    found: Rule = {}
    in_sets = []
    for prefixes, option, direction in ((rule.sources, "src", "src"), (rule.destinations, "dst", "dst")):
        if prefixes is not None and len(prefixes.prefixes) == 1:
            found[option] = prefixes.prefixes[0]
        elif prefixes is not None:
            in_sets.append(_in_set(prefixes, direction))
    if in_sets:
        found["set"] = in_sets if len(in_sets) > 1 else in_sets[0]
    return found


def _in_set(prefixes: RulePrefixes, direction: str) -> Rule:
    return {"match-set": [f"{SET_PREFIX}{prefixes.name}", direction]}


def _transports(rule: KernelRule) -> Iterator[Rule]:
    networks = rule.networks
    if not networks and not rule.source_ports and not rule.ports:
        yield {}
        return
    for network in networks or tuple(Network):
        for ports in port_matches(network, sport=rule.source_ports, dport=rule.ports):
            yield {"protocol": str(network), **ports}
