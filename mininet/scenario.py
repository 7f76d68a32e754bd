"""`make mininet`: runs every check in every topology with both rulesets.

`run` does it for one topology and one ruleset, in a `Place` of its own; the tests call it, too. What happens in
there (`--inside`) is told as one line of JSON a check.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from isolation import Place, missing

if TYPE_CHECKING:
    from checks import Row

TOPOLOGIES: Final = ("four-hosts", "two-gateways")
CHECK_NAMES: Final = (
    "tcp-ipv4",
    "tcp-ipv6",
    "udp-ipv4",
    "udp-ipv6",
    "udp-fragments-ipv4",
    "udp-fragments-ipv6",
    "second-port",
    "same-source-port",
    "access-log",
    "killed",
    "clean-stop",
    "killed-open",
)
RULESETS: Final = ("nftables", "iptables")
LIMIT_S: Final = 110.0

_COLUMNS: Final = ("host", "network", "sent_from", "asked", "server_saw", "answer_from", "problem")


@dataclass(frozen=True, slots=True)
class Result:
    """A check that was made.

    Attributes:
        rows: the table, each row by column.
        problem: why it could not even be made; empty if it could.
        logs: how the logs ended, where something was wrong.
    """

    check: str
    seconds: float
    rows: tuple[dict[str, str], ...] = ()
    problem: str = ""
    logs: str = ""

    @property
    def ok(self) -> bool:
        """It was made, and everything was as it must be."""
        return not self.problem and not any(row["problem"] for row in self.rows)

    def table(self) -> str:
        """The rows as aligned text."""
        titles = {column: column.replace("_", " ") for column in _COLUMNS}
        rows = [titles, *({**row, "problem": row["problem"] or "ok"} for row in self.rows)]
        widths = {column: max(len(row[column]) for row in rows) for column in _COLUMNS}
        lines = ["   " + "  ".join(row[column].ljust(widths[column]) for column in _COLUMNS).rstrip() for row in rows]
        return "\n".join(lines if self.rows else []) + (f"\n   {self.problem}" if self.problem else "")


def run(topology: str, ruleset: str, checks: Sequence[str] = ()) -> Iterator[Result]:
    """Make the checks in a fresh place, and give each result as it comes; the last ones are about the place itself.

    Args:
        topology: one of `TOPOLOGIES`.
        ruleset: one of `RULESETS`.
        checks: some of `CHECK_NAMES`; none for all.
    """
    started = time.monotonic()
    place = Place("scenario")
    with place:
        command = [sys.executable, str(Path(__file__).resolve()), "--topology", topology, "--ruleset", ruleset]
        inside = ["--inside", str(place.folder), *(f"--check={name}" for name in checks)]
        log = place.folder / "scenario.log"
        with log.open("w") as stderr:
            process = place.start([*command, *inside], stdout=-1, stderr=stderr)
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                yield Result(**json.loads(line))
            code = process.wait()
        finally:
            limit.cancel()
        seconds = round(time.monotonic() - started, 1)
        yield Result("finished", seconds, problem=f"exit code {code}: {log.read_text()}" if code else "")
    yield Result("nothing-left-behind", round(time.monotonic() - started, 1), problem="; ".join(place.residue()))


def main() -> int:
    """Run what was asked for; 0 only if all checks hold."""
    parser = argparse.ArgumentParser(description="Asserts from packets that tproxyd keeps the four-tuple.")
    parser.add_argument("--topology", choices=TOPOLOGIES, help="default: all")
    parser.add_argument("--ruleset", choices=RULESETS, help="default: both")
    parser.add_argument(
        "--check", action="append", choices=CHECK_NAMES, default=[], help="only this one; may be repeated"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return _inside(options.topology, options.ruleset, options.check, options.inside)
    if lacks := missing():
        print(f"scenario: this needs {', '.join(lacks)}", file=sys.stderr)
        return 77 if "root" in lacks else 69
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(line_buffering=True)
    failed = [
        f"{topology} {ruleset} {result.check}"
        for topology in ([options.topology] if options.topology else TOPOLOGIES)
        for ruleset in ([options.ruleset] if options.ruleset else RULESETS)
        for result in _printed(topology, ruleset, options.check)
        if not result.ok
    ]
    print("\n" + ("\n".join(f"FAILED {name}" for name in failed) or "all checks hold"))
    return 1 if failed else 0


def _printed(topology: str, ruleset: str, checks: Sequence[str]) -> Iterator[Result]:
    print(f"\n=== {topology}, {ruleset} ===")
    for result in run(topology, ruleset, checks):
        print(f"{'ok    ' if result.ok else 'FAILED'} {result.check}  ({result.seconds:.1f} s)")
        if table := result.table():
            print(table)
        if result.logs:
            print(f"   The logs end with:\n{result.logs}")
        yield result


def _inside(topology: str, ruleset: str, names: Sequence[str], folder: Path) -> int:
    from capture import Capture
    from checks import Scenario
    from testbed import log_tails, testbed
    from topologies import TOPOLOGIES as CLASSES

    started = time.monotonic()
    with testbed(CLASSES[topology](), folder) as bed:
        taps = {name: (bed.node(name).pid, "eth0") for name in (*bed.topology.clients, "server")}
        with Capture(taps) as capture:
            try:
                bed.start_gateways(ruleset)
            except (RuntimeError, TimeoutError) as error:
                _tell(Result("start", round(time.monotonic() - started, 1), problem=str(error), logs=log_tails(folder)))
                return 1
            _tell(Result("start", round(time.monotonic() - started, 1)))
            scenario = Scenario(bed, capture, ruleset)
            for name in names or CHECK_NAMES:
                result = _checked(scenario, name)
                _tell(result if result.ok else replace(result, logs=log_tails(folder)))
    return 0


def _checked(scenario: object, name: str) -> Result:
    """Make a check; whatever goes wrong in it is its result, and the others are made all the same."""
    from checks import CHECKS

    started = time.monotonic()
    rows: list[Row] = []
    problem = ""
    try:
        rows = CHECKS[name](scenario)
    except Exception:  # noqa: BLE001  # a check's border
        problem = traceback.format_exc()
    return Result(name, round(time.monotonic() - started, 1), tuple(asdict(row) for row in rows), problem)


def _tell(result: Result) -> None:
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
