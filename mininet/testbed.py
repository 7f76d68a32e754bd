"""A topology with everything running in it: real servers behind, tproxyd on each gateway. Runs inside a `Place`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isolation import rules_in
from topologies import FourHosts, Machine, build

WEB_PORTS: Final = (80, 8080)
DNS_PORT: Final = 53
ECHO_PORTS: Final = (7000, 7001)
ZONE: Final = "tproxyd.test"
WORKERS: Final = 2
BIG_FILE_BYTES: Final = 4_000_000

_START_S: Final = 15.0
_STOP_S: Final = 10.0
_TAIL_LINES: Final = 15

_TPROXYD_YAML: Final = """\
interception:
  interfaces: [lan0]
  ruleset: {ruleset}
  on_failure: {on_failure}
backends:
  straight: {{type: direct, source: four-tuple}}
default: straight
timeouts: {{udp_idle: 2s}}
workers: {workers}
logging: {{flows: true, format: json}}
"""

_NGINX_CONF: Final = """\
daemon off;
pid {folder}/nginx.pid;
worker_processes 1;
user nobody nogroup;
events {{}}
http {{
    log_format seen '$remote_addr $remote_port $server_port $request_uri';
    access_log {folder}/access.log seen;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type text/plain;
    server {{
        {listen}
        root {folder}/www;
        location = / {{ return 200 'you are $remote_addr port $remote_port\\n'; }}
    }}
}}
"""

_DNSMASQ_CONF: Final = """\
keep-in-foreground
pid-file
user=root
no-resolv
no-hosts
no-poll
port=53
log-queries=extra
log-facility={folder}/dnsmasq.log
host-record=www.{zone},{ipv4},{ipv6}
"""


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = _START_S) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.05)


def enter(node: Machine) -> list[str]:
    """The command that runs another in a node's network namespace."""
    return ["mnexec", "-a", str(node.pid)]


def children_of(pid: int) -> list[int]:
    """The processes a process has started, by what they say about themselves in /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


@dataclass
class Gateway:
    """tproxyd on a gateway node."""

    node: Machine
    folder: Path
    process: subprocess.Popen[str] | None = field(default=None, init=False)
    _before: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "tproxyd.yaml"

    @property
    def log(self) -> Path:
        """What tproxyd wrote to standard error."""
        return self.folder / "tproxyd.log"

    def start(self, ruleset: str, on_failure: str = "closed") -> None:
        """Start `tproxyd run` and wait until it serves.

        Raises:
            RuntimeError: it ended.
            TimeoutError: it does not get ready.
        """
        if not self._before:
            self._before = rules_in(enter(self.node))
        text = _TPROXYD_YAML.format(ruleset=ruleset, on_failure=on_failure, workers=WORKERS)
        self.config.write_text(text)
        served = self._served()
        with self.log.open("a") as log:
            command = [*tproxyd(), "run", "-c", str(self.config)]
            self.process = self.node.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(lambda: self._served() > served or self._ended(), f"tproxyd on {self.node.name}")
        if self.process.poll() is not None:
            raise RuntimeError(f"tproxyd on {self.node.name} ended with exit code {self.process.returncode}")

    def stop(self) -> int:
        """Stop it the clean way; return its exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        return self.process.wait(_STOP_S)

    def kill(self) -> int:
        """Kill the supervisor and all workers at one blow; return how many processes that were."""
        if self.process is None:
            return 0
        pids = [self.process.pid, *children_of(self.process.pid)]
        for pid in pids:  # the supervisor first: it must not replace a worker
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(_STOP_S)
        wait_for(lambda: not any(_alive(pid) for pid in pids), "the killed workers to be gone", _STOP_S)
        return len(pids)

    def remove_rules(self) -> None:
        """Take tproxyd's rules out while it does not run."""
        subprocess.run(
            [*enter(self.node), *tproxyd(), "remove-rules"], check=True, capture_output=True, timeout=_STOP_S
        )

    def forward(self, *, on: bool) -> None:
        """Let the node route, or not."""
        self.node.sure(f"sysctl -qw net.ipv4.ip_forward={on:d} net.ipv6.conf.all.forwarding={on:d}")

    def flows(self) -> list[dict[str, Any]]:
        """The access log: one entry for each flow that has ended."""
        return [entry for entry in self._entries() if "orig_dst" in entry]

    def rules(self) -> dict[str, str]:
        """What stands in the node's kernel now (see `rules_in`)."""
        return rules_in(enter(self.node))

    def residue(self) -> list[str]:
        """What differs in the kernel from before the first start."""
        return [what for what, text in self.rules().items() if text != self._before.get(what, text)]

    def _entries(self) -> Iterator[dict[str, Any]]:
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)

    def _served(self) -> int:
        return sum(str(entry.get("message", "")).startswith("serving ") for entry in self._entries())

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None


class Testbed:
    """A network with servers and gateways; `testbed` makes one.

    Attributes:
        topology: who has which address.
        gateways: from the clients' side to the server's.
        folder: all files, `server` those of the servers.
    """

    def __init__(self, topology: FourHosts, net: Any, folder: Path) -> None:
        """Take over a started network."""
        self.topology = topology
        self.folder = folder
        self._net = net
        self._servers: list[subprocess.Popen[str]] = []
        self.gateways = [Gateway(self.node(name), self._folder(name)) for name in topology.gateways]

    def node(self, name: str) -> Machine:
        """The node of that name."""
        node: Machine = self._net.get(name)
        return node

    def start_gateways(self, ruleset: str) -> None:
        """Start tproxyd on every gateway."""
        for gateway in self.gateways:
            gateway.start(ruleset)

    def start_servers(self) -> None:
        """Start nginx, dnsmasq and the UDP echo on the server node, and wait until they listen."""
        folder = self._folder("server")
        self._write_server_files(folder)
        self._serve(["nginx", "-e", str(folder / "nginx.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")])
        self._serve(["dnsmasq", f"--conf-file={folder / 'dnsmasq.conf'}"])
        for port in ECHO_PORTS:
            for version, option in ((4, ""), (6, ",ipv6only=1")):
                # PIPE: what comes in goes out; one process a datagram, so that each gets its own answer
                self._serve(["socat", "-b", "65536", f"UDP{version}-RECVFROM:{port},fork{option}", "PIPE"])
        wanted = {("tcp", port) for port in WEB_PORTS} | {("udp", port) for port in (DNS_PORT, *ECHO_PORTS)}
        wait_for(lambda: wanted <= self._listening(), "the servers")

    def run(self, name: str, command: Sequence[str], timeout_s: float = 10.0) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        return subprocess.run(
            [*enter(self.node(name)), *command], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a node; the caller waits for it."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = self.node(name).popen(list(command), **(pipes | options))
        return process

    def server_file(self, name: str) -> str:
        """What stands in a file of the servers."""
        path = self.folder / "server" / name
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        """End tproxyd, the servers and the network."""
        for process in (*(gateway.process for gateway in self.gateways), *self._servers):
            if process is not None and process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_S)
        self._net.stop()

    def _serve(self, command: list[str]) -> None:
        with (self.folder / "server" / f"{command[0]}.out").open("a") as out:
            self._servers.append(self.node("server").popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out))

    def _write_server_files(self, folder: Path) -> None:
        (folder / "www").mkdir()
        (folder / "www" / "big").write_bytes(bytes(BIG_FILE_BYTES))
        listen = "".join(f"listen {port}; listen [::]:{port} ipv6only=on; " for port in WEB_PORTS)
        (folder / "nginx.conf").write_text(_NGINX_CONF.format(folder=folder, listen=listen))
        server = self.topology.server
        text = _DNSMASQ_CONF.format(folder=folder, zone=ZONE, ipv4=server[4], ipv6=server[6])
        (folder / "dnsmasq.conf").write_text(text)

    def _listening(self) -> set[tuple[str, int]]:
        """Network and port of what listens on the server node, in both families."""
        versions = []
        for version in ("-4", "-6"):
            lines = self.run("server", ["ss", "-Hltun", version]).stdout.splitlines()
            fields = [line.split() for line in lines]
            versions.append({(f[0], int(f[4].rpartition(":")[2])) for f in fields})
        return versions[0] & versions[1]

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder


@contextmanager
def testbed(topology: FourHosts, folder: Path) -> Iterator[Testbed]:
    """Build a network with running servers; end it all at the end."""
    net = build(topology)
    try:
        bed = Testbed(topology, net, folder)
    except BaseException:
        net.stop()
        raise
    try:
        bed.start_servers()
        yield bed
    finally:
        bed.stop()


def log_tails(folder: Path) -> str:
    """The last lines of every log in a testbed's folder."""
    paths = (path for path in sorted(folder.glob("*/*")) if path.suffix in {".log", ".out"})
    logs = ((path, path.read_text(errors="replace").splitlines()) for path in paths)
    return "\n".join(
        "\n".join([f"--- {path.parent.name}/{path.name}", *lines[-_TAIL_LINES:]]) for path, lines in logs if lines
    )


def tproxyd() -> list[str]:
    """The command of this virtual environment."""
    command = Path(sys.executable).with_name("tproxyd")
    return [str(command)] if command.exists() else [sys.executable, "-P", "-m", "tproxyd"]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
