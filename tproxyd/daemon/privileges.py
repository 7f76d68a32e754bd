"""What a worker gives up for good: root, all but two capabilities, and the way back (capabilities(7)).

CAP_NET_RAW is enough for IP_TRANSPARENT, foreign binds and SO_MARK. CAP_NET_BIND_SERVICE lets a worker answer as
port 53 of a foreign address: the kernel's rule about ports below 1024 knows no transparent sockets.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import struct
from typing import Final

from tproxyd.errors import PermissionDenied, TproxydError

KEPT: Final = frozenset({10, 13})
"""CAP_NET_BIND_SERVICE and CAP_NET_RAW."""

_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522
_LAST_CAPABILITY: Final = 63


def drop_to(user: str) -> None:
    """Become `user` with the capabilities in `KEPT` and no others.

    Raises:
        TproxydError: there is no such user.
        PermissionDenied: this process is not allowed to (it needs CAP_SETUID, CAP_SETGID, CAP_SETPCAP).
    """
    try:
        account = pwd.getpwnam(user)
    except KeyError as error:
        raise TproxydError(f"there is no user {user!r} for the workers: create it, or set another `user`") from error
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _prctl(libc, _PR_SET_KEEPCAPS, 1)
        for capability in range(_LAST_CAPABILITY + 1):
            if capability not in KEPT and libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
                break  # past the last one this kernel knows
        os.setgroups([])
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
        _set_capabilities(libc, sum(1 << capability for capability in KEPT))
        _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise PermissionDenied(f"a worker can't become {user!r} and keep CAP_NET_RAW: {error}: run as root") from error


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _set_capabilities(libc: ctypes.CDLL, mask: int) -> None:
    """Set effective and permitted to `mask`, inheritable to nothing; the sets travel as two 32-bit halves."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    if libc.capset(header, data):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
