"""client - gateway - server for one subject, with the servers that run, and a witness in the gateway's kernel.

The witness is what makes a figure believable: nftables counters, independent of the subject, of the connections and
datagrams that the gateway itself sent to the server, and of the packets that were routed past it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from benchmarks.results import NoFigure
from benchmarks.subjects import Subject
from tests.lab import Gateway, eventually

ECHO_PORT: Final = 7
_COUNTED_S: Final = 3.0
_SETTINGS: Final[Mapping[str, int | str]] = {
    "net.core.somaxconn": 4096,
    "net.ipv4.ip_local_port_range": "1024 65535",
    "net.ipv4.tcp_max_syn_backlog": 4096,
}
_WITNESS: Final = """
table inet witness {
    counter connections {}
    counter datagrams {}
    counter routed {}
    chain sent {
        type filter hook output priority 300
        oifname wan0 tcp flags & (syn | ack) == syn counter name connections
        oifname wan0 meta l4proto udp counter name datagrams
    }
    chain routed {
        type filter hook forward priority 300
        meta l4proto { tcp, udp } counter name routed
    }
}
"""
# Enough for the kernel to track connections, as it does on every gateway with a firewall or NAT.
_FIREWALL: Final = """
table inet firewall {
    chain input {
        type filter hook input priority 0
        ct state established,related accept
    }
    chain forward {
        type filter hook forward priority 0
        ct state established,related accept
    }
}
"""


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What the kernel of the gateway counted.

    Attributes:
        tcp: connections that the gateway began towards the server (SYNs).
        udp: datagrams that it sent there.
        routed: packets that it forwarded.
    """

    tcp: int
    udp: int
    routed: int

    def __sub__(self, before: Witnessed) -> Witnessed:
        """What was counted since."""
        return Witnessed(self.tcp - before.tcp, self.udp - before.udp, self.routed - before.routed)


class Bed:
    """One subject between a client and a server; a context manager that leaves nothing behind.

    Attributes:
        lab: the namespaces.
        subject: what is measured.
        tools: the folder of the compiled generators.
        server4: the server's IPv4 address.
    """

    def __init__(self, subject: type[Subject], folder: Path, tools: Path) -> None:
        """Build it, start the servers and the subject."""
        folder.mkdir(parents=True)
        self.folder, self.tools = folder, tools
        self.lab = Gateway()
        self.server4 = self.lab.server_address(4)
        self._expected_flows = 0
        try:
            for namespace in self.lab.namespaces:
                for key, value in _SETTINGS.items():
                    namespace.sysctl(key, value)
            self.lab.gateway.nft(_WITNESS + _FIREWALL)
            self._start_servers()
            self.subject = subject(self.lab, folder)
            self.subject.prepare()
            self.subject.start()
        except BaseException:
            self.lab.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.subject.stop()
        finally:
            self.lab.close()

    def restart(self) -> None:
        """Start the subject anew: its tables empty, its memory as at the start."""
        self.stop()
        self.subject.start()

    def stop(self) -> None:
        """End the subject; `restart` or `subject.start` goes on."""
        self.subject.stop()
        self._expected_flows = 0

    def witnessed(self) -> Witnessed:
        """Read the kernel's counters."""
        listed = json.loads(self.lab.gateway.run(["nft", "-j", "list", "counters", "table", "inet", "witness"]).stdout)
        found = {
            each["counter"]["name"]: each["counter"]["packets"] for each in listed["nftables"] if "counter" in each
        }
        return Witnessed(found["connections"], found["datagrams"], found["routed"])

    def check(self, before: Witnessed, *, tcp: int, udp: int, flows: int) -> None:
        """Hold the subject to having relayed what was measured.

        Args:
            before: the kernel's counters at the start.
            tcp: connections that must have been made.
            udp: datagrams that must have been sent to the server.
            flows: flows that the subject itself must have counted in the meantime.

        Raises:
            NoFigure: it has not.
        """
        seen = self.witnessed() - before
        if self.subject.routes:
            if seen.routed <= udp:  # there and back, each datagram is routed twice
                raise NoFigure(f"only {seen.routed} packets were routed")
        elif seen.routed:
            raise NoFigure(f"{seen.routed} packets were routed past {self.subject.title}")
        elif seen.tcp < tcp or seen.udp < udp:
            raise NoFigure(
                f"{self.subject.title} made {seen.tcp} connections and sent {seen.udp} datagrams to the server; "
                f"the client had {tcp} and {udp}"
            )
        self._expected_flows += flows
        try:
            eventually(self._counted, "flows are counted", _COUNTED_S, 0.2)
        except AssertionError:
            raise NoFigure(
                f"{self.subject.title} counted {self.subject.flows()} flows of {self._expected_flows}"
            ) from None

    def _counted(self) -> bool:
        counted = self.subject.flows()
        return counted is None or counted >= self._expected_flows

    def _start_servers(self) -> None:
        (self.folder / "nginx.conf").write_text(_nginx(self.folder))
        for argv in (
            ["nginx", "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")],
            ["iperf3", "-s"],
            [str(self.tools / "udp_echo"), self.server4, str(ECHO_PORT)],
        ):
            with (self.folder / f"{Path(argv[0]).name}.log").open("wb") as log:
                self.lab.server.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        eventually(self._servers_listen, "nginx, iperf3 and the echo server listen", 10)

    def _servers_listen(self) -> bool:
        listening = self.lab.server.run(["ss", "-tulnH"]).stdout
        return all(f":{port} " in listening for port in (80, 5201, ECHO_PORT))


def _nginx(folder: Path) -> str:
    paths = "".join(f"{each}_temp_path {folder}/{each}; " for each in ("proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"daemon off; master_process off; worker_rlimit_nofile 16384; pid {folder}/nginx.pid; error_log stderr crit;\n"
        "events { worker_connections 16000; }\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; {paths}\n"
        "  keepalive_timeout 1h; keepalive_requests 1000000000;\n"
        "  server { listen 80 backlog=4096; listen [::]:80 backlog=4096; location / { return 200 ok; } } }\n"
    )
