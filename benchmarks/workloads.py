"""What is measured: each workload gives, for one subject and one round, a value for each of its metrics.

Also what must have crossed the subject for that, which the runner holds against the witness and the subject's counters.
"""

from __future__ import annotations

import resource
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Final

from benchmarks import load
from benchmarks.bed import ECHO_PORT, Bed
from benchmarks.measure import cpu_s, private_kb
from benchmarks.results import Metric, NoFigure

_PROXIES: Final = frozenset({"tproxyd", "haproxy", "v2ray"})
_REQUEST: Final = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
_GB: Final = 1e9


@dataclass(frozen=True, slots=True)
class Scale:
    """How long and how much.

    Attributes:
        rounds: how often each workload is run on each subject.
        seconds: of one sample.
        idle_flows: whose memory is measured.
        short_flows: after which memory must not have grown.
        dns_flows: UDP flows of one query each.
    """

    rounds: int
    seconds: int
    idle_flows: int
    short_flows: int
    dns_flows: int


FULL: Final = Scale(rounds=3, seconds=2, idle_flows=4000, short_flows=100_000, dns_flows=8000)
QUICK: Final = Scale(rounds=1, seconds=1, idle_flows=2000, short_flows=20_000, dns_flows=4000)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Attributes:
        values: by the metrics' keys.
        tcp: connections that the gateway must have made to the server.
        udp: datagrams that it must have sent there.
        flows: flows that the subject must have counted.
    """

    values: Mapping[str, float]
    tcp: int = 0
    udp: int = 0
    flows: int = 0


class Workload(ABC):
    """One kind of traffic.

    Attributes:
        name: in `--only` and JSON.
        title: in tables and charts.
        network: what it needs of a subject: tcp or udp.
        metrics: what it measures, the most telling one first.
        fresh: the subject is started anew for each sample.
        once: one round is enough, as time has no part in it.
        subjects: those it makes sense for; None for all.
    """

    name: str
    title: str
    network: str = "tcp"
    metrics: tuple[Metric, ...]
    fresh: ClassVar[bool] = False
    once: ClassVar[bool] = False
    subjects: ClassVar[frozenset[str] | None] = None

    @abstractmethod
    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Measure once.

        Raises:
            NoFigure: it did not work.
        """


class BulkTcp(Workload):
    """Bytes one way on some streams, by iperf3."""

    metrics = (Metric("gbit_s", "Gbit/s", 2, more_is_better=True), Metric("cpu_s_per_gb", "CPU s/GB", 2))

    def __init__(self, streams: int, *, down: bool) -> None:
        """As many streams, towards the client or the server."""
        way = "down" if down else "up"
        self.name = f"bulk-{way}-{streams}"
        self.title = f"bulk TCP {way}, {streams} stream{'s' if streams > 1 else ''}"
        self._streams, self._down = streams, down

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run iperf3 once."""
        cpu = Cpu(bed)
        found = load.iperf3(bed, self._streams, scale.seconds, down=self._down)
        values = {"gbit_s": found.gbit_s, "cpu_s_per_gb": cpu.used_s() * _GB / found.moved}
        flows = self._streams + 1  # its control connection
        return Sample(values, tcp=flows, flows=flows)


class Requests(Workload):
    """Small requests on connections that are kept, by wrk and nginx."""

    metrics = (
        Metric("rate", "requests/s", more_is_better=True),
        Metric("p50_us", "µs p50"),
        Metric("p99_us", "µs p99"),
        Metric("cpu_us", "CPU µs each", 1),
    )

    def __init__(self, connections: int, version: int = 4) -> None:
        """On as many connections, over IPv4 or IPv6."""
        self.name = f"requests-{connections}" + ("-ipv6" if version == 6 else "")
        plural = "s" if connections > 1 else ""
        self.title = f"request/response, {connections} connection{plural}" + (", IPv6" if version == 6 else "")
        self._connections, self._version = connections, version

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run wrk once."""
        cpu = Cpu(bed)
        found = load.wrk(bed, self._connections, scale.seconds, version=self._version)
        return Sample(_of(found, cpu), tcp=self._connections, flows=self._connections)


class Connections(Workload):
    """A new connection for each request, closed by the server."""

    name = "connections"
    title = "new connections, 32 at a time"
    metrics = (*Requests.metrics[:1], *Requests.metrics[2:])

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run wrk once."""
        cpu = Cpu(bed)
        found = load.wrk(bed, 32, scale.seconds + 1, close=True)
        values = {key: value for key, value in _of(found, cpu).items() if key != "p50_us"}
        return Sample(values, tcp=found.count, flows=found.count)


class Fairness(Workload):
    """What 64 bulk streams do to the latency of small requests that go the same way."""

    name = "fairness"
    title = "32 request/response connections beside 64 bulk streams"
    metrics = (
        Metric("times", "× p99 alone", 1),
        Metric("p99_us", "µs p99"),
        Metric("alone_us", "µs p99 alone"),
        Metric("rate", "requests/s", more_is_better=True),
    )
    _STREAMS: ClassVar = 64

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run wrk alone, then beside iperf3."""
        alone = load.wrk(bed, 32, scale.seconds)
        command = load.iperf3_command(bed, self._STREAMS, scale.seconds + 1, down=True)
        bulk = bed.lab.client.popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        time.sleep(0.5)  # it is under way when wrk begins, and when wrk ends
        beside = load.wrk(bed, 32, scale.seconds)
        output, _ = bulk.communicate(timeout=30)
        load.parse_iperf3(output)
        values = {
            "times": beside.p99_us / alone.p99_us,
            "p99_us": beside.p99_us,
            "alone_us": alone.p99_us,
            "rate": beside.rate,
        }
        flows = 64 + self._STREAMS + 1
        return Sample(values, tcp=flows, flows=flows)


class UdpRate(Workload):
    """Datagrams to an echo server and back, as many as the path carries without loss."""

    network = "udp"
    metrics = (
        Metric("pps", "datagrams/s", more_is_better=True),
        Metric("lost", "% lost", 2),
        Metric("cpu_us", "CPU µs each", 1),
    )
    _FLOWS: ClassVar = 8
    _WINDOW: ClassVar = 32

    def __init__(self, size: int) -> None:
        """With datagrams of as many bytes."""
        self.name = f"udp-{size}"
        self.title = f"UDP, {size} bytes, {self._FLOWS} flows"
        self._size = size

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run the generator once; each datagram counts once on its way there and once on its way back."""
        cpu = Cpu(bed)
        found = load.udp_load(bed, flows=self._FLOWS, window=self._WINDOW, size=self._size, seconds=scale.seconds)
        if not found["datagrams"]:
            raise NoFigure("no datagram came back")
        relayed = 2 * found["datagrams"]
        values = {
            "pps": relayed / found["seconds"],
            "lost": 100 * found["lost"] / (found["datagrams"] + found["lost"]),
            "cpu_us": cpu.used_s() * 1e6 / relayed,
        }
        return Sample(values, udp=int(found["datagrams"]), flows=self._FLOWS)


class UdpPingPong(Workload):
    """One datagram at a time, there and back."""

    name = "udp-ping-pong"
    title = "UDP ping-pong, 64 bytes"
    network = "udp"
    metrics = (Metric("p50_us", "µs p50"), Metric("p99_us", "µs p99"))

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run the generator with a window of one."""
        found = load.udp_load(bed, flows=1, window=1, size=64, seconds=scale.seconds)
        if not found["datagrams"]:
            raise NoFigure("no datagram came back")
        values = {key: found[key] for key in ("p50_us", "p99_us")}
        return Sample(values, udp=int(found["datagrams"]), flows=1)


class UdpFlows(Workload):
    """A flow for each query, as DNS has it."""

    name = "udp-short-flows"
    title = "short UDP flows, 64 at a time"
    network = "udp"
    metrics = (
        Metric("rate", "flows/s", more_is_better=True),
        Metric("lost", "% lost", 2),
        Metric("cpu_us", "CPU µs each", 1),
    )
    fresh = True  # the flows of the round before would still be there

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Run the generator once."""
        cpu = Cpu(bed)
        found = load.udp_flows(bed, scale.dns_flows, 64)
        if not found["answered"]:
            raise NoFigure("no query was answered")
        answered = int(found["answered"])
        values = {
            "rate": answered / found["seconds"],
            "lost": 100 * found["lost"] / scale.dns_flows,
            "cpu_us": cpu.used_s() * 1e6 / answered,
        }
        return Sample(values, udp=answered, flows=answered)


class IdleMemory(Workload):
    """The memory of flows that have carried something and now carry nothing."""

    metrics = (Metric("kb", "kB each", 2),)
    fresh = True
    once = True
    subjects = _PROXIES
    _WARM: ClassVar = 100
    _PATIENCE_S: ClassVar = 0.5
    _SILENT: ClassVar = 0.02  # of the flows may stay without an answer: V2Ray loses some UDP flows at their beginning

    def __init__(self, network: str) -> None:
        """TCP or UDP."""
        self.name = f"memory-{network}"
        self.title = f"memory of an idle {network.upper()} flow"
        self.network = network

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Hold flows open, and look at the memory before and after."""
        allow_descriptors()
        with ExitStack() as held:
            self._open(bed, held, self._WARM)  # first use of code and allocators
            time.sleep(0.5)
            before = private_kb(bed.lab.gateway.pids())
            self._open(bed, held, scale.idle_flows)
            time.sleep(0.5)
            grown = private_kb(bed.lab.gateway.pids()) - before
        count = self._WARM + scale.idle_flows
        crossed = int(count * (1 - self._SILENT))
        return Sample({"kb": grown / scale.idle_flows}, flows=crossed, **{self.network: crossed})

    def _open(self, bed: Bed, held: ExitStack, count: int) -> None:
        connected = {"tcp": bed.lab.client.tcp, "udp": bed.lab.client.udp}[self.network]
        port, said = {"tcp": (80, _REQUEST), "udp": (ECHO_PORT, b"x" * 64)}[self.network]
        silent = 0
        for _ in range(count):
            try:
                flow = held.enter_context(connected((bed.server4, port), timeout_s=self._PATIENCE_S))
                silent += not _answered(flow, said)
            except OSError as error:
                raise NoFigure(f"a flow failed: {error}") from None
            if silent > self._SILENT * count or (silent and self.network == "tcp"):
                raise NoFigure(f"{silent} flows were not answered")


def _answered(flow: socket.socket, said: bytes) -> bool:
    flow.sendall(said)
    try:
        return bool(flow.recv(4096))
    except TimeoutError:
        return False


class Growth(Workload):
    """Memory before and after many short flows."""

    name = "growth"
    title = "memory after many short TCP flows"
    metrics = (Metric("grown_kb", "kB grown"), Metric("flows", "flows", more_is_better=True))
    fresh = True
    once = True
    subjects = _PROXIES - {"v2ray"}  # it makes a third of them in a minute
    _LIMIT_S: ClassVar = 60

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Make as many flows as the scale wants, a fifth more before to get warm."""
        made = self._make(bed, scale.short_flows // 5)
        before = private_kb(bed.lab.gateway.pids())
        counted = self._make(bed, scale.short_flows)
        time.sleep(1)
        grown = private_kb(bed.lab.gateway.pids()) - before
        return Sample({"grown_kb": grown, "flows": counted}, tcp=made + counted, flows=made + counted)

    def _make(self, bed: Bed, count: int) -> int:
        made, end = 0, time.monotonic() + self._LIMIT_S
        while made < count:
            made += load.wrk(bed, 32, 2, close=True).count
            if time.monotonic() > end:
                raise NoFigure(f"only {made} of {count} flows in {self._LIMIT_S} s")
        return made


class StartUp(Workload):
    """From starting the program to the first answer that a client gets through it."""

    name = "start-up"
    title = "start to first relayed flow"
    metrics: tuple[Metric, ...] = (Metric("seconds", "s", 2),)
    fresh = True
    subjects = _PROXIES
    _LIMIT_S: ClassVar = 30.0
    _PATIENCE_S: ClassVar = 0.01  # for one try; a SYN that is lost would be sent again after a second

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """Stop the subject, start it, and ask until there is an answer."""
        bed.stop()
        answered: list[float] = []
        asking = threading.Thread(target=self._ask, args=(bed, answered))
        before = time.monotonic()
        asking.start()
        bed.subject.start()
        asking.join()
        if not answered:
            raise NoFigure(f"no answer within {self._LIMIT_S:.0f} s")
        return Sample({"seconds": answered[0] - before}, tcp=1, flows=1)

    def _ask(self, bed: Bed, answered: list[float]) -> None:
        end = time.monotonic() + self._LIMIT_S
        while time.monotonic() < end:
            try:
                with bed.lab.client.socket(socket.AF_INET, socket.SOCK_STREAM, timeout_s=self._PATIENCE_S) as trying:
                    trying.connect((bed.server4, 80))
                    trying.settimeout(1)
                    trying.sendall(_REQUEST)
                    if trying.recv(4096):
                        answered.append(time.monotonic())
                        return
            except OSError:
                time.sleep(0.002)  # refusals come at once


class Bypass(StartUp):
    """The same with 100,000 prefixes that tproxyd leaves to the kernel."""

    name = "start-up-bypass"
    title = "start to first relayed flow, 100,000 prefixes excluded"
    metrics = (*StartUp.metrics, Metric("memory_mb", "MB of all processes", 1))
    once = True
    subjects = frozenset({"tproxyd-bypass"})

    def sample(self, bed: Bed, scale: Scale) -> Sample:
        """As `StartUp`, then look at the memory."""
        found = super().sample(bed, scale)
        memory = {"memory_mb": private_kb(bed.lab.gateway.pids()) / 1024}
        return Sample({**found.values, **memory}, tcp=found.tcp, flows=found.flows)


class Cpu:
    """The CPU time of everything in the gateway's namespace, from here on."""

    def __init__(self, bed: Bed) -> None:
        """Begin."""
        self._pids = bed.lab.gateway.pids()
        self._before = cpu_s(self._pids)

    def used_s(self) -> float:
        """Return the seconds since; of kernel routing there are none, as it has no process."""
        return cpu_s(self._pids) - self._before


def allow_descriptors() -> None:
    """Let this process hold as many files as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _of(found: load.Requests, cpu: Cpu) -> dict[str, float]:
    return {
        "rate": found.rate,
        "p50_us": found.p50_us,
        "p99_us": found.p99_us,
        "cpu_us": cpu.used_s() * 1e6 / found.count,
    }


WORKLOADS: Final[tuple[Workload, ...]] = (
    *(BulkTcp(streams, down=down) for down in (False, True) for streams in (1, 4, 64)),
    *(Requests(connections) for connections in (1, 32, 256)),
    Requests(32, version=6),
    Connections(),
    Fairness(),
    UdpRate(64),
    UdpRate(1200),
    UdpPingPong(),
    UdpFlows(),
    IdleMemory("tcp"),
    IdleMemory("udp"),
    StartUp(),
    Bypass(),
    Growth(),
)
