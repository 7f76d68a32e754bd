"""What the flows of a soak carried: contents that both ends can make, checksums, and what went wrong."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Final

_POOL_BYTES: Final = 1 << 20
_POOL: Final = memoryview(random.Random(7440).randbytes(_POOL_BYTES) * 2)


def content(seed: int, position: int, count: int) -> memoryview:
    """Return bytes from `position` of the endless content that `seed` stands for; at most 1 MiB at a time."""
    begin = (seed + position) % _POOL_BYTES
    return _POOL[begin : begin + min(count, _POOL_BYTES)]


def checksum(seed: int, count: int) -> str:
    """Return the SHA-256 of the first bytes of a content."""
    made, position = hashlib.sha256(), 0
    while position < count:
        piece = content(seed, position, count - position)
        made.update(piece)
        position += len(piece)
    return made.hexdigest()


@dataclass(slots=True)
class Ledger:
    """Counts what went right, keeps what went wrong.

    Attributes:
        flows: that ended as planned, by kind.
        moved: bytes that arrived as they were sent.
        failures: one line for each flow that did not go as planned.
    """

    flows: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    failures: list[str] = field(default_factory=list)

    def ended(self, kind: str, moved: int) -> None:
        """Note a flow that went as planned."""
        self.flows[kind] = self.flows.get(kind, 0) + 1
        self.moved += moved

    def failed(self, kind: str, number: int, why: str) -> None:
        """Note a flow that did not."""
        self.failures.append(f"{kind} flow {number}: {why}")

    @property
    def count(self) -> int:
        """All flows that ended, well or not."""
        return sum(self.flows.values()) + len(self.failures)
