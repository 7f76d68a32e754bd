"""Kernel pipes for splice(2), kept for the next direction that needs one."""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from typing import Final

PIPE_BYTES: Final = 1 << 20
_POOLED: Final = 64


@dataclass(slots=True, eq=False)
class Pipe:
    """An empty pipe belongs to the pool; one that holds bytes to the direction they flow in.

    Attributes:
        held: bytes in it.
    """

    reader: int
    writer: int
    held: int = 0

    def close(self) -> None:
        """Close both ends; what it held is lost."""
        os.close(self.reader)
        os.close(self.writer)


class PipePool:
    """Hands pipes out and takes them back."""

    def __init__(self) -> None:
        """Start with none."""
        self._idle: list[Pipe] = []

    def take(self) -> Pipe | None:
        """Return an empty pipe, or None when the system has no more: then bytes are copied.

        An unprivileged user may hold 64 MiB of pipes (pipe-user-pages-soft, pipe(7)); past that a pipe keeps
        its 64 KiB or less, which only means more system calls.
        """
        if self._idle:
            return self._idle.pop()
        try:
            reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return Pipe(reader, writer)

    def give_back(self, pipe: Pipe) -> None:
        """Take a pipe back; one that still holds bytes, or one too many, is closed."""
        if pipe.held or len(self._idle) >= _POOLED:
            pipe.close()
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close the idle pipes."""
        while self._idle:
            self._idle.pop().close()
