"""The table on the terminal and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from benchmarks.results import Metric, Results
from benchmarks.subjects import SUBJECTS, TproxydBypass
from benchmarks.targets import Verdict, verdicts
from benchmarks.workloads import WORKLOADS, Workload

_LOAD: Final = 0.5  # average of a minute, beyond which something else runs
_WORDS: Final = {True: "reached", False: "MISSED", None: "not measured"}


def write_json(results: Results, path: Path) -> None:
    """Write results and verdicts; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**results.as_json(), "targets": [asdict(each) for each in verdicts(results)]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def table(results: Results) -> str:
    """Return all of it for a terminal: what it ran on, medians, targets, errors."""
    parts = [_about(results), _medians(results), _targets(verdicts(results))]
    if results.errors:
        parts.append("No figure:\n" + "\n".join(f"  {line}" for line in results.errors))
    return "\n\n".join(parts)


def _about(results: Results) -> str:
    about, machine = results.about, results.about["machine"]
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_mb'] / 1024:.0f} GB"
    lines = [
        f"{hardware}; {machine['system']}, Linux {machine['kernel']}",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"rounds: {about['rounds']}, interleaved, {about['seconds']} s each; medians",
    ]
    if about["load_before"] > _LOAD:
        lines.append(f"NOT QUIET: the load was {about['load_before']} before it began; these figures say little")
    return "\n".join(lines)


def _medians(results: Results) -> str:
    subjects = [each for each in SUBJECTS if any(subject == each.name for _, subject in results.cells)]
    rows = [("", "", *(each.title for each in subjects))]
    for workload in WORKLOADS:
        for number, metric in enumerate(workload.metrics):
            figures = [_figure(results, workload, each.name, metric) for each in subjects]
            if any(figures):
                rows.append((workload.title if not number else "", metric.unit, *figures))
    rows.extend(_bypass(results, len(subjects)))
    return "\n".join(_aligned(rows, left=2))


def _bypass(results: Results, columns: int) -> Iterator[tuple[str, ...]]:
    """Its subject has no column of its own: it is tproxyd, asked for something else."""
    for workload in WORKLOADS:
        if workload.subjects != frozenset({TproxydBypass.name}):
            continue
        at = [each.name for each in SUBJECTS].index("tproxyd")
        for number, metric in enumerate(workload.metrics):
            figure = _figure(results, workload, TproxydBypass.name, metric)
            cells = [figure if column == min(at, columns - 1) else "" for column in range(columns)]
            if figure:
                yield (workload.title if not number else "", metric.unit, *cells)


def _figure(results: Results, workload: Workload, subject: str, metric: Metric) -> str:
    if (workload.name, subject) not in results.cells:
        return ""
    value = results.median(workload.name, subject, metric.key)
    return "none" if value is None else f"{value:,.{metric.digits}f}"


def _targets(found: Sequence[Verdict]) -> str:
    rows = [("target", "wanted", "found", "")]
    rows += [
        (each.name, each.wanted, "" if each.found is None else f"{each.found:.2f}", _WORDS[each.reached])
        for each in found
    ]
    return "\n".join(_aligned(rows, left=2))


def _aligned(rows: Sequence[tuple[str, ...]], left: int) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
