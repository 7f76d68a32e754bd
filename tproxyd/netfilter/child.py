"""Work in a short-lived forked process: what a library keeps in memory, or for one address family only, ends there.

python-iptables can speak for one family per process (the second one finds no TPROXY).
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

from tproxyd.errors import RulesetError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_CHUNK_BYTES: Final = 1 << 16


def in_child(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in a forked child and return what it returns; blocks until the child has ended.

    The child shares the parent's network namespace and open files. Result and exception must be picklable.

    Raises:
        RulesetError: the child died without an answer.
        Exception: what the function raised.
    """
    reading, writing = os.pipe()
    if sys.stderr is not None:
        sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        _work(writing, lambda: function(*args, **kwargs))
    os.close(writing)
    answer = _read_all(reading)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise RulesetError(f"a helper process was killed by {signal.Signals(-code).name} in {function.__name__}")
    if code or not answer:
        raise RulesetError(f"a helper process ended with status {code} in {function.__name__}")
    succeeded, value = pickle.loads(answer)  # noqa: S301  # from our own child
    if succeeded:
        return value  # type: ignore[no-any-return]
    raise value


def _work(writing: int, call: Callable[[], Any]) -> NoReturn:
    """Run the call, send the answer, end without the parent's exit handlers and unflushed output."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on, between two commits
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)  # python-iptables flushes the inherited stdout and reads C's through fd 1
        with os.fdopen(writing, "wb") as answer:
            answer.write(_answer(call))
        code = 0
    finally:
        os._exit(code)


def _answer(call: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((True, call()))
    except Exception as error:  # noqa: BLE001  # not swallowed: the parent raises it
        error.add_note(traceback.format_exc())
        try:
            return pickle.dumps((False, error))
        except (pickle.PicklingError, TypeError, AttributeError):
            return pickle.dumps((False, RulesetError(f"{type(error).__name__}: {error}")))


def _read_all(descriptor: int) -> bytes:
    chunks = []
    with os.fdopen(descriptor, "rb", buffering=0) as source:
        while chunk := source.read(_CHUNK_BYTES):
            chunks.append(chunk)
    return b"".join(chunks)
