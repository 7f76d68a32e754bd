"""`python -m benchmarks.experiments.sockmap`: the relay beside tproxyd and HAProxy, as root; about 5 minutes.

Two things are measured that the suite leaves out: the CPU time of everything, since the bytes of a sockmap are moved by
kernel threads that belong to no process; and how much a flow takes from a server while its client reads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import resource
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.bed import Bed
from benchmarks.measure import cpu_s
from benchmarks.results import Metric, NoFigure, Results
from benchmarks.runner import run
from benchmarks.subjects import PORT, HAProxy, Peer, Tproxyd
from benchmarks.workloads import Cpu, Sample, Scale, Workload

_MB: Final = 1e6
_SLOW_PORT: Final = 9000
_MOST_BYTES: Final = 512 << 20
_FULL_S: Final = 1.0
_KERNEL_THREADS: Final = ("kworker", "ksoftirqd")


class Sockmap(Peer):
    """`relay`: sockets joined in the kernel."""

    name = "sockmap"
    title = "sockmap relay"
    networks = frozenset({"tcp"})
    keeps_address = True

    def start(self) -> None:
        """Start its processes."""
        self._launch(sys.executable, "-m", "benchmarks.experiments.sockmap.relay", str(PORT))


class Everything:
    """The CPU time of proxy, server, generator and the kernel's threads, from here on; nothing else must run."""

    def __init__(self, bed: Bed) -> None:
        """Begin."""
        self._proxy = Cpu(bed)
        self._servers = bed.lab.server.pids()
        self._programs_before = cpu_s(self._servers) + _generators_s()
        self._threads_before = _kernel_threads_s()

    def used_us(self, count: float) -> dict[str, float]:
        """Return microseconds since, for each of `count`: the proxy's own, and everything's."""
        proxy = self._proxy.used_s()
        programs = cpu_s(self._servers) + _generators_s() - self._programs_before
        threads = sum(now - self._threads_before.get(pid, 0.0) for pid, now in _kernel_threads_s().items())
        return {"cpu_us": proxy * 1e6 / count, "all_us": (proxy + programs + threads) * 1e6 / count}


class Exchange(Workload):
    """wrk and nginx, as in the suite."""

    metrics = (
        Metric("rate", "/s", more_is_better=True),
        Metric("p99_us", "µs p99"),
        Metric("cpu_us", "CPU µs each, proxy", 1),
        Metric("all_us", "CPU µs each, everything", 1),
    )

    def __init__(self, connections: int, *, close: bool = False) -> None:
        """On as many connections, kept or closed by the server after each answer."""
        self.name = self.title = f"new connections, {connections}" if close else f"request/response, {connections}"
        self._connections, self._close = connections, close

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run wrk once."""
        cpu = Everything(bed)
        found = load.wrk(bed, self._connections, scale.seconds, close=self._close)
        flows = found.count if self._close else self._connections
        values = {"rate": found.rate, "p99_us": found.p99_us, **cpu.used_us(found.count)}
        return Sample(values, tcp=flows, flows=flows)


class Bulk(Workload):
    """iperf3, as in the suite."""

    metrics = (
        Metric("gbit_s", "Gbit/s", 2, more_is_better=True),
        Metric("cpu_us", "CPU µs/MB, proxy", 1),
        Metric("all_us", "CPU µs/MB, everything", 1),
    )

    def __init__(self, streams: int, *, down: bool) -> None:
        """As many streams, towards the client or the server."""
        self.name = self.title = f"bulk {'down' if down else 'up'}, {streams}"
        self._streams, self._down = streams, down

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run iperf3 once."""
        cpu = Everything(bed)
        found = load.iperf3(bed, self._streams, scale.seconds, down=self._down)
        flows = self._streams + 1  # its control connection
        return Sample({"gbit_s": found.gbit_s, **cpu.used_us(found.moved / _MB)}, tcp=flows, flows=flows)


class SlowReader(Workload):
    """A server that sends all it can to a client that reads nothing until then."""

    name = title = "slow reader"
    metrics = (Metric("held_mb", f"MB taken, of {_MOST_BYTES / _MB:.0f} at most"),)
    once = True

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Fill it, drain it, compare what went in with what came out."""
        with bed.lab.server.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((bed.server4, _SLOW_PORT))
            listener.listen()
            with bed.lab.client.tcp((bed.server4, _SLOW_PORT)) as client, listener.accept()[0] as server:
                taken, digest = _fill(server)
                server.shutdown(socket.SHUT_WR)
                if _drain(client) != digest:
                    raise NoFigure(f"what arrived is not what was sent ({taken} bytes)")
        return Sample({"held_mb": taken / _MB}, tcp=1, flows=1)


def _fill(server: socket.socket) -> tuple[int, bytes]:
    server.settimeout(_FULL_S)
    piece, taken, digest = os.urandom(1 << 16), 0, hashlib.sha256()
    while taken < _MOST_BYTES:
        try:
            count = server.send(piece)
        except TimeoutError:
            break
        digest.update(piece[:count])
        taken += count
    return taken, digest.digest()


def _drain(client: socket.socket) -> bytes:
    digest = hashlib.sha256()
    while data := client.recv(1 << 20):
        digest.update(data)
    return digest.digest()


def _kernel_threads_s() -> dict[int, float]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/comm"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):  # it ended
            if path.read_text().startswith(_KERNEL_THREADS):
                found[pid] = cpu_s([pid])
    return found


def _generators_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_WORKLOADS: Final[tuple[Workload, ...]] = (
    Exchange(32),
    Exchange(1),
    Exchange(32, close=True),
    *(Bulk(streams, down=down) for down in (False, True) for streams in (1, 4)),
    SlowReader(),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print medians; return 1 if something gave no figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.sockmap", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved (default: 5)")
    asked = parser.parse_args(arguments)
    if os.geteuid() != 0:
        parser.error("benchmarks need root: they work in network namespaces")
    print(f"load before: {os.getloadavg()[0]:.1f}; other programs spoil these figures")
    results, subjects = Results({}), (HAProxy, Tproxyd, Sockmap)
    run(results, _WORKLOADS, Scale(asked.rounds, seconds=2, idle_flows=0, short_flows=0, dns_flows=0), subjects)
    print(f"{'':22}{'':26}" + "".join(f"{each.title:>15}" for each in subjects))
    for workload in _WORKLOADS:
        for metric in workload.metrics:
            medians = [results.median(workload.name, each.name, metric.key) for each in subjects]
            shown = ("none" if each is None else f"{each:,.{metric.digits}f}" for each in medians)
            print(f"{workload.title:22}{metric.unit:26}" + "".join(f"{each:>15}" for each in shown))
    for line in results.errors:
        print("no figure:", line)
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
