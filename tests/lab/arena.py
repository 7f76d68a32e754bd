"""A lab with one daemon that many tests share: which flow was whose, and how many sockets its worker holds."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.daemon import Daemon
from tests.lab.gateway import Gateway
from tests.lab.namespace import family_of
from tests.lab.waiting import eventually


@dataclass(frozen=True, slots=True)
class Arena:
    """What such tests get.

    Attributes:
        way: the kind of way that all flows take.
        taken: the numbers of the access log's lines that tests have had.
    """

    lab: Gateway
    daemon: Daemon
    way: str
    taken: set[int] = field(default_factory=set)

    def sockets(self) -> int:
        """How many sockets the worker holds."""
        (pid,) = self.daemon.worker_pids()
        return sum("socket:" in _target(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())

    def end_of(self, client: tuple[str, int]) -> dict[str, Any]:
        """The access log's line of the flow of a client endpoint, once it has ended; each line once: ports recur."""
        shown = f"[{client[0]}]:{client[1]}" if ":" in client[0] else f"{client[0]}:{client[1]}"

        def new() -> list[int]:
            ends = enumerate(self.daemon.flow_ends())
            return [number for number, end in ends if end["client"] == shown and number not in self.taken]

        number = eventually(new, f"the flow of {shown} ends")[0]
        self.taken.add(number)
        return self.daemon.flow_ends()[number]

    def fails(self, version: int, peer: tuple[str, int]) -> tuple[str, int]:
        """See a connection reset, while it is made or after; return its client's name."""
        client = self.lab.client.socket(family_of(peer[0]), socket.SOCK_STREAM)
        client.bind((self.lab.client_address(version), 0))
        name: tuple[str, int] = client.getsockname()[:2]
        found = 0
        try:
            client.connect(peer)
            client.recv(1)
        except OSError as error:
            found = error.errno or 0
        client.close()
        assert found == errno.ECONNRESET, errno.errorcode.get(found, "a clean end")
        return name


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""  # closed since it was listed
