"""Which flows the kernel carries, for which worker, and whether it carries them well. Pure: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from tproxyd.flow import FlowKey
from tproxyd.netfilter.learned import Traffic, Way

UNPROVEN: Final = 16
"""Flows of a family at a time until one has shown that what is forwarded arrives."""
STUCK: Final = 3
"""As many packets in a row that came in and did not go on: something on the box drops them."""


class LearnedFlow:
    """One of them.

    Attributes:
        slot: the number of the worker whose flow it is.
        traffic: as last read.
    """

    __slots__ = ("_came_at_pass", "key", "slot", "traffic")

    def __init__(self, key: FlowKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.traffic = Traffic(alive=True, up=Way(), down=Way())
        self._came_at_pass = (0, 0)

    def update(self, traffic: Traffic) -> None:
        """Take a reading."""
        up, down = self._came_at_pass
        if traffic.up.left > self.traffic.up.left:
            up = traffic.up.came
        if traffic.down.left > self.traffic.down.left:
            down = traffic.down.came
        self._came_at_pass = up, down
        self.traffic = traffic

    @property
    def stuck(self) -> bool:
        """Whether packets of a direction come in, and none goes on."""
        up, down = self._came_at_pass
        return self.traffic.up.came - up >= STUCK or self.traffic.down.came - down >= STUCK

    @property
    def passes(self) -> bool:
        """Whether what came in went on."""
        return self.traffic.up.left + self.traffic.down.left >= STUCK and not self.stuck


@dataclass(frozen=True, slots=True)
class Reading:
    """What a look at a family's flows has shown: those that ended, and one that gets stuck, if any does."""

    ended: list[LearnedFlow]
    stuck: LearnedFlow | None


class LearnedTable:
    """All of them, both families."""

    def __init__(self, most: int) -> None:
        """Args: most: flows of one family at a time."""
        self._most = most
        self._flows: dict[int, dict[FlowKey, LearnedFlow]] = {4: {}, 6: {}}
        self._proven: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self._flows.values()))

    def flows(self, version: int | None = None) -> list[LearnedFlow]:
        """All flows, or those of a family."""
        return [flow for each, flows in self._flows.items() if version in (None, each) for flow in flows.values()]

    def room(self, version: int) -> int:
        """How many more of a family there may be."""
        most = self._most if version in self._proven else min(UNPROVEN, self._most)
        return max(0, most - len(self._flows[version]))

    def get(self, key: FlowKey) -> LearnedFlow | None:
        """Return a flow that is there."""
        return self._flows[key.version].get(key)

    def put(self, key: FlowKey, slot: int) -> None:
        """Take a flow in; there must be room."""
        self._flows[key.version][key] = LearnedFlow(key, slot)

    def remove(self, flows: Iterable[LearnedFlow]) -> None:
        """Take flows out; those that are gone already don't matter."""
        for flow in flows:
            self._flows[flow.key.version].pop(flow.key, None)

    def update(self, version: int, readings: Mapping[FlowKey, Traffic]) -> Reading:
        """Take readings of a family's flows; the flows that ended stay until they are removed."""
        for key, traffic in readings.items():
            flow = self._flows[version].get(key)
            if flow is not None:
                flow.update(traffic)
        flows = self._flows[version].values()
        if any(flow.passes for flow in flows):
            self._proven.add(version)
        return Reading(
            ended=[flow for flow in flows if not flow.traffic.alive],
            stuck=next((flow for flow in flows if flow.stuck), None),
        )
