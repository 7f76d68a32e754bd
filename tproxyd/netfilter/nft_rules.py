"""The policy's rules as lines of nftables chains (nft(8)); pure. Which chains, and where they hang, `nft` knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from tproxyd.flow import Action
from tproxyd.netfilter.rules import KernelRule, RulePrefixes

if TYPE_CHECKING:
    from tproxyd.config import PortRange

_ADDRESS: Final = {4: "ip", 6: "ip6"}


def rule_lines(
    rules: Iterable[KernelRule], refuse: str, *, own_traffic: bool, to_worker: Sequence[str] = ()
) -> list[str]:
    """Return a chain of regular rules, each with a counter and its name; a flow for a backend returns from it.

    Args:
        rules: in the policy's order.
        refuse: the statements that a refused packet gets.
        own_traffic: the chain is asked about what the box itself sends, which has come in by no interface.
        to_worker: what is done with a packet that a worker is to refuse, statement by statement.
    """
    verdicts = {Action.BYPASS: "accept", Action.DROP: "drop", Action.REJECT: refuse, None: "return"}
    return [
        f'{_asked(rule, own_traffic=own_traffic)}{verdict} comment "{rule.name}"'
        for rule in rules
        if rule.concerns(own_traffic=own_traffic)
        for verdict in (to_worker if rule.by_worker else [f"counter {verdicts[rule.action]}"])
    ]


def members(items: Iterable[object]) -> str:
    """Return a value, or several as an anonymous set."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else "{ " + ", ".join(texts) + " }"


def _asked(rule: KernelRule, *, own_traffic: bool) -> str:
    sides = [(rule.sources, "saddr"), (rule.destinations, "daddr")]
    conditions = [_side(prefixes, field) for prefixes, field in sides if prefixes is not None]
    if rule.version is not None and not conditions:
        conditions.append(f"meta nfproto ipv{rule.version}")
    if rule.client_interfaces and not own_traffic:
        conditions.append("iifname " + members(f'"{name}"' for name in rule.client_interfaces))
    return "".join(f"{condition} " for condition in (*conditions, *_transport(rule)))


def _side(prefixes: RulePrefixes, field: str) -> str:
    held = prefixes.prefixes
    return f"{_ADDRESS[prefixes.version]} {field} {held[0] if len(held) == 1 else f'@{prefixes.name}'}"


def _transport(rule: KernelRule) -> list[str]:
    """TCP and UDP have their ports at the same place; the chain is asked about nothing else."""
    one = str(rule.networks[0]) if len(rule.networks) == 1 else ""
    asked: list[tuple[str, tuple[PortRange, ...]]] = [("sport", rule.source_ports), ("dport", rule.ports)]
    ports = [f"{one or 'th'} {field} {members(ranges)}" for field, ranges in asked if ranges]
    return ports or ([f"meta l4proto {one}"] if one else [])
