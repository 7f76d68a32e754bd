"""A file or its bytes -> `Config`, or `ConfigError` with all that is wrong. Only this module opens a file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from tproxyd.config.document import Document, Leaf, Node, Problem, plain, read_document
from tproxyd.config.fields import MAX_PROBLEMS, WRITTEN
from tproxyd.config.model import Config
from tproxyd.config.report import explain
from tproxyd.config.wording import escaped
from tproxyd.errors import ConfigError

MAX_BYTES: Final = 16 * 1024 * 1024


def load_config(path: Path) -> Config:
    """Read and validate a configuration file.

    Raises:
        ConfigError: it can't be read or can't be used; nothing else.
    """
    return parse_config(_read(path), str(path))


def parse_config(data: bytes, name: str) -> Config:
    """Validate the bytes of a configuration; `name` stands for the file in problems.

    Raises:
        ConfigError: all that is wrong with it, in the order of the file; nothing else.
    """
    document = read_document(data)
    if document.root is None:
        raise ConfigError(_lines(name, list(document.problems)) or [_empty(name)])
    if isinstance(document.root, Leaf) and document.root.value is None and not document.problems:
        raise ConfigError([_empty(name)])
    config, problems = _validate(document, document.root)
    if config is None or problems:
        raise ConfigError(_lines(name, problems))
    return config


def _validate(document: Document, root: Node) -> tuple[Config | None, list[Problem]]:
    """Return the config, if there is one, and all problems; one is enough for a place."""
    try:
        return Config.model_validate(plain(root), context=WRITTEN), list(document.problems)
    except ValidationError as error:
        taken = {problem.position for problem in document.problems}
        further = [one for one in explain(error, root, MAX_PROBLEMS + 1) if one.position not in taken]
        return None, [*document.problems, *further]


def _lines(name: str, problems: list[Problem]) -> list[str]:
    file = escaped(name)
    lines = [f"{file}:{at.line}:{at.column}: {text}" for at, text in sorted(problems)[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"{file}: more problems than these {MAX_PROBLEMS}; correct them first")
    return lines


def _empty(name: str) -> str:
    return f"{escaped(name)}: nothing in it; write at least interception: {{interfaces: [lan0]}}"


# The file

_TOO_LARGE: Final = f"larger than {MAX_BYTES // 2**20} MiB, the most a configuration may have"
_REASONS: Final = {
    errno.ENOENT: "no such file; name one with -c",
    errno.ENOTDIR: "no such file; part of its path is not a directory",
    errno.EACCES: "permission denied; run as root, or let this user read it",
    errno.EPERM: "permission denied; run as root, or let this user read it",
    errno.ENXIO: "not a regular file; name a file with -c",
    errno.ELOOP: "too many symbolic links; name the file itself",
}


def _read(path: Path) -> bytes:
    try:
        # Opening a FIFO that has no writer would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            wrong = _unfit(os.fstat(descriptor))
            data = b"" if wrong else _read_bounded(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        code = error.errno or errno.EIO
        raise ConfigError([f"{escaped(str(path))}: {_REASONS.get(code) or os.strerror(code)}"]) from None
    if wrong or len(data) > MAX_BYTES:
        raise ConfigError([f"{escaped(str(path))}: {wrong or _TOO_LARGE}"])
    return data


def _unfit(status: os.stat_result) -> str:
    """Return why the file should not be read, or nothing."""
    if stat.S_ISDIR(status.st_mode):
        return "a directory; name a file with -c"
    if not stat.S_ISREG(status.st_mode):
        return _REASONS[errno.ENXIO]
    return _TOO_LARGE if status.st_size > MAX_BYTES else ""


def _read_bounded(descriptor: int) -> bytes:
    """Read to the end, or a little past the bound: the size may lie (/proc) or grow."""
    data = bytearray()
    while len(data) <= MAX_BYTES and (chunk := os.read(descriptor, 1024 * 1024)):
        data += chunk
    return bytes(data)
