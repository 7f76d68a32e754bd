"""`tproxyd run`: prepare, serve, clean up."""

from __future__ import annotations

from pathlib import Path

from tproxyd.daemon.log import set_up_logging
from tproxyd.daemon.preparation import Preparation
from tproxyd.lock import only_one


def run(path: Path, *, keep_rules: bool) -> None:
    """Serve until told to stop; the rules go with a clean stop or a failed start, unless they are to be kept.

    Raises:
        TproxydError: it could not start.
    """
    with only_one("run", "another tproxyd runs"), Preparation(path) as preparation:
        import uvloop

        prepared = preparation.prepared()
        set_up_logging(prepared.settings.log_level, prepared.settings.log_format)

        async def serve() -> None:
            from tproxyd.daemon.supervisor import Supervisor

            await Supervisor(prepared, preparation.rules).run()

        served = False
        try:
            uvloop.run(serve())
            served = True
        finally:
            if not (served and keep_rules):
                from tproxyd.netfilter.apply import remove

                preparation.wait()
                remove()
