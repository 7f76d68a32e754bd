"""Rules on trial: taken back unless the operator confirms, who may have just cut off their own SSH.

A guard process of its own session holds the old state. It waits for one byte; silence, or the end of whoever
should send it, brings the old state back.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from time import sleep
from typing import Final, Self

from tproxyd.errors import RulesetError, TproxydError, TryAgain
from tproxyd.netfilter.apply import Application

_CONFIRMED: Final = b"y"
_MARGIN_S: Final = 5
_BUSY_S: Final = 0.5


class Trial:
    """A change that is not final yet; use as a context manager.

    Leaving the block unconfirmed, by timeout, error or death of this process, takes the change back.
    """

    def __init__(self, application: Application, seconds: int) -> None:
        """Remember the state there is now and start the guard; the change itself comes after."""
        snapshots = application.snapshot()
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if not self._pid:
            os.close(self._writer)
            _guard(application, snapshots, reader, seconds + _MARGIN_S)
        os.close(reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the guard act, and wait for it."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
            if os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]):
                raise RulesetError("the change could not be taken back whole: run tproxyd remove-rules")

    def confirm(self) -> None:
        """Keep the change."""
        os.write(self._writer, _CONFIRMED)


def asked_to_keep(seconds: int) -> bool:
    """Ask on standard input; False after `seconds`, at its end, or for any answer but yes."""
    print(f"Applied. Type yes within {seconds} s to keep the rules: ", end="", file=sys.stderr, flush=True)
    if sys.stdin is None:
        return False
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and sys.stdin.readline().strip().lower() in ("y", "yes")


def _restore(application: Application, snapshots: list[object]) -> None:
    """Bring the old state back, however long someone else is busy with the rules."""
    while True:
        try:
            application.restore(snapshots)
        except TryAgain:
            sleep(_BUSY_S)
        else:
            return


def _guard(application: Application, snapshots: list[object], reader: int, seconds: int) -> None:
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    code = 0
    try:
        readable, _, _ = select.select([reader], [], [], seconds)
        if not (readable and os.read(reader, 1) == _CONFIRMED):
            _restore(application, snapshots)
    except (TproxydError, OSError) as error:
        print(f"tproxyd: error: {error}", file=sys.stderr)
        code = 1
    finally:
        os._exit(code)
