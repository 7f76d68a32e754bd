"""Secrets of the configuration, each in a file of its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from tproxyd.errors import ConfigError

_MOST_BYTES: Final = 4096


def read_secret(path: Path, place: str) -> str:
    """Return what a file holds, without the newline at its end; bytes that are no UTF-8 as lone surrogates (PEP 383).

    Args:
        path: of the file.
        place: the key that names it, for messages.

    Raises:
        ConfigError: it can't be read, is no regular file, or every user of this box may read it.
    """
    try:
        # Opening a FIFO that has no writer would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            wrong = _unfit(os.fstat(descriptor))
            data = b"" if wrong else file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{place}: {path}: {error.strerror}"]) from None
    if not wrong and len(data) > _MOST_BYTES:
        wrong = f"longer than {_MOST_BYTES} bytes: no password"
    if wrong:
        raise ConfigError([f"{place}: {path}: {wrong}"])
    return data.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")


def _unfit(status: os.stat_result) -> str:
    """Return why the file should not be used, or nothing."""
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_mode & stat.S_IRWXO:
        return f"every user may open it (mode {stat.S_IMODE(status.st_mode):04o}); take that away with chmod o="
    return ""
