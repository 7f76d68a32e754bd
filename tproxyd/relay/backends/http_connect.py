"""The `http_connect` backend: TCP by HTTP CONNECT (RFC 9110 §9.3.6). It carries no UDP."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from tproxyd.flow import Cause, Client, OrigDst
from tproxyd.protocols import http_connect
from tproxyd.protocols.address import Address
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.protocols.http_connect import CAUSE_OF_STATUS
from tproxyd.relay.backends.proxy import Proxy
from tproxyd.relay.opening import Failure
from tproxyd.relay.sockets import Socket

_FORBIDDEN: Final = 403
_ERRNO_OF_STATUS: Final[Mapping[int, int]] = MappingProxyType(
    {_FORBIDDEN: errno.EACCES, 502: errno.EHOSTUNREACH, 503: errno.EHOSTUNREACH}
)


class HttpConnect(Proxy):
    """An HTTP proxy."""

    def open_datagram(self, client: Client, connect_to: OrigDst | None) -> Socket:  # noqa: ARG002  # for nobody
        """Refuse.

        Raises:
            OSError: EACCES, always.
        """
        raise OSError(errno.EACCES, f"backend {self._name} is an HTTP proxy and carries no UDP")

    def _dialogue(self, address: Address) -> Dialogue[Any]:
        return http_connect.Client(address, self._credentials)

    def _judge(self, event: Any) -> Failure | None:
        if not isinstance(event, http_connect.Rejected):
            return None
        cause = CAUSE_OF_STATUS.get(event.status, Cause.REJECTED)
        return Failure(cause, f"the HTTP proxy says: {event}", _ERRNO_OF_STATUS.get(event.status, 0))
