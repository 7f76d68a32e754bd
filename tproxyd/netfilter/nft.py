"""The `Ruleset` as nftables text (nft(8)); pure.

The text is one transaction that replaces the table whole: `flush table` would leave the sets behind. It is
written the way `nft list table` shows it, so that the two can be compared by eye and by `diff`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tproxyd.config import Mark
from tproxyd.netfilter.plan import Intercept, PrefixSet, Ruleset

TABLE: Final = "inet tproxyd"
OWNER_COMMENT: Final = "managed by tproxyd"
LEASE_SET: Final = "lease"

_ADDRESS: Final = {4: "ip", 6: "ip6"}
_OUR_SOCKET: Final = "socket transparent 1"
_FOREIGN_LISTENER: Final = "socket transparent 1 socket wildcard 1"
"""Someone else's transparent socket on the wildcard address: ours are bound to loopback. To ask for `wildcard 0`
would miss our half-open and TIME_WAIT sockets, of which the kernel can't say."""
_RELAYED: Final = "meta l4proto { icmp, tcp, udp, ipv6-icmp }"
_SYN: Final = "tcp flags syn / fin,syn,rst,ack"
_NOT_SYN: Final = "tcp flags != syn / fin,syn,rst,ack"


def render(ruleset: Ruleset) -> str:
    """Return the transaction that puts this ruleset in place of whatever the table held before."""
    return f"add table {TABLE}\ndelete table {TABLE}\n{table(ruleset)}"


def table(ruleset: Ruleset) -> str:
    """Return the table alone, as `nft list table inet tproxyd` would show it."""
    blocks = [f'\tcomment "{OWNER_COMMENT}"\n']
    blocks += [_prefix_set(prefix_set) for prefix_set in ruleset.excluded]
    if ruleset.lease:
        blocks.append(f"\tset {LEASE_SET} {{\n\t\ttype nf_proto\n\t\tflags timeout\n\t}}\n")
    blocks += [_chain(name, lines) for name, lines in chains(ruleset).items()]
    return f"table {TABLE} {{\n" + "\n".join(blocks) + "}\n"


def chains(ruleset: Ruleset) -> dict[str, list[str]]:
    """Return each chain's lines; the first line of a base chain is its hook."""
    found = {
        "intercept": _intercept_chain(ruleset),
        "new_flow": _new_flow(ruleset, "notrack "),
        "divert": [
            "type filter hook prerouting priority mangle + 5; policy accept;",
            f"{_matches(ruleset.mark)} return",
            f"{_RELAYED.replace('{', '!= {')} return",
            f"{_FOREIGN_LISTENER} return",
            f"{_OUR_SOCKET} {_set(ruleset.mark)}",
        ],
        "client_side": [
            "type filter hook output priority raw; policy accept;",
            f'oifname != "lo" {_matches(ruleset.client_mark)} notrack',
        ],
    }
    if ruleset.own_traffic:
        found["own_output"] = _own_output_chain(ruleset)
        found["own_flow"] = [
            f"{_SYN} goto own_new_flow",
            f"{_FOREIGN_LISTENER} goto own_new_flow",
            f"{_OUR_SOCKET} accept",
            "goto own_new_flow",
        ]
        found["own_new_flow"] = _new_flow(ruleset, "")
    return found


def _intercept_chain(ruleset: Ruleset) -> list[str]:
    """Before connection tracking: known client-side packets, then candidates for a new flow.

    A SYN goes to `tproxy` even where a socket of ours is left in TIME_WAIT: tproxy alone knows how to let the
    listener take over. A socket's mark can be read of full sockets only, so what is not known to be on the
    server side (half-open, TIME_WAIT) is taken for the client side.
    """
    interfaces = _members(f'"{name}"' for name in ruleset.interfaces)
    lines = ["type filter hook prerouting priority raw; policy accept;"]
    if ruleset.own_traffic:
        lines.append(f'iifname "lo" {_matches(ruleset.mark)} goto own_flow')
    return [
        *lines,
        f"iifname != {interfaces} return",
        f"{_RELAYED.replace('{', '!= {')} return",
        f"{_SYN} goto new_flow",
        f"{_FOREIGN_LISTENER} goto new_flow",
        f"{_OUR_SOCKET} {_matches(ruleset.server_mark, 'socket mark')} return",
        f"{_OUR_SOCKET} notrack {_set(ruleset.mark)} accept",
        "goto new_flow",
    ]


def _new_flow(ruleset: Ruleset, track: str) -> list[str]:
    """Packets of no socket of ours: what must stay in the kernel, then the listener, then the last word.

    A gateway that has just begun to intercept, and may fail open, leaves running connections alone.
    """
    lines = [*_stays_in_kernel(ruleset), *_unless_leased(ruleset)]
    if ruleset.lease:
        lines.append(f"{_NOT_SYN} return")
    lines += [_tproxy(intercept, track, ruleset.mark) for intercept in ruleset.intercepts]
    if not ruleset.lease:
        lines += [f"{_flows(intercept)} drop" for intercept in ruleset.intercepts]
    return lines


def _own_output_chain(ruleset: Ruleset) -> list[str]:
    """The box's own new connections, turned round to the loopback device; never tproxyd's.

    The connection's mark remembers which ones: those that ran before go on as they are.
    """
    return [
        "type route hook output priority mangle; policy accept;",
        f"{_matches(ruleset.client_mark)} return",
        f"{_matches(ruleset.server_mark)} return",
        "ct direction reply return",
        *_unless_leased(ruleset),
        f"{_matches(ruleset.mark, 'ct mark')} {_set(ruleset.mark)} return",
        "ct state != new return",
        f"{_NOT_SYN} return",
        *_stays_in_kernel(ruleset),
        *(f"{_flows(each)} {_set(ruleset.mark, 'ct mark')} {_set(ruleset.mark)}" for each in ruleset.intercepts),
    ]


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
    ports = _members(str(ports) for ports in intercept.ports)
    return f"meta nfproto ipv{intercept.version} {intercept.network} dport {ports}"


def _prefix_set(prefix_set: PrefixSet) -> str:
    elements = ",\n\t\t\t     ".join(prefix_set.prefixes)
    return (
        f"\tset {prefix_set.name} {{\n\t\ttype ipv{prefix_set.version}_addr\n\t\tflags interval\n"
        f"\t\telements = {{ {elements} }}\n\t}}\n"
    )


def _chain(name: str, lines: list[str]) -> str:
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


def _members(items: Iterable[str]) -> str:
    members = list(items)
    return members[0] if len(members) == 1 else "{ " + ", ".join(members) + " }"


def _matches(mark: Mark, what: str = "meta mark") -> str:
    return f"{what} & 0x{mark.mask:08x} == 0x{mark.value:08x}"


def _set(mark: Mark, what: str = "meta mark") -> str:
    if mark.value == mark.mask:
        return f"{what} set {what} | 0x{mark.value:08x}"
    return f"{what} set {what} & 0x{~mark.mask & 0xFFFFFFFF:08x} | 0x{mark.value:08x}"
