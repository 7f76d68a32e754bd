"""One of a kind in each network namespace: a file in /run/tproxyd that only root can open, locked (flock(2)).

A name in the abstract socket namespace would need no file, but any local user could take it first.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tproxyd.errors import PermissionDenied, TproxydError, TryAgain

FOLDER: Final = Path("/run/tproxyd")


@contextmanager
def only_one(name: str, what: str) -> Iterator[None]:
    """Hold a name while the block runs; the kernel frees it however the process ends.

    Raises:
        TryAgain: another process in this network namespace holds it; `what` says so.
        PermissionDenied: this process may not write to /run/tproxyd.
    """
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    path = FOLDER / f"{name}-{namespace}.lock"
    try:
        descriptor = _locked(path)
    except BlockingIOError as error:
        raise TryAgain(f"{what} in this network namespace: wait for it, or stop it") from error
    except PermissionError as error:
        raise PermissionDenied(f"{path}: not permitted: run as root") from error
    except OSError as error:
        raise TproxydError(f"{path} can't be locked: {error.strerror}: make {FOLDER} writable") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: whoever opens it next finds a file of their own
        os.close(descriptor)


def _locked(path: Path) -> int:
    """Open and lock a file that is still the one of that name; one that was just given up is passed by."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
