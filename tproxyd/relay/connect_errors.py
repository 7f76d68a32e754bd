"""What the errno of a failed connect(2) says of the flow: the one place that translates it."""

from __future__ import annotations

import errno
from typing import Final

from tproxyd.flow import Cause

EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""This box has run out of something; the next moment may be better."""

_UNREACHABLE: Final = frozenset(
    {
        *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN),
        *(errno.EACCES, errno.EPERM, errno.ENOPROTOOPT, errno.ENONET),
    }
)


def cause_of_failed_connect(code: int) -> Cause:
    """Return the cause behind the errno of a failed connect."""
    if code == errno.ECONNREFUSED:
        return Cause.REFUSED
    if code == errno.ETIMEDOUT:
        return Cause.TIMED_OUT
    if code == errno.ECONNRESET:
        return Cause.SERVER_RESET
    if code in _UNREACHABLE:
        return Cause.UNREACHABLE
    return Cause.RESOURCES if code in {*EXHAUSTED, errno.EADDRNOTAVAIL} else Cause.ERROR
