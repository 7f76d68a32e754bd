"""One of a kind in each network namespace: a name in the abstract socket namespace, which belongs to it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tproxyd.errors import TryAgain


@contextmanager
def only_one(name: str, what: str) -> Iterator[None]:
    """Hold a name while the block runs; the kernel frees it however the process ends.

    Raises:
        TryAgain: another process in this network namespace holds it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as holder:
        try:
            holder.bind(f"\0tproxyd/{name}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise TryAgain(f"{what} in this network namespace: wait for it, or stop it") from error
        yield
