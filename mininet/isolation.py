"""A place of its own for a topology: a named network namespace and, inside it, a process namespace.

When the first process of a process namespace ends, the kernel ends all others, and with the last of them go their
network namespaces, interfaces and rules. So clean-up is one kill, and nothing a topology does can outlive it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final, Self

DEBIAN_PACKAGES: Final = "/usr/lib/python3/dist-packages"
MARKER: Final = "TPROXYD_PLACE"

_TOOLS: Final = {
    "mnexec": "mininet",
    "brctl": "bridge-utils",
    "ip": "iproute2",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "nft": "nftables",
    "nginx": "nginx-light",
    "dnsmasq": "dnsmasq-base",
    "socat": "socat",
    "curl": "curl",
    "dig": "bind9-dnsutils",
}
_SETTLE_S: Final = 3.0
_END_S: Final = 10.0


def missing() -> list[str]:
    """What this machine lacks for a topology; empty where it can run."""
    lacks = [] if os.geteuid() == 0 else ["root"]
    lacks += [f"{tool} (Debian package {package})" for tool, package in _TOOLS.items() if not which(tool)]
    if PathFinder.find_spec("mininet", [DEBIAN_PACKAGES]) is None:
        lacks.append("Mininet (Debian package mininet)")
    return lacks


def which(tool: str) -> str | None:
    """Where a program is, the administrator's folders included."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def rules_in(enter: Sequence[str] = ()) -> dict[str, str]:
    """Everything tproxyd could leave in the kernel, as text by title.

    Args:
        enter: a command that runs another in the network namespace meant; none for this one.
    """

    def listing(*command: str) -> str:
        if which(command[0]) is None:
            return ""
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout

    def legacy(command: str) -> str:
        lines = listing(command).splitlines()
        return "\n".join(line for line in lines if line.startswith("-A") or line.split()[1:2] == ["-"])

    return {
        "nftables": listing("nft", "--stateless", "list", "ruleset"),
        "iptables": legacy("iptables-legacy-save") + legacy("ip6tables-legacy-save"),
        "ipset": listing("ipset", "list", "-name"),
        "ip rule": listing("ip", "-4", "rule") + listing("ip", "-6", "rule"),
        "ip route": "".join(listing("ip", version, "route", "show", "table", "all") for version in ("-4", "-6")),
    }


@dataclass
class Place:
    """A namespace and a folder to work in, from `with` to its end; see `residue` for what is left after it.

    Attributes:
        name: of the network namespace.
        folder: for configurations, logs and whatever servers write; readable by their users.
    """

    purpose: str
    name: str = field(init=False)
    folder: Path = field(init=False)
    _first: subprocess.Popen[str] | None = field(default=None, init=False)
    _inode: int = field(default=0, init=False)
    _before: dict[str, str] = field(default_factory=dict, init=False)

    def __enter__(self) -> Self:
        self.name = f"tproxyd-{self.purpose}-{os.getpid()}"
        self._before = self._machine()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.folder.chmod(0o755)
        try:
            subprocess.run(["ip", "netns", "add", self.name], check=True, timeout=10)
            self._inode = self._path.stat().st_ino
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self._path.exists():
            subprocess.run(["ip", "netns", "del", self.name], check=False, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _path(self) -> Path:
        return Path("/run/netns", self.name)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Run a command as the only child of the place's first process, which also collects orphans.

        It gets no Ctrl-C of its own: whoever called decides what that means.
        """
        # Even a runner that is killed takes the place with it.
        bound = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.name]
        # dash waits for its child in the foreground and reaps what is orphaned to it meanwhile.
        first = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", '"$@"; exit $?', "sh"]
        self._first = subprocess.Popen(
            [*bound, *first, *command],
            env={**os.environ, MARKER: self.name, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **options,
        )
        return self._first

    def end(self) -> None:
        """End everything that runs here, at once."""
        if self._first is not None and self._first.poll() is None:
            self._first.kill()
        if self._first is not None:
            self._first.wait(_END_S)

    def residue(self) -> list[str]:
        """What is left behind of this place; empty when all is as it was before.

        Something that passes by on a busy machine is not ours: only what stays counts.
        """
        deadline = time.monotonic() + _SETTLE_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _left(self) -> list[str]:
        left = [f"process {pid}" for pid in self._processes()]
        left += [f"namespace {self.name}"] if self._path.exists() else []
        left += [f"folder {self.folder}"] if self.folder.exists() else []
        now = self._machine()
        return left + [f"a difference in {what}" for what, text in now.items() if text != self._before[what]]

    def _machine(self) -> dict[str, str]:
        names = {path.name for path in Path("/sys/class/net").iterdir()}
        return rules_in() | {"interfaces": " ".join(sorted(names))}

    def _processes(self) -> Iterator[int]:
        mark = f"{MARKER}={self.name}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                marked = mark in (process / "environ").read_bytes().split(b"\0")
                if marked or (process / "ns/net").stat().st_ino == self._inode:
                    yield int(process.name)
