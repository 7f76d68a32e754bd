"""The rounds: A B C A B C, each sample held to what the witness and the subject's own counters say."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bed import Bed
from benchmarks.generators import build
from benchmarks.results import Cell, NoFigure, Results
from benchmarks.subjects import SUBJECTS, Subject, TproxydBypass
from benchmarks.workloads import Sample, Scale, Workload


def run(
    results: Results,
    workloads: Iterable[Workload],
    scale: Scale,
    subjects: Sequence[type[Subject]] = SUBJECTS,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Measure all workloads on all subjects, and put what is found into `results`.

    Subjects stand in namespaces of their own, side by side, and run idle while another is measured. One that does not
    start is an error in each of its cells. Everything is taken down at the end.
    """
    with tempfile.TemporaryDirectory(prefix="tproxyd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # workers are another user
        (folder / "tools").mkdir()
        build(folder / "tools")
        with ExitStack() as stack:
            beds = {each: stack.enter_context(Bed(each, folder / each.name, folder / "tools")) for each in subjects}
            for workload in workloads:
                tell(workload.title)
                _rounds(workload, _fitting(workload, beds), scale, results)
                _own_bed(workload, subjects, folder, scale, results)


def _rounds(workload: Workload, beds: Sequence[Bed], scale: Scale, results: Results) -> None:
    for _ in range(1 if workload.once else scale.rounds):
        for bed in beds:
            cell = results.cell(workload.name, bed.subject.name)
            _try(workload, bed, scale, cell)


def _own_bed(
    workload: Workload, subjects: Sequence[type[Subject]], folder: Path, scale: Scale, results: Results
) -> None:
    """Measure a subject that only one workload wants."""
    wanted = workload.subjects or frozenset()
    if TproxydBypass.name in wanted and any(each.name == "tproxyd" for each in subjects):
        with Bed(TproxydBypass, folder / TproxydBypass.name, folder / "tools") as bed:
            _rounds(workload, [bed], scale, results)


def _fitting(workload: Workload, beds: dict[type[Subject], Bed]) -> list[Bed]:
    return [
        bed
        for subject, bed in beds.items()
        if workload.network in subject.networks
        and (workload.subjects is None or subject.name in workload.subjects)
        and (subject.workloads is None or workload.name in subject.workloads)
    ]


def _try(workload: Workload, bed: Bed, scale: Scale, cell: Cell) -> None:
    try:
        cell.samples.append(_sample(workload, bed, scale).values)
    except (NoFigure, AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        cell.errors.append(str(error) or type(error).__name__)
        bed.restart()  # the next workload finds it as it should be


def _sample(workload: Workload, bed: Bed, scale: Scale) -> Sample:
    if workload.fresh:
        bed.restart()
    before = bed.witnessed()
    found = workload.sample(bed, scale)
    bed.check(before, tcp=found.tcp, udp=found.udp, flows=found.flows)
    return found
