"""`python -m benchmarks.soak`: laps of random flows through tproxyd; what its workers hold must stay flat."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.measure import private_kb
from benchmarks.soak import tcp, udp
from benchmarks.soak.ledger import Ledger
from benchmarks.workloads import allow_descriptors
from tests.lab import Daemon, Gateway, Namespace, eventually
from tests.lab.namespace import family_of

_TCP_AT_A_TIME: Final = 200
_UDP_AT_A_TIME: Final = 100
_LAP_S: Final = 15.0
_TAIL_S: Final = 6.0  # that a lap's last flows and idle UDP flows take to end
_LAPS_LEAST: Final = 3
_VERSIONS: Final = (4, 6)
_QUIET_S: Final = 60.0
_GROWTH_KB: Final = 1024  # of each worker, from the second lap to the last: what allocators and arenas vary by
_PIPES: Final = 128  # descriptors of pipes that a worker keeps for reuse
_CONFIG: Final = {
    "interception": {"interfaces": ["lan0"]},
    "timeouts": {"udp_idle": "2s"},
    "limits": {"max_flows_per_client": 65536},
    "logging": {"format": "json"},
}


@dataclass(frozen=True, slots=True)
class Held:
    """What the workers hold while no flow is alive.

    Attributes:
        sockets: and other descriptors but pipes, of all workers.
        pipes: descriptors of pipes of the worker that has the most.
        private_kb: memory of all workers.
    """

    sockets: int
    pipes: int
    private_kb: int

    @classmethod
    def by(cls, daemon: Daemon) -> Held:
        """Look."""
        pids = daemon.worker_pids()
        pipes = [sum(target.startswith("pipe:") for target in _files(pid)) for pid in pids]
        files = sum(len(_files(pid)) for pid in pids)
        return cls(files - sum(pipes), max(pipes), private_kb(pids))


def grown(laps: Sequence[Held], workers: int) -> list[str]:
    """Return what did not stay flat, one a line. The first lap is for getting warm."""
    if len(laps) < _LAPS_LEAST:
        return ["too few laps to tell whether anything grows"]
    before, after = laps[1], laps[-1]
    found = []
    if after.sockets > before.sockets:
        found.append(f"descriptors grew from {before.sockets} to {after.sockets}")
    if after.pipes > _PIPES:
        found.append(f"{after.pipes} descriptors of pipes are kept by a worker")
    if after.private_kb > before.private_kb + _GROWTH_KB * workers:
        found.append(f"memory grew from {before.private_kb} to {after.private_kb} kB")
    return found


class Soak:
    """Both ends of all flows, in one process that has sockets in two namespaces."""

    def __init__(self, lab: Gateway, daemon: Daemon, seed: int) -> None:
        """Make the servers ready; run `laps`."""
        self._lab, self._daemon = lab, daemon
        self._chance = random.Random(seed)  # the order of events is the kernel's, so a seed repeats only the plans
        self._number = 0
        self.ledger = Ledger()

    async def laps(self, seconds: float) -> list[Held]:
        """Run laps for so long; return what the workers held after each."""
        lap_s = max(1.0, min(_LAP_S, seconds / _LAPS_LEAST - _TAIL_S))
        self._tcp = [tcp.Server(self._listener(version), self._chance) for version in _VERSIONS]
        self._udp = [udp.Server(self._at_server(version, socket.SOCK_DGRAM)) for version in _VERSIONS]
        serving = [asyncio.create_task(server.serve()) for server in self._tcp]
        held: list[Held] = []
        end = time.monotonic() + seconds
        try:
            while (time.monotonic() < end or len(held) < _LAPS_LEAST) and not self.ledger.failures:
                await self._lap(min(lap_s, max(1.0, end - time.monotonic())))
                await asyncio.to_thread(self._wait_until_quiet)
                held.append(Held.by(self._daemon))
                self._tell(len(held), held[-1])
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            for tcp_server, udp_server in zip(self._tcp, self._udp, strict=True):
                await tcp_server.close()
                udp_server.close()
        spoilt = sum(server.spoilt for server in self._udp)
        if spoilt:
            self.ledger.failures.append(f"{spoilt} datagrams arrived that were not what was sent")
        return held

    async def _lap(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(
            *(self._drive_tcp(end) for _ in range(_TCP_AT_A_TIME)),
            *(self._drive_udp(end) for _ in range(_UDP_AT_A_TIME)),
        )

    async def _drive_tcp(self, end: float) -> None:
        while time.monotonic() < end:
            plan, version = tcp.Plan.random(self._next(), self._chance), self._version()
            client, server = self._at_client(version, socket.SOCK_STREAM), self._tcp[_VERSIONS.index(version)]
            await tcp.flow(client, server, plan, self._chance, self.ledger)

    async def _drive_udp(self, end: float) -> None:
        while time.monotonic() < end:
            version = self._version()
            client, server = self._at_client(version, socket.SOCK_DGRAM), self._udp[_VERSIONS.index(version)]
            await udp.flow(client, server, self._next(), self._chance, self.ledger)

    def _wait_until_quiet(self) -> None:
        eventually(lambda: self._daemon.counters()["flows"] == 0, "all flows are gone", _QUIET_S, 0.5)

    def _listener(self, version: int) -> socket.socket:
        made = self._at_server(version, socket.SOCK_STREAM)
        made.listen(1024)
        return made

    def _at_server(self, version: int, kind: socket.SocketKind) -> socket.socket:
        return _bound(self._lab.server, kind, self._lab.server_address(version))

    def _at_client(self, version: int, kind: socket.SocketKind) -> socket.socket:
        return _bound(self._lab.client, kind, self._lab.client_address(version, self._chance.randrange(2, 10)))

    def _version(self) -> int:
        return self._chance.choice(_VERSIONS)

    def _next(self) -> int:
        self._number += 2  # a flow's two directions carry different contents
        return self._number

    def _tell(self, lap: int, held: Held) -> None:
        print(
            f"lap {lap}: {self.ledger.count} flows, {self.ledger.moved / 1e9:.1f} GB; "
            f"workers hold {held.sockets} descriptors, {held.private_kb} kB",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; return 0 if every flow went as planned and nothing grew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="how long (default: 300)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of the plans")
    asked = parser.parse_args(arguments)
    if os.geteuid() != 0:
        parser.error("a soak needs root: it works in network namespaces")
    allow_descriptors()
    print(f"seed {asked.seed}: {_TCP_AT_A_TIME} TCP and {_UDP_AT_A_TIME} UDP flows at a time", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tproxyd-soak-")))
        folder.chmod(0o755)  # workers are another user
        lab = Gateway()
        stack.callback(lab.close)
        daemon = Daemon(lab.gateway, folder / "daemon", _CONFIG)
        soak = Soak(lab, daemon, asked.seed)
        held = asyncio.run(soak.laps(asked.seconds))
        wrong = [*soak.ledger.failures, *grown(held, len(daemon.worker_pids()))]
        daemon.stop()
    return _report(soak.ledger, wrong)


def _report(ledger: Ledger, wrong: Sequence[str]) -> int:
    print(", ".join(f"{count} {kind}" for kind, count in sorted(ledger.flows.items())))
    print(f"{ledger.count} flows, {ledger.moved} bytes, checksums of both ends compared")
    for line in wrong[:50]:
        print(f"WRONG: {line}")
    print("FAILED" if wrong else "nothing lost, nothing grew")
    return 1 if wrong else 0


def _bound(namespace: Namespace, kind: socket.SocketKind, address: str) -> socket.socket:
    with namespace.entered():
        made = socket.socket(family_of(address), kind)
    made.setblocking(False)
    made.bind((address, 0))
    return made


def _files(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    return [os.readlink(folder / name) for name in os.listdir(folder)]  # noqa: PTH115, PTH208  # of a folder in /proc


if __name__ == "__main__":
    sys.exit(main())
