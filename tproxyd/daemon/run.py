"""`tproxyd run`: prepare, serve, clean up."""

from __future__ import annotations

import signal
from pathlib import Path

from tproxyd.daemon.preparation import STOP_SIGNALS, Preparation
from tproxyd.lock import only_one


def run(path: Path, *, keep_rules: bool) -> None:
    """Serve until told to stop; the rules go with a clean stop, unless they are to be kept.

    A start that fails leaves them as they were: a box that was closed stays closed.

    Raises:
        TproxydError: it could not start.
    """
    # Until the supervisor listens for them: whoever dies halfway leaves rules without a daemon.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with only_one("run", "another tproxyd runs"), Preparation(path) as preparation:
        import uvloop  # this and what follows loads while the child reads the configuration

        from tproxyd.daemon.log import set_up_logging
        from tproxyd.daemon.supervisor import Supervisor

        prepared = preparation.prepared()
        set_up_logging(prepared.settings.log_level, prepared.settings.log_format)

        async def serve() -> None:
            await Supervisor(prepared, preparation.rules).run()

        try:
            uvloop.run(serve())
        finally:
            preparation.wait()
        if not keep_rules:
            from tproxyd.netfilter.apply import remove

            remove()
