"""What tproxyd is to reach, in ratios to its peers within one run wherever the machine has a say in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from benchmarks.results import Results

_PEERS: Final = ("haproxy", "v2ray")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How tproxyd stands to a target.

    Attributes:
        name: what was measured.
        wanted: as shown.
        found: None if something for it was not measured.
        reached: None likewise.
    """

    name: str
    wanted: str
    found: float | None
    reached: bool | None


def verdicts(results: Results) -> list[Verdict]:
    """Hold results to all targets, in the order of the workloads."""
    return [*_rates(results), *_bulk(results), *_udp(results), *_costs(results), *_alone(results)]


def _rates(results: Results) -> Iterator[Verdict]:
    for workload, name in (("connections", "new connections"), ("requests-32", "request/response, 32 connections")):
        yield _at_least(f"{name}: rate", 1.0, results.ratio(workload, "rate", "tproxyd", "haproxy"), "× HAProxy")
        yield _at_most(f"{name}: p99", 1.0, results.ratio(workload, "p99_us", "tproxyd", "haproxy"), "× HAProxy")


def _bulk(results: Results) -> Iterator[Verdict]:
    for way in ("up", "down"):
        for streams in (1, 4):
            ratio = _to_best(results, f"bulk-{way}-{streams}", "gbit_s", max)
            name = f"bulk TCP {way}, {streams} stream{'s' if streams > 1 else ''}"
            yield _at_least(name, 1.3, ratio, "× the better of HAProxy and V2Ray")
            cost = results.ratio(f"bulk-{way}-{streams}", "cpu_s_per_gb", "tproxyd", "haproxy")
            yield _at_most(f"{name}: CPU per GB", 0.4, cost, "× HAProxy")


def _udp(results: Results) -> Iterator[Verdict]:
    for subject, how in (("tproxyd-learned", "learned"), ("tproxyd", "relayed")):
        for size in (64, 1200):
            yield _at_least(
                f"UDP, {size} bytes, {how}: datagrams per second",
                2.0,
                results.ratio(f"udp-{size}", "pps", subject, "v2ray"),
                "× V2Ray",
            )
        ratio = results.ratio("udp-ping-pong", "p50_us", subject, "v2ray")
        yield _at_most(f"UDP ping-pong, {how}: p50", 1.0, ratio, "× V2Ray")
    for size in (64, 1200):
        ratio = results.ratio(f"udp-{size}", "pps", "tproxyd-learned", "routing")
        yield _at_least(f"UDP, {size} bytes, learned: datagrams per second", 0.95, ratio, "× kernel routing")


def _costs(results: Results) -> Iterator[Verdict]:
    for network, kb in (("tcp", 2.0), ("udp", 3.0)):
        found = results.median(f"memory-{network}", "tproxyd", "kb")
        yield _at_most(f"memory of an idle {network.upper()} flow", kb, found, "kB")


def _alone(results: Results) -> Iterator[Verdict]:
    yield _at_most("memory grown over short flows", 512, results.median("growth", "tproxyd", "grown_kb"), "kB")
    yield _at_most("start to first relayed flow", 0.5, results.median("start-up", "tproxyd", "seconds"), "s")
    yield _at_most("p99 beside bulk streams", 3.0, results.median("fairness", "tproxyd", "times"), "× alone")


def _to_best(results: Results, workload: str, key: str, best: Callable[..., float]) -> float | None:
    own = results.median(workload, "tproxyd", key)
    theirs = [results.median(workload, peer, key) for peer in _PEERS]
    known = [value for value in theirs if value]
    return own / best(known) if own is not None and len(known) == len(theirs) else None


def _at_least(name: str, bound: float, found: float | None, of: str) -> Verdict:
    return Verdict(name, f"≥ {bound:g} {of}", found, None if found is None else found >= bound)


def _at_most(name: str, bound: float, found: float | None, of: str) -> Verdict:
    return Verdict(name, f"≤ {bound:g} {of}", found, None if found is None else found <= bound)
