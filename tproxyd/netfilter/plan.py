"""What the kernel has to be told: a pure step from the configuration to a `Ruleset`.

Nothing here knows nftables from iptables; both renderers read the same `Ruleset`, and what they share (what is
never intercepted, which packets count) stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import reduce
from ipaddress import IPv4Network, IPv6Network, ip_network
from operator import or_
from typing import TYPE_CHECKING, Final, Literal

from tproxyd.flow import Action, Network
from tproxyd.netfilter.rules import KernelRule, RulePrefixes, as_asked, collapsed, kernel_rules
from tproxyd.policy import Field, Rules
from tproxyd.policy.explain import Surroundings

if TYPE_CHECKING:  # who only removes rules, or renews a lease, needs no pydantic
    from tproxyd.config import Config, Mark, PortRange

Prefix = IPv4Network | IPv6Network

NEVER_DESTINATIONS: Final = {
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    6: ("::/127", "fe80::/10", "ff00::/8"),
}
"""Loopback, link-local, multicast and reserved: they can't be relayed (RFC 6890), so they stay in the kernel."""

NEVER_SOURCES: Final = {
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16"),
    6: ("::/127", "fe80::/10"),
}
"""Clients without a routable address (DHCP, link-local): a spoofed answer could not be sent."""

INBOUND_S: Final = 180
"""How long a UDP flow that came from the other side is remembered after its last packet (as conntrack's streams)."""

LEARNED_IDLE_S: Final = 25
"""How long a learned flow may be silent: less than conntrack keeps a UDP entry, so that a packet that the kernel
forwards always finds the one that the relay's packets made, and the NAT mapping in it."""

LEARNED_MOST: Final = 16384
"""Learned flows of one family at most: each takes five set elements, about 1 kB of the kernel's memory."""

LEASE_S: Final = 5
"""How long an open gateway goes on intercepting after its daemon has stopped renewing the lease."""


@dataclass(frozen=True, slots=True)
class PrefixSet:
    """Excluded prefixes of one family; sorted, disjoint, in canonical form."""

    field: Literal["destination", "source"]
    version: int
    prefixes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The set's name in the kernel."""
        return f"excluded_{self.field}_v{self.version}"


@dataclass(frozen=True, slots=True)
class Intercept:
    """New flows of one transport and family that go to the listener.

    Attributes:
        address: the loopback address the listener is bound to.
        ports: destination ports, sorted and disjoint.
    """

    network: Network
    version: int
    ports: tuple[PortRange, ...]
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Learned:
    """How much of UDP the kernel may carry on by itself.

    Attributes:
        flows: how many flows of one family at most.
        idle_s: how long one may be silent.
    """

    flows: int
    idle_s: int


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything the netfilter back ends and policy routing need to know.

    Attributes:
        rules: what the kernel itself can decide of the policy, in its order.
        lease: interception holds only while the daemon renews its lease (`on_failure: open`).
        learned: UDP flows that need the daemon no longer are forwarded by the kernel; None: they never are.
        mark: set on packets that the kernel hands to tproxyd; policy routing delivers them locally.
        client_mark: SO_MARK of client-side sockets; their packets stay out of connection tracking, because
            with the same four-tuple on both sides two connections would share one entry. As the mark of a tracked
            connection it therefore means the opposite: a client's, that was let by.
        server_mark: SO_MARK of server-side sockets.
    """

    interfaces: tuple[str, ...]
    versions: tuple[int, ...]
    excluded: tuple[PrefixSet, ...]
    intercepts: tuple[Intercept, ...]
    own_traffic: bool
    lease: bool
    learned: Learned | None
    mark: Mark
    client_mark: Mark
    server_mark: Mark
    route_table: int
    rule_priority: int
    rules: tuple[KernelRule, ...] = ()

    @property
    def prefix_sets(self) -> tuple[PrefixSet | RulePrefixes, ...]:
        """All sets of prefixes."""
        return (*self.excluded, *self.rule_sets)

    @property
    def rule_sets(self) -> tuple[RulePrefixes, ...]:
        """The sets that rules look into; a prefix alone needs none."""
        asked = (each for rule in self.rules for each in (rule.sources, rule.destinations))
        return tuple(dict.fromkeys(each for each in asked if each is not None and len(each.prefixes) > 1))

    @property
    def refuses(self) -> bool:
        """Whether some rule is answered with a reset or an ICMP error."""
        return any(rule.action is Action.REJECT for rule in self.rules)

    @property
    def refusal_mark(self) -> Mark:
        """Set on packets that the box is to refuse. No other packet bears all three: a socket has one mark or other."""
        marks = (self.mark, self.client_mark, self.server_mark)
        value, mask = (reduce(or_, each) for each in zip(*((mark.value, mark.mask) for mark in marks), strict=True))
        return replace(self.mark, value=value, mask=mask)


def plan(config: Config) -> Ruleset:
    """Turn a configuration into what the kernel has to be told."""
    wanted = config.interception
    versions = tuple(sorted({"ipv4": 4, "ipv6": 6}[family] for family in wanted.families))
    port = config.listeners[0].port
    networks = ((Network.TCP, wanted.tcp_ports), (Network.UDP, wanted.udp_ports))
    return Ruleset(
        interfaces=tuple(sorted(wanted.interfaces)),
        versions=versions,
        excluded=tuple(
            prefix_set
            for version in versions
            for prefix_set in (
                _prefix_set("destination", version, NEVER_DESTINATIONS, wanted.exclude.destinations),
                _prefix_set("source", version, NEVER_SOURCES, wanted.exclude.sources),
            )
        ),
        intercepts=tuple(
            Intercept(network, version, ports, {4: "127.0.0.1", 6: "::1"}[version], port)
            for version in versions
            for network, ports in networks
            if ports
        ),
        own_traffic=wanted.own_traffic,
        lease=wanted.on_failure == "open",
        learned=_learned(config),
        mark=wanted.mark,
        client_mark=wanted.client_mark,
        server_mark=wanted.server_mark,
        route_table=wanted.route_table,
        rule_priority=wanted.rule_priority,
        rules=tuple(
            kernel_rule
            for rule in rules_of(config).until_packets_do_not_tell()
            for kernel_rule in kernel_rules(rule, versions, config.listeners[0].name)
        ),
    )


def rules_of(config: Config) -> Rules:
    """Return the policy of a configuration."""
    from tproxyd.config import policy_rules  # whoever has a Config has pydantic

    return Rules(policy_rules(config.rules), config.default)


def surroundings(ruleset: Ruleset, config: Config) -> Surroundings:
    """Return what decides before the policy, for `explain`."""
    excluded: dict[Field, tuple[Prefix, ...]] = {}
    for prefix_set in ruleset.excluded:
        field = Field(prefix_set.field)
        excluded[field] = (*excluded.get(field, ()), *map(ip_network, prefix_set.prefixes))
    return Surroundings(
        interfaces=ruleset.interfaces,
        own_traffic=ruleset.own_traffic,
        ports={
            (each.network, each.version): tuple((ports.first, ports.last) for ports in each.ports)
            for each in ruleset.intercepts
        },
        excluded=excluded,
        kernel_refuses_udp4=config.interception.ruleset == "nftables",
        learned=frozenset(_forwardable(config)) if ruleset.learned else frozenset(),
        without_udp=frozenset(
            name
            for name, backend in config.backends.items()
            if backend.type == "http_connect" or (backend.type == "socks5" and backend.via is not None)
        ),
    )


def _forwardable(config: Config) -> Iterator[str]:
    """Yield the backends whose flows look the same to the server when the kernel forwards them."""
    for name, backend in config.backends.items():
        if backend.type == "direct" and backend.source == "four-tuple":
            yield name


def _learned(config: Config) -> Learned | None:
    """Only a flow that looks the same to the server when it is forwarded can be learned."""
    wanted = config.interception
    if not (wanted.learned_flows and wanted.udp_ports and any(_forwardable(config))):
        return None
    idle_s = max(1, min(int(config.timeouts.udp_idle), LEARNED_IDLE_S))
    return Learned(min(config.limits.max_flows, LEARNED_MOST), idle_s)


def _prefix_set(
    field: Literal["destination", "source"],
    version: int,
    never: dict[int, tuple[str, ...]],
    configured: Iterable[Prefix],
) -> PrefixSet:
    prefixes = [ip_network(prefix) for prefix in never[version]]
    prefixes += [prefix for prefix in configured if prefix.version == version]
    return PrefixSet(field, version, collapsed(prefixes))


def as_json(ruleset: Ruleset) -> dict[str, object]:
    """The ruleset as plain JSON values; marks and ports as they are written in the configuration."""
    return {
        "interfaces": list(ruleset.interfaces),
        "excluded": {prefix_set.name: list(prefix_set.prefixes) for prefix_set in ruleset.excluded},
        "intercept": [
            {
                "network": str(intercept.network),
                "version": intercept.version,
                "ports": [str(ports) for ports in intercept.ports],
                "listener": {"address": intercept.address, "port": intercept.port},
            }
            for intercept in ruleset.intercepts
        ],
        "rules": [as_asked(rule) for rule in ruleset.rules],
        "own_traffic": ruleset.own_traffic,
        "on_failure": "open" if ruleset.lease else "closed",
        "learned": asdict(ruleset.learned) if ruleset.learned else None,
        "mark": str(ruleset.mark),
        "client_mark": str(ruleset.client_mark),
        "server_mark": str(ruleset.server_mark),
        "route_table": ruleset.route_table,
        "rule_priority": ruleset.rule_priority,
    }
