"""The real `tproxyd`, run in a namespace as an operator would, and what its log tells."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from tests.lab.namespace import Namespace
from tests.lab.waiting import eventually

TPROXYD: Final = (sys.executable, "-P", "-m", "tproxyd")
_READY_S: Final = 20.0
_STOP_S: Final = 15.0
_HEARTBEAT_S: Final = 1.05  # a worker's counters reach the supervisor once a second


class DaemonError(Exception):
    """It ended before it served.

    Attributes:
        code: its exit code.
        log: what it wrote.
    """

    def __init__(self, code: int, log: str) -> None:
        super().__init__(f"tproxyd run: exit code {code}\n{log}")
        self.code = code
        self.log = log


def config(**sections: Any) -> dict[str, Any]:
    """A configuration for `Gateway`; sections given are merged into it, key by key."""
    base: dict[str, Any] = {
        "interception": {"interfaces": ["lan0"]},
        "timeouts": {"connect": "5s", "udp_idle": "1s"},
        "workers": 1,
        "logging": {"flows": True, "format": "json"},
    }
    return _merged(base, sections)


def tproxyd(namespace: Namespace, *arguments: str | Path, check: bool = False, **options: Any) -> Any:
    """Run a `tproxyd` command to its end in a namespace; returns a CompletedProcess with text output."""
    return namespace.run([*TPROXYD, *map(str, arguments)], check=check, **options)


def cli(namespace: Namespace, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As `tproxyd`, but in a forked child of this process, which saves the interpreter's start."""
    code, out, err = namespace.call(_command, list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, code, out, err)


def write_config(folder: Path, text: str | Mapping[str, Any] | None = None, **sections: Any) -> Path:
    """Write a configuration file of a name of its own: YAML, or sections as for `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tproxyd{len(list(folder.iterdir()))}.yaml"
    values = config(**sections) if text is None else text
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(dict(values)))
    return path


class Daemon:
    """`tproxyd run` with a configuration of its own.

    Attributes:
        path: the configuration's file.
        killed: `kill_all` ended it.
    """

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        text: str | Mapping[str, Any],
        *options: str,
        under: Sequence[str] = (),
        ready_s: float = _READY_S,
    ) -> None:
        """Write the configuration, start (through the program `under`, such as prlimit), and wait until it serves.

        Raises:
            DaemonError: it ended instead.
        """
        self.path = write_config(folder, text)
        self._log = folder / "stderr.log"
        self.killed = False
        with self._log.open("wb") as stderr:
            self.process = namespace.popen(
                [*under, *TPROXYD, "run", "-c", str(self.path), *options],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        eventually(self._serves, "tproxyd serves", ready_s)

    @property
    def running(self) -> bool:
        """Whether the supervisor lives."""
        return self.process.poll() is None

    def log(self) -> str:
        """All that it wrote so far, workers included."""
        return self._log.read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """The log as JSON objects; lines that are none are left out."""
        found = []
        for line in self.log().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def messages(self) -> list[str]:
        """The log's messages, without flows."""
        return [record["message"] for record in self.records() if "message" in record]

    def flow_ends(self) -> list[dict[str, Any]]:
        """The access log: one object for each flow that ended."""
        return [record for record in self.records() if record.get("logger") == "tproxyd.flow"]

    def wait_flow_ends(self, count: int, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """Wait for as many flows to end, and return all that have."""
        return eventually(lambda: len(ends := self.flow_ends()) >= count and ends, f"{count} flows end", timeout_s)

    def counters(self) -> dict[str, int]:
        """The counters, all workers added up, not older than this call; takes a second."""
        time.sleep(_HEARTBEAT_S)
        return self.recent_counters()

    def recent_counters(self) -> dict[str, int]:
        """The counters as the supervisor knows them now; up to a second old."""
        before = len(self._counter_lines())
        self.process.send_signal(signal.SIGUSR1)
        lines = eventually(lambda: len(now := self._counter_lines()) > before and now, "counters are logged")
        found: dict[str, int] = json.loads(lines[-1].partition("counters ")[2])
        return found

    def worker_pids(self) -> list[int]:
        """The processes that relay."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if b"tproxyd.daemon.worker" in _command_line(pid)]

    def pids(self) -> list[int]:
        """The supervisor and its workers."""
        return [self.process.pid, *self.worker_pids()]

    def stop(self) -> None:
        """End it in order; its exit code must be 0 and no traceback in its log."""
        self.process.terminate()
        code = self.process.wait(_STOP_S)
        assert code == 0, f"exit code {code}\n{self.log()}"
        assert "Traceback" not in self.log(), self.log()

    def kill_all(self) -> None:
        """`kill -9` of the supervisor and all workers at one go; the rules stay."""
        pids, self.killed = self.pids(), True
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(_STOP_S)
        eventually(lambda: not any(_alive(pid) for pid in pids), "all processes are gone")

    def _serves(self) -> bool:
        if (code := self.process.poll()) is not None:
            raise DaemonError(code, self.log())
        return "serving with" in self.log()

    def _counter_lines(self) -> list[str]:
        return [message for message in self.messages() if message.startswith("counters ")]


def _command(arguments: list[str]) -> tuple[int, str, str]:
    """Run in a child of its own: the output of children that it starts goes to the same places."""
    from tproxyd.cli import main

    files = [os.memfd_create(name) for name in ("out", "err")]
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    sys.stdin = io.TextIOWrapper(io.FileIO(os.open(os.devnull, os.O_RDONLY)))
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    try:
        code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in files)
    return code, out, err


def _merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in more.items():
        held = found.get(key)
        found[key] = _merged(held, value) if isinstance(held, dict) and isinstance(value, Mapping) else value
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # gone since it was listed


def _alive(pid: int) -> bool:
    """Whether it may still hold its sockets: a zombie does as long as one of its threads has not ended."""
    process = Path(f"/proc/{pid}")
    try:
        zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not zombie or len(list((process / "task").iterdir())) > 1
    except OSError:
        return False
