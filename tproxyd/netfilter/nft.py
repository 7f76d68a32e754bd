"""The `Ruleset` as nftables text (nft(8)); pure.

The text is one transaction that replaces the table whole: `flush table` would leave the sets behind. It is
written the way `nft list table` shows it, so that the two can be compared by eye and by `diff`.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

from tproxyd.flow import Network
from tproxyd.netfilter import nft_learned
from tproxyd.netfilter.nft_rules import members, rule_lines
from tproxyd.netfilter.plan import INBOUND_S, Intercept, PrefixSet, Ruleset
from tproxyd.netfilter.rules import RulePrefixes, with_refusals_left_to_workers

if TYPE_CHECKING:
    from tproxyd.config import Mark

TABLE: Final = "inet tproxyd"
OWNER_COMMENT: Final = "managed by tproxyd"
LEASE_SET: Final = "lease"
INBOUND_SETS: Final = {4: "inbound_v4", 6: "inbound_v6"}
"""UDP flows from the other side: outer address and port, inner address and port."""

_ADDRESS: Final = {4: "ip", 6: "ip6"}
_OUR_SOCKET: Final = "socket transparent 1"
_FOREIGN_LISTENER: Final = "socket transparent 1 socket wildcard 1"
"""Someone else's transparent socket on the wildcard address: ours are bound to loopback. To ask for `wildcard 0`
would miss our half-open and TIME_WAIT sockets, of which the kernel can't say."""
_NOT_RELAYED: Final = "meta l4proto != { icmp, tcp, udp, ipv6-icmp }"
_SYN: Final = "tcp flags syn / fin,syn,rst,ack"
_NOT_SYN: Final = "tcp flags != syn / fin,syn,rst,ack"


def render(ruleset: Ruleset) -> str:
    """Return the transaction that puts this ruleset in place of whatever the table held before."""
    return f"add table {TABLE}\ndelete table {TABLE}\n{table(ruleset)}"


def table(ruleset: Ruleset) -> str:
    """Return the table alone, as `nft list table inet tproxyd` would show it."""
    blocks = [f'\tcomment "{OWNER_COMMENT}"\n']
    blocks += [_prefix_set(prefix_set) for prefix_set in ruleset.prefix_sets]
    if ruleset.lease:
        blocks.append(f"\tset {LEASE_SET} {{\n\t\ttype nf_proto\n\t\tflags timeout\n\t}}\n")
    blocks += [_inbound_set(version) for version in inbound_versions(ruleset)]
    if ruleset.learned:
        blocks += nft_learned.sets(ruleset.learned, inbound_versions(ruleset))
    blocks += [_chain(name, lines) for name, lines in chains(ruleset).items()]
    return f"table {TABLE} {{\n" + "\n".join(blocks) + "}\n"


def inbound_versions(ruleset: Ruleset) -> list[int]:
    """The families in which UDP is intercepted, so that answers must be told from new flows."""
    return [intercept.version for intercept in ruleset.intercepts if intercept.network is Network.UDP]


def changing_sets(ruleset: Ruleset) -> list[str]:
    """Names of the sets whose elements come and go."""
    names = [LEASE_SET] if ruleset.lease else []
    names += [INBOUND_SETS[version] for version in inbound_versions(ruleset)]
    return names + (nft_learned.names(inbound_versions(ruleset)) if ruleset.learned else [])


def chains(ruleset: Ruleset) -> dict[str, list[str]]:
    """Return each chain's lines; the first line of a base chain is its hook."""
    found = {
        "intercept": _intercept_chain(ruleset),
        "new_flow": _new_flow(ruleset),
        "to_listener": [*_unless_leased(ruleset), *_to_listener(ruleset, "notrack ")],
        "divert": _divert_chain(ruleset),
        "client_side": [
            "type filter hook output priority raw; policy accept;",
            f'oifname != "lo" {_matches(ruleset.client_mark)} notrack',
        ],
        "let_by": _let_by_chain(ruleset),
        "taken": [
            "type filter hook output priority mangle; policy accept;",
            f"{_matches(ruleset.server_mark)} {_unset(ruleset.client_mark, 'ct mark')}",
        ],
    }
    if not ruleset.lease:
        found["stray"] = [
            "fib saddr type local drop",
            "ct direction reply return",
            *_stays_in_kernel(ruleset),
            *_asking_rules(ruleset, "rules", {Network.TCP}),
            *_to_listener(ruleset, networks={Network.TCP}),
        ]
    if inbound_versions(ruleset):
        found["inbound"] = _inbound_chain(ruleset)
    if ruleset.rules:
        found |= _rule_chains(ruleset)
    if ruleset.learned:
        found |= nft_learned.chains(inbound_versions(ruleset))
    if ruleset.own_traffic:
        found["own_output"] = _own_output_chain(ruleset)
        found["own_flow"] = [
            *([f"{_matches(ruleset.refusal_mark)} return"] if ruleset.refuses else []),
            f"{_SYN} goto own_new_flow",
            "meta l4proto udp goto own_new_flow",
            f"{_FOREIGN_LISTENER} goto own_new_flow",
            f"{_OUR_SOCKET} accept",
            "goto own_new_flow",
        ]
        found["own_new_flow"] = [
            *_stays_in_kernel(ruleset),
            *_unless_leased(ruleset),
            *([f"{_NOT_SYN} return"] if ruleset.lease else []),
            *_to_listener(ruleset),
        ]
    return found


def _intercept_chain(ruleset: Ruleset) -> list[str]:
    """Before connection tracking: known client-side packets, then candidates for a new flow.

    A SYN goes to `tproxy` even where a socket of ours is left in TIME_WAIT: tproxy alone knows how to let the
    listener take over. So does UDP: tproxy looks for connected sockets only, and gives the packet to the one it
    finds; a socket that is being connected in this moment would match, and then not take the packet. A socket's
    mark can be read of full sockets only, so what is not known to be on the server side (half-open, TIME_WAIT)
    is taken for the client side. Nearly all packets are those of running TCP flows, which the mark alone tells:
    one socket lookup in place of four.
    """
    lines = ["type filter hook prerouting priority raw; policy accept;"]
    if ruleset.own_traffic:
        lines.append(f'iifname "lo" {_matches(ruleset.mark)} goto own_flow')
    return [
        *lines,
        f"iifname != {_interfaces(ruleset)} return",
        *_udp_first_to(nft_learned.RAW, ruleset),
        f"{_NOT_RELAYED} return",
        f"{_SYN} goto new_flow",
        f"{_connected(ruleset.client_mark)} notrack {_set(ruleset.mark)} accept",
        f"{_OUR_SOCKET} {_matches(ruleset.server_mark, 'socket mark')} return",
        "meta l4proto udp goto new_flow",
        f"{_FOREIGN_LISTENER} return",
        f"{_OUR_SOCKET} notrack {_set(ruleset.mark)} accept",
    ]


def _divert_chain(ruleset: Ruleset) -> list[str]:
    """After connection tracking: packets of server-side sockets, answers under masquerading among them.

    Where nothing may go by, TCP that is neither a beginning, nor ours, nor an answer is reset by the listener.
    """
    lines = [
        "type filter hook prerouting priority mangle + 5; policy accept;",
        f"{_matches(ruleset.mark)} return",
        *_udp_first_to(nft_learned.TRACKED, ruleset),
        f"{_NOT_RELAYED} return",
        f"{_matches(ruleset.client_mark, 'ct mark')} return",
        f"{_connected(ruleset.server_mark)} {_set(ruleset.mark)} return",
        *_unless_relayed_answer(ruleset),
        f"{_FOREIGN_LISTENER} return",
        f"{_OUR_SOCKET} {_set(ruleset.mark)} return",
    ]
    if not ruleset.lease:
        lines.append(f"iifname {_interfaces(ruleset)} {_NOT_SYN} goto stray")
    return lines


def _let_by_chain(ruleset: Ruleset) -> list[str]:
    """Remember the connections of clients that the kernel forwards: they stay forwarded, whatever rules come.

    Their answers are no sockets' of ours, even where one is bound to the client's address and port. What tproxyd
    connects later with the same four-tuple is not among them; nor are learned flows, which may come back to it.
    """
    forwarded = f"iifname {_interfaces(ruleset)} meta l4proto {{ tcp, udp }} ct direction original"
    return [
        "type filter hook forward priority mangle; policy accept;",
        *(nft_learned.left_alone(inbound_versions(ruleset)) if ruleset.learned else ()),
        f"{forwarded} {_set(ruleset.client_mark, 'ct mark')}",
    ]


def _unless_relayed_answer(ruleset: Ruleset) -> list[str]:
    """A full cone takes datagrams from anyone; not from those whom its client reaches past tproxyd."""
    lines = [
        f"meta l4proto udp {_ADDRESS[prefix_set.version]} saddr @{prefix_set.name} return"
        for prefix_set in ruleset.excluded
        if prefix_set.field == "destination"
    ]
    ports = next((each.ports for each in ruleset.intercepts if each.network is Network.UDP), ())
    return [*lines, f"udp sport != {members(str(port) for port in ports)} return"] if ports else lines


def _inbound_chain(ruleset: Ruleset) -> list[str]:
    """Remember UDP flows that came from the other side: their answers are no new flows, and only raw can say so."""
    return [
        "type filter hook forward priority mangle; policy accept;",
        f"oifname != {_interfaces(ruleset)} return",
        *(
            f"ct direction original update @{INBOUND_SETS[version]} "
            f"{{ {_ADDRESS[version]} saddr . udp sport . {_ADDRESS[version]} daddr . udp dport }}"
            for version in inbound_versions(ruleset)
        ),
    ]


def _new_flow(ruleset: Ruleset) -> list[str]:
    """What begins a flow, but must stay in the kernel or belongs to one that the other side began."""
    ours = f"meta l4proto udp {_OUR_SOCKET} {_matches(ruleset.client_mark, 'socket mark')} goto to_listener"
    return [
        "fib saddr type local drop",
        *_stays_in_kernel(ruleset),
        *([ours] if inbound_versions(ruleset) else []),
        *(_answers(version) for version in inbound_versions(ruleset)),
        *_asking_rules(ruleset, "rules"),
        "goto to_listener",
    ]


def _asking_rules(ruleset: Ruleset, chain: str, networks: AbstractSet[Network] = frozenset(Network)) -> list[str]:
    """Ask the policy about what would be intercepted; what it says nothing about comes back."""
    intercepts = [each for each in ruleset.intercepts if each.network in networks] if ruleset.rules else []
    return [f"{_flows(intercept)} jump {chain}" for intercept in intercepts]


def _rule_chains(ruleset: Ruleset) -> dict[str, list[str]]:
    """The policy's rules, and what refuses packets for them.

    `accept` ends this hook only: the packet stays routed. A packet is refused after connection tracking, so that a
    stateful firewall knows the answer; the box's own once it was turned round, lest the sender get EPERM.
    """
    refuse = f"{_set(ruleset.refusal_mark)} accept"
    found = {"rules": rule_lines(ruleset.rules, refuse, own_traffic=False)}
    if ruleset.own_traffic:
        own_rules = with_refusals_left_to_workers(ruleset.rules)
        to_worker = [*([f"meta nfproto != @{LEASE_SET} drop"] if ruleset.lease else []), "counter return"]
        found["own_rules"] = rule_lines(own_rules, refuse, own_traffic=True, to_worker=to_worker)
    if ruleset.refuses:
        found["refuse"] = [
            "type filter hook prerouting priority mangle + 6; policy accept;",
            f"{_matches(ruleset.refusal_mark, negated=True)} return",
            "meta l4proto tcp reject with tcp reset",
            "meta l4proto udp reject",  # ICMP port unreachable, as nft lists it
        ]
    return found


def _to_listener(ruleset: Ruleset, track: str = "", networks: AbstractSet[Network] = frozenset(Network)) -> list[str]:
    """Hand a packet to the listener; where nothing may go by, drop what finds none."""
    intercepts = [intercept for intercept in ruleset.intercepts if intercept.network in networks]
    lines = [_tproxy(intercept, track, ruleset.mark) for intercept in intercepts]
    return lines if ruleset.lease else [*lines, *(f"{_flows(intercept)} drop" for intercept in intercepts)]


def _connected(mark: Mark) -> str:
    """A TCP packet for a full socket of ours."""
    return f"meta l4proto tcp {_matches(mark, 'socket mark')}"


def _answers(version: int) -> str:
    address = _ADDRESS[version]
    return f"{address} daddr . udp dport . {address} saddr . udp sport @{INBOUND_SETS[version]} return"


def _own_output_chain(ruleset: Ruleset) -> list[str]:
    """The box's own new connections, turned round to the loopback device; never tproxyd's.

    The connection's mark remembers which ones: those that ran before go on as they are.
    """
    leased = f"meta nfproto @{LEASE_SET} " if ruleset.lease else ""
    return [
        "type route hook output priority mangle; policy accept;",
        f"{_matches(ruleset.client_mark)} return",
        f"{_matches(ruleset.server_mark)} return",
        "ct direction reply return",
        f"{leased}{_matches(ruleset.mark, 'ct mark')} {_set(ruleset.mark)} return",
        "ct state != new return",
        f"{_NOT_SYN} return",
        *_stays_in_kernel(ruleset),
        *_asking_rules(ruleset, "own_rules"),
        *_unless_leased(ruleset),
        *(f"{_flows(each)} {_set(ruleset.mark, 'ct mark')} {_set(ruleset.mark)}" for each in ruleset.intercepts),
    ]


def _udp_first_to(chain: str, ruleset: Ruleset) -> list[str]:
    return [f"meta l4proto udp jump {chain}"] if ruleset.learned else []


def _stays_in_kernel(ruleset: Ruleset) -> list[str]:
    lines = ["fib daddr type { local, broadcast, anycast, multicast } return"]
    for prefix_set in ruleset.excluded:
        field = {"destination": "daddr", "source": "saddr"}[prefix_set.field]
        lines.append(f"{_ADDRESS[prefix_set.version]} {field} @{prefix_set.name} return")
    return lines


def _unless_leased(ruleset: Ruleset) -> list[str]:
    return [f"meta nfproto != @{LEASE_SET} return"] if ruleset.lease else []


def _tproxy(intercept: Intercept, track: str, mark: Mark) -> str:
    address = f"[{intercept.address}]" if intercept.version == 6 else intercept.address
    family = _ADDRESS[intercept.version]
    return f"{_flows(intercept)} tproxy {family} to {address}:{intercept.port} {track}{_set(mark)} accept"


def _flows(intercept: Intercept) -> str:
    ports = members(str(ports) for ports in intercept.ports)
    return f"meta nfproto ipv{intercept.version} {intercept.network} dport {ports}"


def _inbound_set(version: int) -> str:
    address = f"ipv{version}_addr"
    return (
        f"\tset {INBOUND_SETS[version]} {{\n\t\ttype {address} . inet_service . {address} . inet_service\n"
        f"\t\tsize 65535\n\t\tflags dynamic,timeout\n\t\ttimeout {INBOUND_S // 60}m\n\t}}\n"
    )


def _prefix_set(prefix_set: PrefixSet | RulePrefixes) -> str:
    elements = ",\n\t\t\t     ".join(prefix_set.prefixes)
    return (
        f"\tset {prefix_set.name} {{\n\t\ttype ipv{prefix_set.version}_addr\n\t\tflags interval\n"
        f"\t\telements = {{ {elements} }}\n\t}}\n"
    )


def _chain(name: str, lines: list[str]) -> str:
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


def _interfaces(ruleset: Ruleset) -> str:
    return members(f'"{name}"' for name in ruleset.interfaces)


def _matches(mark: Mark, what: str = "meta mark", *, negated: bool = False) -> str:
    return f"{what} & 0x{mark.mask:08x} {'!=' if negated else '=='} 0x{mark.value:08x}"


def _unset(mark: Mark, what: str) -> str:
    return f"{what} set {what} & 0x{~mark.mask & 0xFFFFFFFF:08x}"


def _set(mark: Mark, what: str = "meta mark") -> str:
    if mark.value == mark.mask:
        return f"{what} set {what} | 0x{mark.value:08x}"
    return f"{what} set {what} & 0x{~mark.mask & 0xFFFFFFFF:08x} | 0x{mark.value:08x}"
