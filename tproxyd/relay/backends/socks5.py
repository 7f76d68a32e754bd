"""The `socks5` backend: TCP by CONNECT, UDP by UDP ASSOCIATE (RFC 1928)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from tproxyd.flow import Cause, Client, Endpoint, OrigDst
from tproxyd.protocols import socks5
from tproxyd.protocols.address import Address
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.protocols.socks5 import CAUSE_OF_REPLY, UNSPECIFIED, Command, Reply
from tproxyd.relay.backends.proxy import Proxy
from tproxyd.relay.opening import Failure, Opening

_ERRNO_OF_REPLY: Final[Mapping[int, int]] = MappingProxyType(
    {
        Reply.NOT_ALLOWED: errno.EACCES,
        Reply.NETWORK_UNREACHABLE: errno.ENETUNREACH,
        Reply.HOST_UNREACHABLE: errno.EHOSTUNREACH,
        Reply.CONNECTION_REFUSED: errno.ECONNREFUSED,
        Reply.COMMAND_NOT_SUPPORTED: errno.EACCES,
        Reply.ADDRESS_TYPE_NOT_SUPPORTED: errno.ENETUNREACH,
    }
)
"""What the client would have got from the network itself; other failures say nothing that it could use."""


class Socks5(Proxy):
    """A SOCKS5 proxy."""

    def open_datagram(self, client: Client, connect_to: OrigDst | None) -> Opening:  # noqa: ARG002  # one for all
        """Return an opening that ends in an association, for whatever sender and destination.

        Raises:
            OSError: EACCES: the way leads via other proxies, which carry no datagrams.
        """
        if self._before:
            raise OSError(errno.EACCES, f"backend {self._name} has a `via` and carries no UDP")
        return Opening(self._means, self.entrance, [self._ask(UNSPECIFIED, self._association, _judge_association)])

    def _dialogue(self, address: Address) -> Dialogue[Any]:
        return socks5.Client(Command.CONNECT, address, self._credentials)

    def _association(self, address: Address) -> Dialogue[Any]:
        return socks5.Client(Command.UDP_ASSOCIATE, address, self._credentials)

    def _judge(self, event: Any) -> Failure | None:
        return _judge(event)


def _judge(event: Any) -> Failure | None:
    if isinstance(event, socks5.Rejected):
        cause = CAUSE_OF_REPLY.get(event.code, Cause.REJECTED)
        return Failure(cause, f"the SOCKS5 proxy says: {event}", _ERRNO_OF_REPLY.get(event.code, 0))
    if isinstance(event, socks5.Unauthenticated):
        return Failure(Cause.REJECTED, f"the SOCKS5 proxy says: {event}")
    return None


def _judge_association(event: Any) -> Failure | None:
    if isinstance(event, socks5.Associated) and not (isinstance(event.address, Endpoint) and event.address.port):
        return Failure(Cause.PROTOCOL, f"the SOCKS5 proxy takes datagrams at {event.address}, which is no place")
    return _judge(event)
