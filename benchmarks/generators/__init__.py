"""The UDP load generators: small C programs, compiled when a benchmark starts. iperf3 and wrk do the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

_SOURCES: Final = Path(__file__).parent


def build(folder: Path) -> None:
    """Compile every generator into `folder`, under its source's name.

    Raises:
        subprocess.CalledProcessError: there is a compiler, but it failed.
        FileNotFoundError: there is no `cc`.
    """
    for source in sorted(_SOURCES.glob("*.c")):
        options = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["cc", *options, "-o", str(folder / source.stem), str(source)], check=True)
