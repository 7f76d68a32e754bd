"""`python -m benchmarks`: the command line of `make bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.chart import svg
from benchmarks.measure import machine, versions
from benchmarks.report import table, write_json
from benchmarks.results import Results
from benchmarks.runner import run
from benchmarks.subjects import SUBJECTS
from benchmarks.targets import verdicts
from benchmarks.workloads import FULL, QUICK, WORKLOADS, Scale, Workload

_LATEST: Final = Path(__file__).parent / "results" / "latest.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured.

    Returns 0 if everything was measured; 1 if something gave no figure, or, with `--strict`, if a target was missed.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.list:
        print("\n".join(f"{each.name:18} {each.title}" for each in WORKLOADS))
        return 0
    if asked.show is not None:
        results = Results.from_json(json.loads(asked.show.read_text()))
    elif os.geteuid() != 0:
        parser.error("benchmarks need root: they work in network namespaces")
    else:
        results = _measured(asked)
        write_json(results, asked.json)
    print(table(results))
    if asked.chart is not None:
        asked.chart.write_text(svg(results))
    missed = asked.strict and any(each.reached is False for each in verdicts(results))
    return 1 if results.errors or missed else 0


def _measured(asked: argparse.Namespace) -> Results:
    scale = QUICK if asked.quick else FULL
    subjects = [each for each in SUBJECTS if not asked.subject or each.name in asked.subject]
    results = Results(_about(scale))
    try:
        run(results, _chosen(asked.only), scale, subjects)
    except KeyboardInterrupt:
        print("interrupted: what was measured until now follows", file=sys.stderr)
    return results


def _about(scale: Scale) -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "load_before": round(os.getloadavg()[0], 2),
        "rounds": scale.rounds,
        "seconds": scale.seconds,
        "idle_flows": scale.idle_flows,
        "short_flows": scale.short_flows,
        "dns_flows": scale.dns_flows,
        "cpu": "utime + stime of the proxy's processes; softirq time is charged to whatever it interrupted",
    }


def _chosen(only: Sequence[str]) -> list[Workload]:
    return [each for each in WORKLOADS if not only or each.name in only]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="tproxyd beside its peers")
    names = [each.name for each in WORKLOADS]
    parser.add_argument(
        "--only", action="append", default=[], choices=names, metavar="NAME", help="one workload; may be repeated"
    )
    parser.add_argument(
        "--subject",
        action="append",
        default=[],
        choices=[each.name for each in SUBJECTS],
        help="one subject; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the workloads")
    parser.add_argument("--quick", action="store_true", help="one short round: about 2 minutes in place of 10")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--json", type=Path, default=_LATEST, metavar="FILE", help="where the results go")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also write a bar chart as SVG")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: show the results in a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
