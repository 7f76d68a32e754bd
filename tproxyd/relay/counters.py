"""What a worker counts. Plain integers: the supervisor adds the workers up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the worker's start, but for `flows`, which is the number alive now."""

    flows: int = 0
    tcp_flows: int = 0
    udp_flows: int = 0
    udp_learned: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    source_port_clashes: int = 0
    refused_limit: int = 0
    refused_loop: int = 0
    connect_failures: int = 0
    accept_pauses: int = 0
    udp_dropped: int = 0
    udp_without_orig_dst: int = 0
    udp_not_carried: int = 0
    udp_associations_lost: int = 0
    udp_raw_replies: int = 0
    icmp_errors_sent: int = 0
    flow_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return asdict(self)


class RuleCounters(dict[str, int]):
    """How many flows each rule took, by its name, in the policy's order; of a refused UDP flow each datagram.

    What the kernel carries out, it counts itself (`nft list table inet tproxyd`).
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Begin at 0. Args: names: of the rules, and of the last word."""
        super().__init__(dict.fromkeys(names, 0))
