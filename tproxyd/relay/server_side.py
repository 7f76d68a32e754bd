"""What speaks UDP for a client endpoint to servers; `socket_side` is the plain one, `association` the proxied one."""

from __future__ import annotations

import errno
import socket
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from tproxyd.flow import Client, Decision, Endpoint, OrigDst
from tproxyd.relay import icmp, sockets

if TYPE_CHECKING:
    from tproxyd.relay.udp import UdpRelay

DATAGRAM_BYTES: Final = 65536
DATAGRAMS_A_TURN: Final = 64
FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
"""What a socket answers that takes nothing now; it says nothing about the other end."""

_MAX_ERRORS_READ: Final = 16
_ERROR_SPACE: Final = 512


class ServerSide(ABC):
    """Shared by the flows of one client endpoint (full cone), or one flow's own (symmetric).

    Attributes:
        connected_to: the one server it talks to (symmetric), or None for anyone (full cone).
        flows: how many flows use it.
        strangers: how many of them someone else than the client began.
    """

    __slots__ = ("client", "connected_to", "decision", "flows", "relay", "strangers")

    def __init__(self, relay: UdpRelay, client: Client, decision: Decision, connected_to: OrigDst | None) -> None:
        """Start without flows."""
        self.relay = relay
        self.client = client
        self.decision = decision
        self.connected_to = connected_to
        self.flows = 0
        self.strangers = 0

    @abstractmethod
    def open(self) -> None:
        """Begin to listen for answers.

        Raises:
            OSError: it can't.
        """

    @abstractmethod
    def send(self, payload: memoryview, orig_dst: OrigDst) -> None:
        """Send one datagram.

        Raises:
            OSError: it was not sent.
        """

    @abstractmethod
    def source(self, orig_dst: OrigDst) -> Endpoint | None:
        """Return the address and port that the server (or the proxy) sees, if it came to that.

        Raises:
            OSError: there is no way there any more.
        """

    @abstractmethod
    def close(self) -> None:
        """Close everything."""


def read_errors(sock: sockets.Socket, version: int) -> list[tuple[icmp.IcmpError | None, tuple[str, int], int]]:
    """Read a socket's error queue (MSG_ERRQUEUE, recv(2)): the error, whom it is about, bytes of the datagram."""
    found: list[tuple[icmp.IcmpError | None, tuple[str, int], int]] = []
    for _ in range(_MAX_ERRORS_READ):
        try:
            data, ancillary, _, peer = sock.recvmsg(DATAGRAM_BYTES, _ERROR_SPACE, socket.MSG_ERRQUEUE)
        except OSError:
            break
        found.append((icmp.from_error_queue(ancillary, version), (peer[0], peer[1]) if peer else ("", 0), len(data)))
    return found
