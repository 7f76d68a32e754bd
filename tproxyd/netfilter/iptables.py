"""The `Ruleset` as iptables rules and ipsets (iptables-extensions(8), ipset(8)); pure.

It means what `nft` means. The shape differs because xt TPROXY works only in table mangle and `CT --notrack`
only in table raw: raw finds out which packets are ours and marks them, mangle hands marked ones to the listener.

Rules are dictionaries in the form of python-iptables' `iptc.easy`; the order of their keys is the order of the
matches. `line` writes one as iptables-save does, so that two rules are equal when their lines are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tproxyd.flow import Network
from tproxyd.netfilter.iptables_match import SET_PREFIX, Rule, port_matches, shown
from tproxyd.netfilter.iptables_rules import Targets, rule_chain
from tproxyd.netfilter.plan import INBOUND_S, Intercept, PrefixSet, Ruleset

if TYPE_CHECKING:
    from tproxyd.config import Mark

CHAIN_PREFIX: Final = "TPROXYD"

TABLES: Final = ("filter", "mangle", "raw")
"""Those that some ruleset has something in."""

MAX_PREFIXES: Final = 1 << 20
"""The kernel's own default for a set is 65,536."""

MAX_EXPIRING: Final = 1 << 16

HALVES: Final = {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}
"""All addresses: hash:net has no prefix of length 0."""

_EVERYTHING: Final = {"0.0.0.0/0": HALVES[4], "::/0": HALVES[6]}
_SYN: Final = ("FIN,SYN,RST,ACK", "SYN")
_OUR_SOCKET: Final = {"transparent": ""}
"""xt_socket passes over sockets bound to all addresses (as nft's `wildcard 0`) unless `--nowildcard` is given."""

_BASIC: Final = {
    "src": "-s",
    "dst": "-d",
    "in-interface": "-i",
    "out-interface": "-o",
    "protocol": "-p",
}


@dataclass(frozen=True, slots=True)
class IpSet:
    """A set.

    Attributes:
        timeout_s: members expire, after so long unless they say otherwise; which ones there are is then no part
            of the ruleset. None: they stay.
        kind: its type, as ipset names it.
    """

    name: str
    version: int
    prefixes: tuple[str, ...]
    timeout_s: int | None = None
    kind: str = "hash:net"

    @property
    def max_members(self) -> int:
        """How many members it takes: what outsiders can fill stays small."""
        return MAX_PREFIXES if self.timeout_s is None else MAX_EXPIRING


@dataclass(frozen=True, slots=True)
class Table:
    """What is ours in one table: whole chains, and rules at the head of others' chains that lead to them."""

    jumps: dict[str, list[Rule]]
    chains: dict[str, list[Rule]]


Tables = dict[str, Table]
"""By the table's name, in the order of writing: the others must stand before raw marks packets for them."""


def ip_sets(ruleset: Ruleset) -> tuple[IpSet, ...]:
    """Return the sets that the rules look into."""
    excluded = [
        IpSet(_set_name(prefix_set), prefix_set.version, tuple(_without_zero_length(prefix_set.prefixes)))
        for prefix_set in ruleset.excluded
    ]
    asked = [IpSet(f"{SET_PREFIX}{each.name}", each.version, each.prefixes) for each in ruleset.rule_sets]
    versions = ruleset.versions if ruleset.lease else ()
    leases = [IpSet(lease_name(version), version, (), timeout_s=0) for version in versions]
    inbound = [
        IpSet(_inbound_name(version), version, (), timeout_s=INBOUND_S, kind="hash:ip,port,ip")
        for version in _inbound_versions(ruleset)
    ]
    return (*excluded, *asked, *leases, *inbound)


def lease_name(version: int) -> str:
    """Return the name of the set that holds all addresses of this family while the lease runs."""
    return f"{SET_PREFIX}lease_v{version}"


def tables(ruleset: Ruleset, version: int) -> Tables:
    """Return what one family needs; nothing where the ruleset leaves the family out."""
    if version not in ruleset.versions:
        return {name: Table({}, {}) for name in TABLES}
    return {
        "filter": _filter(ruleset, version),
        "mangle": _mangle(ruleset, version),
        "raw": _raw(ruleset, version),
    }


def render(ruleset: Ruleset) -> str:
    """Return all of it as text, for people and for a box that holds none of it yet.

    Each section is the input of the command in the comment above it. Loading it twice would jump twice.
    """
    sections = ["# ipset restore\n", *(set_text(ip_set) for ip_set in ip_sets(ruleset))]
    for version in ruleset.versions:
        sections.append(f"# {command(version)}-restore --noflush\n")
        for name, table in tables(ruleset, version).items():
            if not table.chains:
                continue
            sections += ["".join(f"{text}\n" for text in (f"*{name}", *_restore_lines(table), "COMMIT"))]
    return "".join(sections)


def command(version: int) -> str:
    """Return the name under which operators know a family's rules."""
    return {4: "iptables", 6: "ip6tables"}[version]


def set_text(ip_set: IpSet) -> str:
    """Return a set as `ipset restore` reads it."""
    family = {4: "inet", 6: "inet6"}[ip_set.version]
    timeout = "" if ip_set.timeout_s is None else f" timeout {ip_set.timeout_s}"
    create = f"create {ip_set.name} {ip_set.kind} family {family} maxelem {ip_set.max_members}{timeout}\n"
    return create + "".join(f"add {ip_set.name} {prefix}\n" for prefix in ip_set.prefixes)


def lines(name: str, table: Table) -> list[str]:
    """Return a table as iptables-save shows it, our share only, the chains in the order of their names."""
    if not table.jumps and not table.chains:
        return []
    shown = [f"*{name}", *(f":{chain} - [0:0]" for chain in sorted(table.chains))]
    for chains in (table.jumps, table.chains):
        shown += [f"-A {chain} {line(rule)}" for chain, rules in sorted(chains.items()) for rule in rules]
    return shown


def line(rule: Rule) -> str:
    """Return a rule as iptables-save writes it, without the chain."""
    words = [f"{_negated(rule[key], option)}" for key, option in _BASIC.items() if key in rule]
    for name, parameters in rule.items():
        if name in {*_BASIC, "target", "counters"}:
            continue
        repeated = parameters if isinstance(parameters, list) else [parameters]
        words += [f"-m {name}{_options(each)}" for each in repeated]
    target = rule.get("target", "")
    if isinstance(target, str):
        return " ".join([*words, f"-j {target}"] if target else words)
    ((name, parameters),) = target.items()
    return " ".join([*words, f"-g {parameters}" if name == "goto" else f"-j {name}{_options(parameters)}"])


def _restore_lines(table: Table) -> Iterator[str]:
    yield from (f":{chain} - [0:0]" for chain in table.chains)
    for chain, rules in table.chains.items():
        yield from (f"-A {chain} {line(rule)}" for rule in rules)
    for chain, rules in table.jumps.items():
        yield from (f"-I {chain} {place} {line(rule)}" for place, rule in enumerate(rules, 1))


def _raw(ruleset: Ruleset, version: int) -> Table:
    """Before connection tracking: which packets are on the client side.

    As in `nft`: a SYN never counts as a packet of a socket left in TIME_WAIT, nor UDP as one of a socket that
    is being connected, and what is not known to be on the server side is on the client side. xt_socket can't
    compare a socket's mark without copying it over the packet's. No verdict: the packets go on through others'
    rules in this table.
    """
    known = {"socket": _OUR_SOCKET | {"restore-skmark": ""}, "mark": {"mark": shown(ruleset.server_mark)}}
    table = Table(
        jumps={
            "PREROUTING": [{"in-interface": name, "target": "TPROXYD_RAW"} for name in ruleset.interfaces],
            "OUTPUT": [{"target": "TPROXYD_OUT"}],
        },
        chains={
            "TPROXYD_RAW": [
                {"protocol": "tcp", "tcp": {"tcp-flags": [*_SYN]}, "target": {"goto": "TPROXYD_NEW"}},
                {**known, "target": "RETURN"},
                {"protocol": "udp", "target": {"goto": "TPROXYD_NEW"}},
                {"socket": _OUR_SOCKET, "target": {"goto": "TPROXYD_CLIENT"}},
            ],
            "TPROXYD_NEW": [
                {"addrtype": {"src-type": "LOCAL"}, "target": "DROP"},
                *_stays_in_kernel(ruleset, version),
                *_unless_answer(ruleset, version),
                *_asking_rules(ruleset, version, {"goto": "TPROXYD_PORTS"}),
            ],
            "TPROXYD_PORTS": [
                *_unless_leased(ruleset, version),
                *_flows(ruleset, version, {"goto": "TPROXYD_CLIENT"}),
            ],
            "TPROXYD_CLIENT": [{"target": {"CT": {"notrack": ""}}}, _set_mark(ruleset.mark)],
            "TPROXYD_OUT": [
                {
                    "out-interface": "!lo",
                    "mark": {"mark": shown(ruleset.client_mark)},
                    "target": {"CT": {"notrack": ""}},
                }
            ],
        },
    )
    if ruleset.rules:
        targets = _targets(ruleset, version, table, "TPROXYD_PORTS")
        table.chains["TPROXYD_RULES"] = rule_chain(ruleset.rules, version, targets)
    if ruleset.refuses:
        table.chains["TPROXYD_REJECT"] = [_set_mark(ruleset.refusal_mark)]
    return table


def _filter(ruleset: Ruleset, version: int) -> Table:
    """Where packets are refused: REJECT works in this table only.

    They are delivered to the box, whether or not it forwards; the answers are known to connection tracking, and bear
    the address that the client asked. UDP over IPv4 never comes here.
    """
    if not ruleset.refuses:
        return Table({}, {})
    refused = {"mark": {"mark": shown(ruleset.refusal_mark)}}
    tcp: Rule = {"protocol": "tcp", **refused, "target": {"REJECT": {"reject-with": "tcp-reset"}}}
    udp: Rule = {"protocol": "udp", **refused, "target": {"REJECT": {"reject-with": "icmp6-port-unreachable"}}}
    return Table(
        jumps={"INPUT": [{"target": "TPROXYD_REFUSE"}]},
        chains={"TPROXYD_REFUSE": [tcp] if version == 4 else [tcp, udp]},
    )


def _mangle(ruleset: Ruleset, version: int) -> Table:
    """After connection tracking: packets of our sockets are delivered, marked new ones go to the listener.

    A SYN goes to TPROXY even where a socket of ours is left in TIME_WAIT: TPROXY alone knows how to let the
    listener take over. It drops what it finds no listener for. Both ways end the table, lest a later rule of
    someone else's (`CONNMARK --restore-mark`) takes our mark off again.
    """
    mark = {"mark": {"mark": shown(ruleset.mark)}}
    interfaces = [*ruleset.interfaces, *(["lo"] if ruleset.own_traffic else [])]
    syn = {"protocol": "tcp", "tcp": {"tcp-flags": [*_SYN]}}
    udp = {"protocol": "udp"}
    listen = {"target": {"goto": "TPROXYD_LISTEN"}}
    intercepts = [intercept for intercept in ruleset.intercepts if intercept.version == version]
    table = Table(
        jumps={"PREROUTING": [{"target": "TPROXYD"}]},
        chains={
            "TPROXYD": [
                *_unless_decided(ruleset),
                *({"in-interface": name, **first, **mark, **listen} for name in interfaces for first in (syn, udp)),
                {"connmark": {"mark": shown(ruleset.client_mark)}, "target": "RETURN"},
                {"protocol": "udp", "target": {"goto": "TPROXYD_ANSWER"}},
                {"socket": _OUR_SOCKET, "target": {"goto": "TPROXYD_OURS"}},
                *({"in-interface": name, **mark, **listen} for name in interfaces),
            ],
            "TPROXYD_LISTEN": [_tproxy(intercept, ruleset.mark) for intercept in intercepts],
            "TPROXYD_ANSWER": _answers(ruleset, version),
            "TPROXYD_OURS": [_set_mark(ruleset.mark), {"target": "ACCEPT"}],
        },
    )
    if not ruleset.lease:
        table.chains["TPROXYD"] += [
            {"in-interface": name, **_UNLESS_SYN, "target": {"goto": "TPROXYD_STRAY"}} for name in ruleset.interfaces
        ]
        table.chains["TPROXYD_STRAY"] = [
            {"addrtype": {"src-type": "LOCAL"}, "target": "DROP"},
            {"conntrack": {"ctdir": "REPLY"}, "target": "RETURN"},
            *_stays_in_kernel(ruleset, version),
            *_asking_rules(ruleset, version, {"goto": "TPROXYD_LISTEN"}, {Network.TCP}),
        ]
        if ruleset.rules:
            listen_at_once = {"goto": "TPROXYD_LISTEN"}
            targets = Targets(listen_at_once, listen_at_once, listen_at_once)
            table.chains["TPROXYD_RULES"] = rule_chain(ruleset.rules, version, targets)
    if version in _inbound_versions(ruleset):
        table.jumps.setdefault("FORWARD", []).append({"target": "TPROXYD_INBOUND"})
        table.chains["TPROXYD_INBOUND"] = [_remember_inbound(name, version) for name in ruleset.interfaces]
    _remember_let_by(ruleset, table)
    if ruleset.own_traffic:
        table.jumps.setdefault("OUTPUT", []).append({"target": "TPROXYD_OWN"})
        table.chains["TPROXYD_OWN"] = _own_traffic(ruleset, version)
        remember = {"target": {"CONNMARK": {"set-xmark": f"{ruleset.mark.value:#x}/{ruleset.mark.mask:#x}"}}}
        turn: list[Rule] = [remember, {"target": {"goto": "TPROXYD_OURS"}}]
        table.chains["TPROXYD_OWN_NEW"] = [*_unless_leased(ruleset, version), *turn]
        if ruleset.rules:
            targets = _targets(ruleset, version, table, "TPROXYD_OWN_NEW")
            table.chains["TPROXYD_OWN_RULES"] = rule_chain(ruleset.rules, version, targets, own_traffic=True)
        if ruleset.refuses:
            table.chains["TPROXYD_REJECT"] = [_set_mark(ruleset.refusal_mark), {"target": "ACCEPT"}]
    return table


def _targets(ruleset: Ruleset, version: int, table: Table, relay: str) -> Targets:
    """Return where a table's rules lead; what a worker is to refuse must not go by while none renews the lease."""
    worker = relay
    if ruleset.lease and ruleset.refuses and version == 4:
        worker = "TPROXYD_WORKER"
        unless = {"set": {"match-set": ["!", lease_name(version), "src"]}}
        table.chains[worker] = [{**unless, "target": "DROP"}, {"target": {"goto": relay}}]
    return Targets(relay={"goto": relay}, refuse={"goto": "TPROXYD_REJECT"}, worker={"goto": worker})


def _unless_decided(ruleset: Ruleset) -> list[Rule]:
    """What is to be refused goes on to table filter."""
    refused: Rule = {"mark": {"mark": shown(ruleset.refusal_mark)}, "target": "ACCEPT"}
    return [refused] if ruleset.refuses else []


def _remember_let_by(ruleset: Ruleset, table: Table) -> None:
    """Mark the connections of clients that the kernel forwards, and take the mark off what tproxyd connects."""
    mark = ruleset.client_mark
    table.jumps.setdefault("FORWARD", []).append({"target": "TPROXYD_LET_BY"})
    table.chains["TPROXYD_LET_BY"] = [
        {
            "in-interface": name,
            "protocol": protocol,
            "conntrack": {"ctdir": "ORIGINAL"},
            "target": {"CONNMARK": {"set-xmark": f"{mark.value:#x}/{mark.mask:#x}"}},
        }
        for name in ruleset.interfaces
        for protocol in ("tcp", "udp")
    ]
    table.jumps.setdefault("OUTPUT", []).append({"target": "TPROXYD_TAKEN"})
    unmark = {"target": {"CONNMARK": {"set-xmark": f"0x0/{mark.mask:#x}"}}}
    table.chains["TPROXYD_TAKEN"] = [{"mark": {"mark": shown(ruleset.server_mark)}, **unmark}]


def _asking_rules(
    ruleset: Ruleset, version: int, otherwise: Rule, networks: AbstractSet[Network] = frozenset(Network)
) -> list[Rule]:
    """Ask the policy about what would be intercepted; without one, go on at once."""
    if ruleset.rules:
        return _flows(ruleset, version, {"goto": "TPROXYD_RULES"}, networks)
    return [{"target": otherwise}] if networks == frozenset(Network) else _flows(ruleset, version, otherwise, networks)


def _own_traffic(ruleset: Ruleset, version: int) -> list[Rule]:
    """The box's own new connections, turned round to the loopback device; never tproxyd's.

    The connection's mark remembers which ones: those that ran before go on as they are.
    """
    leased: Rule = {"set": {"match-set": [lease_name(version), "src"]}} if ruleset.lease else {}
    return [
        {"mark": {"mark": shown(ruleset.client_mark)}, "target": "RETURN"},
        {"mark": {"mark": shown(ruleset.server_mark)}, "target": "RETURN"},
        {"conntrack": {"ctdir": "REPLY"}, "target": "RETURN"},
        {**leased, "connmark": {"mark": shown(ruleset.mark)}, "target": {"goto": "TPROXYD_OURS"}},
        {"conntrack": {"ctstate": ["!", "NEW"]}, "target": "RETURN"},
        _UNLESS_SYN,
        *_stays_in_kernel(ruleset, version),
        *_flows(ruleset, version, {"goto": "TPROXYD_OWN_RULES" if ruleset.rules else "TPROXYD_OWN_NEW"}),
    ]


def _stays_in_kernel(ruleset: Ruleset, version: int) -> list[Rule]:
    types = _NEVER_TYPES[version]
    rules: list[Rule] = [{"addrtype": {"dst-type": each}, "target": "RETURN"} for each in types]
    for prefix_set in ruleset.excluded:
        if prefix_set.version == version:
            direction = {"destination": "dst", "source": "src"}[prefix_set.field]
            rules.append({"set": {"match-set": [_set_name(prefix_set), direction]}, "target": "RETURN"})
    return rules


_NEVER_TYPES: Final = {4: ("LOCAL,BROADCAST,ANYCAST,MULTICAST",), 6: ("LOCAL,ANYCAST", "MULTICAST")}
"""IPv6 has no broadcast, and its addrtype wants multicast *and* the other types where one rule names both."""


def _unless_leased(ruleset: Ruleset, version: int) -> list[Rule]:
    """A gateway that fails open intercepts only while its daemon renews the lease."""
    lease = {"set": {"match-set": ["!", lease_name(version), "src"]}, "target": "RETURN"}
    return [lease] if ruleset.lease else []


_UNLESS_SYN: Final = {"protocol": "tcp", "tcp": {"tcp-flags": ["!", *_SYN]}, "target": "RETURN"}
"""What begins to intercept, and may fail open, leaves running connections alone."""


def _unless_answer(ruleset: Ruleset, version: int) -> list[Rule]:
    """UDP flows that came from the other side: their answers are no new flows, and only raw can say so."""
    if version not in _inbound_versions(ruleset):
        return []
    ours = {"socket": _OUR_SOCKET | {"restore-skmark": ""}, "mark": {"mark": shown(ruleset.client_mark)}}
    return [
        {"protocol": "udp", **ours, "target": {"goto": "TPROXYD_PORTS"}},
        {"protocol": "udp", "set": {"match-set": [_inbound_name(version), "dst,dst,src"]}, "target": "RETURN"},
    ]


def _answers(ruleset: Ruleset, version: int) -> list[Rule]:
    """A full cone takes datagrams from anyone; not from those whom its client reaches past tproxyd."""
    excluded = [each for each in ruleset.excluded if (each.field, each.version) == ("destination", version)]
    rules: list[Rule] = [{"set": {"match-set": [_set_name(each), "src"]}, "target": "RETURN"} for each in excluded]
    for intercept in ruleset.intercepts:
        if (intercept.network, intercept.version) == (Network.UDP, version):
            rules += [
                {"protocol": "udp", **ports, "socket": _OUR_SOCKET, "target": {"goto": "TPROXYD_OURS"}}
                for ports in port_matches(Network.UDP, sport=intercept.ports)
            ]
    return rules


def _remember_inbound(interface: str, version: int) -> Rule:
    return {
        "out-interface": interface,
        "protocol": "udp",
        "conntrack": {"ctdir": "ORIGINAL"},
        "target": {"SET": {"add-set": [_inbound_name(version), "src,src,dst"], "exist": ""}},
    }


def _inbound_versions(ruleset: Ruleset) -> list[int]:
    return [intercept.version for intercept in ruleset.intercepts if intercept.network is Network.UDP]


def _inbound_name(version: int) -> str:
    return f"{SET_PREFIX}inbound_v{version}"


def _flows(
    ruleset: Ruleset, version: int, target: Rule, networks: AbstractSet[Network] = frozenset(Network)
) -> list[Rule]:
    return [
        {"protocol": str(intercept.network), **ports, "target": target}
        for intercept in ruleset.intercepts
        if intercept.version == version and intercept.network in networks
        for ports in port_matches(intercept.network, dport=intercept.ports)
    ]


def _tproxy(intercept: Intercept, mark: Mark) -> Rule:
    options = {
        "on-port": str(intercept.port),
        "on-ip": intercept.address,
        "tproxy-mark": f"{mark.value:#x}/{mark.mask:#x}",
    }
    return {"protocol": str(intercept.network), "target": {"TPROXY": options}}


def _set_mark(mark: Mark) -> Rule:
    return {"target": {"MARK": {"set-xmark": f"{mark.value:#x}/{mark.mask:#x}"}}}


def _set_name(prefix_set: PrefixSet) -> str:
    return f"{SET_PREFIX}{prefix_set.name}"


def _without_zero_length(prefixes: Iterable[str]) -> Iterator[str]:
    for prefix in prefixes:
        yield from _EVERYTHING.get(prefix, (prefix,))


def _negated(value: str, option: str) -> str:
    return f"! {option} {value[1:]}" if value.startswith("!") else f"{option} {value}"


def _options(parameters: Any) -> str:
    if not isinstance(parameters, dict):
        return f" {parameters}" if parameters else ""
    text = ""
    for name, value in parameters.items():
        words = [value] if isinstance(value, str) else list(value)
        negated = words[:1] == ["!"]
        shown = [f"--{name}", *(word for word in words[negated:] if word)]
        text += (" ! " if negated else " ") + " ".join(shown)
    return text
