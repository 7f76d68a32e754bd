"""What a run found: samples, their medians, ratios between subjects. Values and arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class NoFigure(Exception):
    """What was measured is not what should have been; there is no figure."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One of the figures of a workload.

    Attributes:
        key: its name in JSON.
        unit: as shown.
        digits: behind the point, as shown.
        more_is_better: which way is better.
    """

    key: str
    unit: str
    digits: int = 0
    more_is_better: bool = False


@dataclass(slots=True)
class Cell:
    """One workload on one subject.

    Attributes:
        samples: one mapping from metrics' keys to values for each round that gave figures.
        errors: why the other rounds gave none.
    """

    samples: list[Mapping[str, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def median(self, key: str) -> float | None:
        """Return the median over the rounds; None if a round failed, or none was run."""
        values = [sample[key] for sample in self.samples if key in sample]
        return statistics.median(values) if values and not self.errors else None


@dataclass(slots=True)
class Results:
    """Everything that a run found.

    Attributes:
        about: machine, kernel, versions, settings of the run.
        cells: by names of workload and subject, in the order of measuring.
    """

    about: Mapping[str, Any]
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def cell(self, workload: str, subject: str) -> Cell:
        """Return the cell of a workload and a subject, made if there is none."""
        return self.cells.setdefault((workload, subject), Cell())

    def median(self, workload: str, subject: str, key: str) -> float | None:
        """Return a median; None where there is none."""
        found = self.cells.get((workload, subject))
        return found.median(key) if found else None

    def ratio(self, workload: str, key: str, subject: str, other: str) -> float | None:
        """Return how many times `other`'s median `subject`'s is; None where either is missing or zero."""
        one, two = self.median(workload, subject, key), self.median(workload, other, key)
        return one / two if one is not None and two else None

    @property
    def errors(self) -> list[str]:
        """Whatever gave no figure, one a line."""
        return [
            f"{workload}, {subject}: {error}"
            for (workload, subject), cell in self.cells.items()
            for error in dict.fromkeys(cell.errors)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "about": dict(self.about),
            "results": [
                {
                    "workload": workload,
                    "subject": subject,
                    "median": {key: cell.median(key) for key in (cell.samples[0] if cell.samples else ())},
                    "samples": [dict(sample) for sample in cell.samples],
                    "errors": cell.errors,
                }
                for (workload, subject), cell in self.cells.items()
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Results:
        """Read back what `as_json` gave.

        Raises:
            KeyError: it is something else.
        """
        made = cls(values["about"])
        for each in values["results"]:
            made.cells[each["workload"], each["subject"]] = Cell(each["samples"], each["errors"])
        return made
