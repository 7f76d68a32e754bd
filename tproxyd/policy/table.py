"""Tables that tell for a number which rules take it, as one integer with a bit for each rule.

The bit-vector scheme (Lakshman and Stiliadis, "High-speed policy-based packet forwarding", SIGCOMM 1998): the
numbers at which some rule begins or ends to match cut their line into pieces, and all numbers of a piece have the
same bits. A look-up is one binary search, however many rules and prefixes there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

Interval = tuple[int, int]
"""The first and the last number, both included."""


class IntervalTable:
    """From numbers to the rules that take them."""

    __slots__ = ("_bits", "_cuts")

    def __init__(self, intervals: Sequence[Iterable[Interval]], anything: int) -> None:
        """Args: intervals: for each rule in turn what it takes; anything: the bits of the rules that don't ask."""
        turns = [(at, rule) for rule, each in enumerate(intervals) for ends in merged(each) for at in _turns(ends)]
        turns.sort()
        self._cuts: list[int] = []
        self._bits: list[int] = [anything]
        known = {anything: anything}  # equal bits as one object: most pieces of a long list have the same
        bits = anything
        for at, rule in turns:
            bits ^= 1 << rule
            bits = known.setdefault(bits, bits)
            if self._cuts and self._cuts[-1] == at:
                self._bits[-1] = bits
            else:
                self._cuts.append(at)
                self._bits.append(bits)

    def __getitem__(self, number: int) -> int:
        """Return a bit for each rule that takes this number."""
        return self._bits[bisect_right(self._cuts, number)]


def merged(intervals: Iterable[Iterable[int]]) -> list[Interval]:
    """Return the same numbers as few intervals in rising order."""
    found: list[Interval] = []
    for first, last in sorted((first, last) for first, last in intervals):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _turns(interval: Interval) -> tuple[int, int]:
    return interval[0], interval[1] + 1
