"""The policy's rules as far as the kernel can go by them; pure.

Nothing here knows nftables from iptables: both write down the same `KernelRule`s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import TYPE_CHECKING, Final

from tproxyd.flow import Action, Network
from tproxyd.policy import Rule

if TYPE_CHECKING:
    from tproxyd.config import PortRange

Prefix = IPv4Network | IPv6Network

_OWN: Final = "lo"
"""The interface that the box's own traffic comes in by, turned round."""


@dataclass(frozen=True, slots=True)
class RulePrefixes:
    """What a rule asks of an address, in one family; sorted, disjoint, in canonical form, at least one.

    Attributes:
        name: of the set in the kernel, where more than one prefix needs one. It stands for what is in it, so that
            rules which are being replaced never look into a set of their successors'.
    """

    version: int
    prefixes: tuple[str, ...]
    name: str


@dataclass(frozen=True, slots=True)
class KernelRule:
    """A rule for packets of new flows, which would be intercepted but for it.

    Attributes:
        action: None where a backend carries the flow: it is intercepted, and no later rule is asked.
        version: the family it is for; None where it asks for no address, and is for both.
        interfaces: those that the packet may come in by, `lo` for the box's own; none: any.
        by_worker: the kernel can't carry the action out: a worker is given the flow to do it.
    """

    name: str
    action: Action | None
    version: int | None = None
    networks: tuple[Network, ...] = ()
    interfaces: tuple[str, ...] = ()
    sources: RulePrefixes | None = None
    destinations: RulePrefixes | None = None
    source_ports: tuple[PortRange, ...] = ()
    ports: tuple[PortRange, ...] = ()
    by_worker: bool = False

    @property
    def client_interfaces(self) -> tuple[str, ...]:
        """Those that clients are behind."""
        return tuple(name for name in self.interfaces if name != _OWN)

    def concerns(self, *, own_traffic: bool) -> bool:
        """Tell whether it may take what the box itself sends, or else what clients do."""
        return not self.interfaces or bool(_OWN in self.interfaces if own_traffic else self.client_interfaces)


def kernel_rules(rule: Rule, versions: tuple[int, ...], listener: str) -> Iterator[KernelRule]:
    """Yield what a rule is in each family; nothing where it can take no flow that the kernel would intercept."""
    from tproxyd.config import PortRange  # whoever has rules has had pydantic

    match = rule.match
    if match.listeners and listener not in match.listeners:
        return
    for version in versions if match.sources or match.destinations else (None,):
        if _possible(match.sources, version) and _possible(match.destinations, version):
            yield KernelRule(
                name=rule.name,
                action=rule.decision.action,
                version=version,
                networks=match.networks,
                interfaces=match.interfaces,
                sources=_rule_prefixes(match.sources, version),
                destinations=_rule_prefixes(match.destinations, version),
                source_ports=tuple(PortRange(*ports) for ports in match.source_ports),
                ports=tuple(PortRange(*ports) for ports in match.ports),
            )


def with_refusals_left_to_workers(rules: Iterable[KernelRule]) -> Iterator[KernelRule]:
    """Yield the rules for a kernel that delivers to the box what it is to refuse.

    In the name of an address that is not its own it resets TCP, and answers UDP over IPv6; over IPv4 it sends no
    ICMP error at all (icmp_route_lookup finds no route from such a source). So the worker gets that, which can.
    """
    for rule in rules:
        over_ipv4 = rule.version in (None, 4) and (not rule.networks or Network.UDP in rule.networks)
        if rule.action is Action.REJECT and over_ipv4:
            yield replace(rule, version=4, networks=(Network.UDP,), by_worker=True)
        yield rule


def collapsed(prefixes: Iterable[Prefix]) -> tuple[str, ...]:
    """Return prefixes of one family as few as can be, in rising order, in canonical form."""
    return tuple(str(prefix) for prefix in collapse_addresses(prefixes))  # type: ignore[type-var]  # one version only


def as_asked(rule: KernelRule) -> dict[str, object]:
    """The rule as plain JSON values, without what it does not ask for; `relay` stands for all backends."""
    asked: dict[str, list[str]] = {
        "network": [str(network) for network in rule.networks],
        "interface": list(rule.interfaces),
        "source": list(rule.sources.prefixes) if rule.sources else [],
        "destination": list(rule.destinations.prefixes) if rule.destinations else [],
        "source_port": [str(ports) for ports in rule.source_ports],
        "port": [str(ports) for ports in rule.ports],
    }
    match = {key: values for key, values in asked.items() if values}
    return {"name": rule.name, "version": rule.version, "match": match, "action": str(rule.action or "relay")}


def _possible(asked: tuple[Prefix, ...], version: int | None) -> bool:
    return not asked or any(prefix.version == version for prefix in asked)


def _rule_prefixes(asked: tuple[Prefix, ...], version: int | None) -> RulePrefixes | None:
    """Return what is asked of an address of this family; None where any will do."""
    if version is None or not asked:
        return None
    prefixes = collapsed(prefix for prefix in asked if prefix.version == version)
    if prefixes[0].endswith("/0"):
        return None
    digest = hashlib.sha256(" ".join(prefixes).encode()).hexdigest()[:12]
    return RulePrefixes(version, prefixes, f"rule_v{version}_{digest}")
