"""What every backend offers to the relays; `make` builds them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tproxyd.flow import Client, OrigDst
from tproxyd.relay.sockets import Socket

if TYPE_CHECKING:
    from tproxyd.relay.opening import Opening


class Backend(Protocol):
    """A way to reach original destinations.

    Attributes:
        full_cone: one server side speaks for a client endpoint to everybody, and anybody may answer.
        keeps_four_tuple: the server sees the client's own address and port, so that the kernel could as well forward.
    """

    full_cone: bool
    keeps_four_tuple: bool

    def connect(self, client: Client, orig_dst: OrigDst) -> Socket | Opening:
        """Begin a TCP connection.

        Returns:
            A socket that is connecting, which the caller closes, or an opening, which the caller starts, for ways on
            which more has to be said before the flow is through.

        Raises:
            OSError: it failed at once.
        """

    def open_datagram(self, client: Client, connect_to: OrigDst | None) -> Socket | Opening:
        """Open what speaks UDP for a client.

        Args:
            client: who is spoken for.
            connect_to: the only destination (symmetric), or None for any (full cone).

        Returns:
            A socket, which the caller closes, or an opening whose `answer` is a SOCKS5 association.

        Raises:
            OSError: it failed at once; EACCES: this way carries no UDP.
        """
