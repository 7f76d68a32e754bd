"""What SOCKS5 replies (RFC 1928 §6) mean as causes of a flow's end, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from tproxyd.flow import Cause
from tproxyd.protocols.socks5.wire import Reply

# A code that is missing here tells of the proxy itself (its rules, its failure), not of the destination.
CAUSE_OF_REPLY: Final[Mapping[int, Cause]] = MappingProxyType(
    {
        Reply.NETWORK_UNREACHABLE: Cause.UNREACHABLE,
        Reply.HOST_UNREACHABLE: Cause.UNREACHABLE,
        Reply.CONNECTION_REFUSED: Cause.REFUSED,
        Reply.TTL_EXPIRED: Cause.TIMED_OUT,  # what servers send when connect(2) gives ETIMEDOUT
    }
)

# A cause that is missing here can't end a flow before its request is answered, or has no code: GENERAL_FAILURE.
REPLY_OF_CAUSE: Final[Mapping[Cause, Reply]] = MappingProxyType(
    {
        Cause.REFUSED: Reply.CONNECTION_REFUSED,
        Cause.SERVER_RESET: Reply.CONNECTION_REFUSED,
        Cause.UNREACHABLE: Reply.HOST_UNREACHABLE,
        Cause.TIMED_OUT: Reply.TTL_EXPIRED,
        Cause.UNRESOLVED: Reply.HOST_UNREACHABLE,
        Cause.REJECTED: Reply.NOT_ALLOWED,
        Cause.LOOP: Reply.NOT_ALLOWED,
        Cause.DROPPED: Reply.NOT_ALLOWED,
        Cause.PROTOCOL: Reply.GENERAL_FAILURE,
        Cause.LIMIT: Reply.GENERAL_FAILURE,
        Cause.RESOURCES: Reply.GENERAL_FAILURE,
        Cause.SHUTDOWN: Reply.GENERAL_FAILURE,
        Cause.ERROR: Reply.GENERAL_FAILURE,
    }
)
