"""Single matches of iptables rules, in the form of python-iptables' `iptc.easy` (iptables-extensions(8)); pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from tproxyd.flow import Network

if TYPE_CHECKING:
    from tproxyd.config import Mark, PortRange

Rule = dict[str, Any]
"""A rule, or a part of one; the order of the keys is the order of the matches."""

SET_PREFIX: Final = "tproxyd_"

_MULTIPORT_SLOTS: Final = 15


def port_matches(
    network: Network, *, sport: tuple[PortRange, ...] = (), dport: tuple[PortRange, ...] = ()
) -> list[Rule]:
    """Return the matches of which one has to hold; no port at all is one that always does."""
    return [_merged(network, source, destination) for source in _groups(sport) for destination in _groups(dport)]


def shown(mark: Mark) -> str:
    """Return a mark as a match is listed: without a mask that has all bits."""
    return f"{mark.value:#x}" if mark.mask == 0xFFFFFFFF else f"{mark.value:#x}/{mark.mask:#x}"


def _merged(network: Network, source: list[PortRange], destination: list[PortRange]) -> Rule:
    """Return one match for single ranges, and a multiport each for several."""
    single: dict[str, str] = {}
    several: list[dict[str, str]] = []
    for option, ports in (("sport", source), ("dport", destination)):
        if len(ports) == 1:
            single[option] = _range(ports[0])
        elif ports:
            several.append({f"{option}s": ",".join(map(_range, ports))})
    found: Rule = {str(network): single} if single else {}
    if several:
        found["multiport"] = several if len(several) > 1 else several[0]
    return found


def _groups(ports: Iterable[PortRange]) -> Iterator[list[PortRange]]:
    """Split ports into what one multiport match can hold: 15 slots, two for a range; none is one group, empty."""
    group: list[PortRange] = []
    used = 0
    for each in ports:
        slots = 1 if each.first == each.last else 2
        if used + slots > _MULTIPORT_SLOTS:
            yield group
            group, used = [], 0
        group.append(each)
        used += slots
    yield group


def _range(ports: PortRange) -> str:
    return str(ports.first) if ports.first == ports.last else f"{ports.first}:{ports.last}"
