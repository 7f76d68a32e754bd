"""The load generators: how each is run in the client's namespace, and how its output is read."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bed import ECHO_PORT, Bed
from benchmarks.results import NoFigure

_GRACE_S: Final = 15.0  # on top of a generator's own time
_CONNECT_MS: Final = 3000
_UNITS_US: Final = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}
_ERRORS_ALLOWED: Final = 0.01  # of all requests: beyond it, a rate is not that of a working service
FIRST_PORT: Final = 2000


@dataclass(frozen=True, slots=True)
class Requests:
    """What wrk found: requests, seconds, and the latencies of requests in microseconds."""

    count: int
    seconds: float
    p50_us: float
    p99_us: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.count / self.seconds


@dataclass(frozen=True, slots=True)
class Bulk:
    """What iperf3's receiver found."""

    moved: int
    seconds: float

    @property
    def gbit_s(self) -> float:
        """Gigabits (10^9) per second."""
        return self.moved * 8 / self.seconds / 1e9


def wrk(bed: Bed, connections: int, seconds: int, *, version: int = 4, close: bool = False) -> Requests:
    """Ask nginx for two bytes, over and over, on connections that are kept (or not).

    Raises:
        NoFigure: too few answers, too many errors.
    """
    host = bed.lab.server_address(version)
    url = f"http://[{host}]/" if version == 6 else f"http://{host}/"
    header = ["-H", "Connection: close"] if close else []
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "4s", "--latency", *header, url]
    return parse_wrk(_run(bed, argv, seconds))


def iperf3_command(bed: Bed, streams: int, seconds: int, *, down: bool) -> list[str]:
    """Return the command line of a bulk transfer."""
    direction = ["-R"] if down else []
    target = ["-c", bed.server4, "--connect-timeout", str(_CONNECT_MS)]
    return ["iperf3", "-J", *target, "-t", str(seconds), "-P", str(streams), *direction]


def iperf3(bed: Bed, streams: int, seconds: int, *, down: bool) -> Bulk:
    """Move bytes as fast as they go.

    Raises:
        NoFigure: iperf3 failed.
    """
    return parse_iperf3(_run(bed, iperf3_command(bed, streams, seconds, down=down), seconds))


def udp_load(bed: Bed, *, flows: int, window: int, size: int, seconds: float) -> dict[str, float]:
    """Run `generators/udp_load.c`.

    Raises:
        NoFigure: no answer came.
    """
    numbers = (ECHO_PORT, flows, window, size, seconds)
    return _c_generator(bed, "udp_load", [bed.server4, *map(str, numbers)], seconds)


def udp_flows(bed: Bed, count: int, at_a_time: int) -> dict[str, float]:
    """Run `generators/udp_flows.c` from all addresses of the client.

    Raises:
        NoFigure: it failed.
    """
    sources = [bed.lab.client_address(4, host) for host in range(2, 10)]
    numbers = (ECHO_PORT, count, at_a_time, FIRST_PORT)
    return _c_generator(bed, "udp_flows", [bed.server4, *map(str, numbers), *sources], count / 1000)


def parse_wrk(text: str) -> Requests:
    """Read wrk's report.

    Raises:
        NoFigure: no requests were answered, or too many failed.
    """
    total = re.search(r"(\d+) requests in ([\d.]+)(us|ms|s|m),", text)
    if total is None or int(total[1]) == 0:
        raise NoFigure(f"wrk: no request was answered: {text.strip()[-200:]}")
    count = int(total[1])
    failed = sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", text)))
    failed += sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    if failed > count * _ERRORS_ALLOWED:
        raise NoFigure(f"wrk: {failed} errors beside {count} requests")
    return Requests(count, _us(total[2], total[3]) / 1e6, _percentile(text, 50), _percentile(text, 99))


def parse_iperf3(text: str) -> Bulk:
    """Read iperf3's JSON.

    Raises:
        NoFigure: it reports an error, or moved nothing.
    """
    report = _json(text, "iperf3")
    if "error" in report:
        raise NoFigure(f"iperf3: {report['error']}")
    received = report["end"]["sum_received"]
    if not received["bytes"]:
        raise NoFigure("iperf3: nothing was received")
    return Bulk(received["bytes"], received["seconds"])


def _percentile(text: str, which: int) -> float:
    found = re.search(rf"^\s+{which}%\s+([\d.]+)(us|ms|s|m)$", text, re.MULTILINE)
    if found is None:
        raise NoFigure(f"wrk: no {which}th percentile")
    return _us(found[1], found[2])


def _us(number: str, unit: str) -> float:
    return float(number) * _UNITS_US[unit]


def _c_generator(bed: Bed, name: str, arguments: Sequence[str], seconds: float) -> dict[str, float]:
    found: dict[str, float] = _json(_run(bed, [str(bed.tools / name), *arguments], seconds), name)
    return found


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise NoFigure(f"{name}: {text.strip()[-200:]}") from None


def _run(bed: Bed, argv: Sequence[str], seconds: float) -> str:
    try:
        done = bed.lab.client.run(argv, check=False, timeout=seconds + _GRACE_S)
    except subprocess.TimeoutExpired:
        raise NoFigure(f"{argv[0]}: no end after {seconds + _GRACE_S:.0f} s") from None
    return done.stdout or f"exit code {done.returncode}: {done.stderr}"
