"""The rules and sets of learned flows as nftables text; pure. What they are for: docs/adr/0006-learned-flows.md.

Three sets a family. `learned` holds the flows that the kernel carries; forwarded packets keep them alive. `came`
and `left` count their packets, by direction, where these come in and behind all other rules that could drop them.
A key is an address and port twice: the client's first in `learned`, the sender's in `came` and `left`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tproxyd.netfilter.plan import Learned

LEASE_SET: Final = "learned_lease"
"""While a family stands here, its learned flows are forwarded: they must not outlive the daemon for long."""
FLOWS: Final = {4: "learned_v4", 6: "learned_v6"}
CAME: Final = {4: "came_v4", 6: "came_v6"}
LEFT: Final = {4: "left_v4", 6: "left_v6"}
RAW: Final = "learned_raw"
"""From clients: neither intercepted nor kept from connection tracking. So a packet meets the entry that the relay's
own packets made, whose four-tuple is the same, and the NAT mapping in it."""
TRACKED: Final = "learned_tracked"
"""After connection tracking, either direction: not for the sockets that carried the flow before. The entry is asked
for its flow: a masqueraded answer has the gateway's address here."""
FORWARDED: Final = "learned_forwarded"
"""What is forwarded is counted and keeps its flow alive. `left` is asked first: an update alone would learn."""
_HOOK: Final = "type filter hook forward priority 1000; policy accept;"
"""Behind any other chain of the forward hook, so that what it counts has passed them."""

_ADDRESS: Final = {4: "ip", 6: "ip6"}
_SURVIVES: Final = {4: "ip ttl > 1", 6: "ip6 hoplimit > 1"}
"""What may be forwarded: the relay takes no hop off, so a packet in its last hop goes to it."""


def names(versions: Iterable[int]) -> list[str]:
    """All sets' names."""
    return [LEASE_SET, *(sets[version] for version in versions for sets in (FLOWS, CAME, LEFT))]


def sets(learned: Learned, versions: Iterable[int]) -> list[str]:
    """The definitions of the sets. `dynamic` keeps the kernel from allocating their full size at once."""
    blocks = [f"\tset {LEASE_SET} {{\n\t\ttype nf_proto\n\t\tflags timeout\n\t}}\n"]
    for version in versions:
        key = f"type ipv{version}_addr . inet_service . ipv{version}_addr . inet_service"
        blocks.append(
            f"\tset {FLOWS[version]} {{\n\t\t{key}\n\t\tsize {learned.flows}\n\t\tflags dynamic,timeout\n"
            f"\t\ttimeout {learned.idle_s}s\n\t}}\n"
        )
        blocks += [
            f"\tset {counts[version]} {{\n\t\t{key}\n\t\tsize {2 * learned.flows}\n"
            "\t\tflags dynamic\n\t\tcounter\n\t}\n"
            for counts in (CAME, LEFT)
        ]
    return blocks


def chains(versions: Sequence[int]) -> dict[str, list[str]]:
    """The chains by name; `RAW` and `TRACKED` are jumped to with UDP alone and accept what is not to be taken."""
    return {
        RAW: [_from_client(version) for version in versions],
        TRACKED: [
            f"{_SURVIVES[version]} meta l4proto udp ct direction {direction} {key} @{CAME[version]} accept"
            for version in versions
            for direction, key in _by_direction(version)
        ],
        FORWARDED: [
            _HOOK,
            *(
                f"meta l4proto udp ct direction {direction} {key} @{LEFT[version]} "
                f"update @{FLOWS[version]} {{ {_original(version)} }}"
                for version in versions
                for direction, key in _by_direction(version)
            ),
        ],
    }


def left_alone(versions: Iterable[int]) -> list[str]:
    """Rules that pass over the packets of learned flows, as clients send them."""
    return [f"{_sent(version)} @{FLOWS[version]} return" for version in versions]


def _sent(version: int) -> str:
    address = _ADDRESS[version]
    return f"{address} saddr . udp sport . {address} daddr . udp dport"


def _from_client(version: int) -> str:
    return f"{_SURVIVES[version]} {_sent(version)} @{FLOWS[version]} meta nfproto @{LEASE_SET} accept"


def _by_direction(version: int) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("original", _original(version)), ("reply", _reply(version))


def _original(version: int) -> str:
    address = _ADDRESS[version]
    return f"ct original {address} saddr . ct original proto-src . ct original {address} daddr . ct original proto-dst"


def _reply(version: int) -> str:
    address = _ADDRESS[version]
    return f"ct original {address} daddr . ct original proto-dst . ct original {address} saddr . ct original proto-src"
