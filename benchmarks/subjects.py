"""What is measured. Each subject relays (or routes) everything that comes from the client, with the same job.

SOCKS5 in front of one server is another job, with subjects of its own (redsocks among them), and is not measured yet.
"""

from __future__ import annotations

import json
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.lab import Daemon, Gateway, eventually

PORT: Final = 7450
_STOP_S: Final = 10.0

# Both listen to what the kernel diverts; the packets of their sockets are recognised, and delivered by the mark.
_DIVERT: Final = f"""
table inet peer {{
    chain divert {{
        type filter hook prerouting priority mangle
        iifname lan0 meta l4proto tcp socket transparent 1 socket wildcard 0 meta mark set 1 accept
        iifname lan0 fib daddr type != unicast accept
        iifname lan0 meta l4proto {{ tcp, udp }} meta nfproto ipv4 tproxy ip to 127.0.0.1:{PORT} meta mark set 1 accept
        iifname lan0 meta l4proto {{ tcp, udp }} meta nfproto ipv6 tproxy ip6 to [::1]:{PORT} meta mark set 1 accept
    }}
}}
"""
# A socket on the client's address gets its packets by the mark; V2Ray has none such and is spared the look-up.
_DIVERT_SERVER_SIDE: Final = """
add rule inet peer divert iifname wan0 meta l4proto tcp socket transparent 1 meta mark set 1 accept
"""
_POLICY_ROUTING: Final = "rule add fwmark 1 lookup 100\nroute add local default dev lo table 100\n"


class Subject(ABC):
    """Something between the client and the server.

    Attributes:
        name: in `--only`, JSON and ratios.
        title: in tables and charts.
        networks: what it can carry.
        workloads: names of those it makes sense for; None for all.
        routes: it lets the kernel forward; so flows need not be seen to end on the gateway.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    networks: ClassVar[frozenset[str]] = frozenset({"tcp", "udp"})
    workloads: ClassVar[frozenset[str] | None] = None
    routes: ClassVar[bool] = False

    def __init__(self, lab: Gateway, folder: Path) -> None:
        """Take a place on the gateway; nothing is started.

        Args:
            lab: the three namespaces.
            folder: for its files.
        """
        self.lab = lab
        self.folder = folder

    def prepare(self) -> None:  # noqa: B027  # not every subject has something to prepare
        """Do once what outlives restarts: rules that the subject does not make itself."""

    @abstractmethod
    def start(self) -> None:
        """Start it, and return when it serves."""

    @abstractmethod
    def stop(self) -> None:
        """End it."""

    def flows(self) -> int | None:
        """Return the flows that it says it took since its start; None if it does not count them."""
        return None


class Routing(Subject):
    """The kernel forwards: the limit of what the machine can do."""

    name = "routing"
    title = "kernel routing"
    routes = True

    def start(self) -> None:
        """Switch forwarding on."""
        self.lab.forwarding(True)

    def stop(self) -> None:
        """Switch forwarding off."""
        self.lab.forwarding(False)


class Tproxyd(Subject):
    """`tproxyd run` with its defaults, but for the limit of flows per client: there is one client."""

    name = "tproxyd"
    title = "tproxyd"
    _daemon: Daemon | None = None
    _starts = 0

    def configuration(self) -> dict[str, Any]:
        """Return the configuration."""
        return {
            "interception": {"interfaces": ["lan0"]},
            "limits": {"max_flows": 65536, "max_flows_per_client": 65536},
            "logging": {"format": "json"},  # its counters are read from the log; flows are not logged
        }

    def start(self) -> None:
        """Start it in a folder of its own, so that each log is a run's."""
        self._starts += 1
        self._daemon = Daemon(self.lab.gateway, self.folder / f"run{self._starts}", self.configuration())

    def stop(self) -> None:
        """End it in order."""
        if self._daemon is not None and self._daemon.running:
            self._daemon.stop()

    def flows(self) -> int | None:
        """Read its counters; up to a second old."""
        if self._daemon is None or not self._daemon.running:
            return 0
        counters = self._daemon.recent_counters()
        return counters["tcp_flows"] + counters["udp_flows"]

    @property
    def supervisor(self) -> int:
        """Its process id, for signals."""
        if self._daemon is None:
            raise RuntimeError("tproxyd was never started")
        return self._daemon.process.pid


class TproxydLearned(Tproxyd):
    """The same on a gateway that may forward: the kernel carries long UDP flows after their first datagrams."""

    name = "tproxyd-learned"
    title = "tproxyd, learned"
    workloads = frozenset({"udp-64", "udp-1200", "udp-ping-pong"})
    routes = True

    def start(self) -> None:
        """Let the kernel forward what tproxyd lets by, and start."""
        self.lab.forwarding(True)
        super().start()

    def stop(self) -> None:
        """End it, and forwarding."""
        super().stop()
        self.lab.forwarding(False)

    def flows(self) -> int | None:
        """Read how many flows it has left to the kernel."""
        if self._daemon is None or not self._daemon.running:
            return 0
        return self._daemon.recent_counters()["udp_learned"]


class TproxydBypass(Tproxyd):
    """tproxyd with 100,000 excluded prefixes, none of which is the server's."""

    name = "tproxyd-bypass"
    title = "tproxyd, 100,000 prefixes excluded"
    _FIRST: ClassVar = int.from_bytes(socket.inet_aton("100.64.0.0"))
    _COUNT: ClassVar = 100_000

    def configuration(self) -> dict[str, Any]:
        """Return the configuration; every other address is excluded, so that no two prefixes become one."""
        numbers = range(self._FIRST, self._FIRST + 2 * self._COUNT, 2)
        made = super().configuration()
        made["interception"]["exclude"] = {"destinations": [socket.inet_ntoa(n.to_bytes(4)) for n in numbers]}
        return made


class Peer(Subject):
    """A proxy that has its rules made for it; it listens to `PORT`.

    Attributes:
        keeps_address: it speaks to servers with the client's address.
    """

    keeps_address: ClassVar[bool] = False

    def prepare(self) -> None:
        """Make the rules and the policy routing."""
        self.lab.gateway.nft(_DIVERT)
        if self.keeps_address:
            self.lab.gateway.nft(_DIVERT_SERVER_SIDE)
        for version in ("-4", "-6"):
            subprocess.run(
                ["ip", version, "-n", self.lab.gateway.name, "-batch", "-"],
                input=_POLICY_ROUTING,
                text=True,
                check=True,
            )

    def _launch(self, *argv: str) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = self.lab.gateway.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(self._listens, f"{self.title} listens", _STOP_S)

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.title} ended: {(self.folder / 'log').read_text(errors='replace')[-2000:]}")
        return f":{PORT} " in self.lab.gateway.run(["ss", "-tlnH"]).stdout

    def stop(self) -> None:
        """End it at once: what it holds is not needed any more."""
        self._process.kill()
        self._process.wait(_STOP_S)


class HAProxy(Peer):
    """Transparent on both sides, splicing, as many threads as cores; TCP only."""

    name = "haproxy"
    title = "HAProxy"
    networks = frozenset({"tcp"})
    keeps_address = True

    def prepare(self) -> None:
        """Write the configuration; a server without an address is the original destination."""
        super().prepare()
        self._socket = self.folder / "stats"
        (self.folder / "haproxy.cfg").write_text(
            f"global\n  stats socket {self._socket}\n"
            "defaults\n  mode tcp\n  option splice-auto\n"
            "  timeout connect 5s\n  timeout client 2h\n  timeout server 2h\n"
            "frontend all\n"
            f"  bind 0.0.0.0:{PORT} transparent\n  bind [::]:{PORT} v6only transparent\n  default_backend any\n"
            "backend any\n  source 0.0.0.0 usesrc clientip\n  server any 0.0.0.0\n"
        )

    def start(self) -> None:
        """Start one process in the foreground."""
        self._launch("haproxy", "-db", "-f", str(self.folder / "haproxy.cfg"))

    def flows(self) -> int | None:
        """Read the frontend's sessions from the stats socket."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(self._socket))
            asking.sendall(b"show stat\n")
            answer = b"".join(iter(lambda: asking.recv(65536), b"")).decode()
        return haproxy_sessions(answer)


class V2Ray(Peer):
    """dokodemo-door (tproxy) to freedom. The server sees the gateway's address: V2Ray can't keep the client's."""

    name = "v2ray"
    title = "V2Ray"

    def prepare(self) -> None:
        """Write the configuration, without logs and statistics: both cost it speed."""
        super().prepare()
        (self.folder / "v2ray.json").write_text(json.dumps(_V2RAY))

    def start(self) -> None:
        """Start one process in the foreground."""
        self._launch("v2ray", "-config", str(self.folder / "v2ray.json"))


_V2RAY: Final[Mapping[str, Any]] = {
    "log": {"loglevel": "none"},
    # As long as the others' for TCP; UDP gets 60 s as tproxyd's.
    "policy": {"levels": {"0": {"connIdle": 7200, "uplinkOnly": 7200, "downlinkOnly": 7200}, "1": {"connIdle": 60}}},
    "inbounds": [
        {
            "listen": "0.0.0.0",
            "port": PORT,
            "protocol": "dokodemo-door",
            "settings": {"network": network, "followRedirect": True, "userLevel": level},
            "streamSettings": {"sockopt": {"tproxy": "tproxy"}},
        }
        for level, network in enumerate(("tcp", "udp"))
    ],
    "outbounds": [{"protocol": "freedom"}],
}


def haproxy_sessions(answer: str) -> int:
    """Return the total sessions of the frontend in `show stat` (HAProxy Management Guide §9.1).

    Raises:
        ValueError: there is none.
    """
    head, *rows = (line.split(",") for line in answer.splitlines() if line)
    names = [name.lstrip("# ") for name in head]
    for row in rows:
        values = dict(zip(names, row, strict=False))
        if values["svname"] == "FRONTEND":
            return int(values["stot"])
    raise ValueError("no frontend in HAProxy's statistics")


SUBJECTS: Final[tuple[type[Subject], ...]] = (Routing, TproxydLearned, Tproxyd, HAProxy, V2Ray)
