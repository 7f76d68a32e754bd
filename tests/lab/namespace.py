"""A network namespace of our own, with programs and plain Python sockets inside (network_namespaces(7))."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from tests.lab.waiting import eventually

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_END_S: Final = 3.0
_libc: Final = ctypes.CDLL(None, use_errno=True)
_numbers: Final = itertools.count()


class Namespace:
    """A namespace with a unique name; `close` ends what was started in it and deletes it.

    Attributes:
        name: as `ip netns` knows it.
    """

    def __init__(self, role: str) -> None:
        """Create it, with the loopback device up and duplicate address detection off."""
        self.name = f"tpl{os.getpid()}-{next(_numbers)}-{role}"
        self._processes: list[subprocess.Popen[Any]] = []
        self._sockets: list[socket.socket] = []
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self._fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        self.inode = os.fstat(self._fd).st_ino
        for which in ("all", "default"):
            self.sysctl(f"net.ipv6.conf.{which}.accept_dad", 0)
        self.ip("link set lo up")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread live in the namespace while the block runs: sockets and threads made there stay there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._fd)
            try:
                yield
            finally:
                _setns(before)
        finally:
            os.close(before)

    def socket(self, family: int, kind: int, protocol: int = 0, *, timeout_s: float = 5.0) -> socket.socket:
        """Return a socket that lives in the namespace; closed with it at the latest."""
        with self.entered():
            made = socket.socket(family, kind, protocol)
        made.settimeout(timeout_s)
        self._sockets.append(made)
        return made

    def tcp(
        self, peer: tuple[str, int], source: tuple[str, int] | None = None, *, timeout_s: float = 5.0
    ) -> socket.socket:
        """Return a TCP socket connected to `peer`."""
        return self._connected(socket.SOCK_STREAM, peer, source, timeout_s)

    def udp(
        self, peer: tuple[str, int], source: tuple[str, int] | None = None, *, timeout_s: float = 5.0
    ) -> socket.socket:
        """Return a UDP socket connected to `peer`: it takes answers from there only."""
        return self._connected(socket.SOCK_DGRAM, peer, source, timeout_s)

    def run(self, argv: Sequence[str], *, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end and return its output as text; `options` as for `subprocess.run`."""
        options = {"capture_output": True, "text": True, "timeout": 60, **options}
        done = subprocess.run(self.command(argv), check=False, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program; its pid is the program's own. It is killed at `close` if it still runs."""
        process = subprocess.Popen(self.command(argv), **options)
        self._processes.append(process)
        return process

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in the namespace."""
        return ["ip", "netns", "exec", self.name, *argv]

    def ip(self, commands: str) -> None:
        """Run `ip` commands, one a line."""
        subprocess.run(["ip", "-n", self.name, "-batch", "-"], input=commands, text=True, check=True)

    def nft(self, commands: str) -> None:
        """Run nftables commands as one transaction."""
        self.run(["nft", "-f", "-"], input=commands)

    def sysctl(self, key: str, value: int | str) -> None:
        """Set a network setting, such as `net.ipv4.ip_forward`."""
        with self.entered():
            Path("/proc/sys", *key.split(".")).write_text(str(value))

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a forked child that lives in the namespace; return its value or raise what it raised.

        What it patches, loads or leaves open ends with the child. Value and exception must be picklable.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _answer(self._fd, writer, function, arguments)
        os.close(writer)
        with os.fdopen(reader, "rb") as answers:
            data = answers.read()
        os.waitpid(child, 0)
        succeeded, value = pickle.loads(data)
        if not succeeded:
            raise value
        return value

    def pids(self) -> list[int]:
        """The processes that live in the namespace; this one's threads and zombies don't count."""
        return [pid for pid in _all_pids() if pid != os.getpid() and _inode(pid) == self.inode]

    def close(self) -> None:
        """End what was started here, then delete the namespace."""
        for made in self._sockets:
            made.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(_END_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        try:
            eventually(lambda: not self.pids(), f"processes {self.pids()} of {self.name} end", _END_S)
        finally:
            os.close(self._fd)
            subprocess.run(["ip", "netns", "delete", self.name], check=True)

    def _connected(
        self, kind: int, peer: tuple[str, int], source: tuple[str, int] | None, timeout_s: float
    ) -> socket.socket:
        made = self.socket(family_of(peer[0]), kind, timeout_s=timeout_s)
        if source is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(source)
        made.connect(peer)
        return made


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


def _answer(namespace: int, writer: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        _setns(namespace)
        try:
            data = pickle.dumps((True, function(*arguments)))
        except Exception as error:  # noqa: BLE001  # goes to the parent, which raises it
            data = pickle.dumps((False, error))
        with os.fdopen(writer, "wb") as answers:
            answers.write(data)
    finally:
        os._exit(0)


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _inode(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None
