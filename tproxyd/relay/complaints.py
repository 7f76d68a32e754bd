"""What goes wrong with proxies, told to the operator: now and then, not once a flow."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Final

_EVERY_S: Final = 10.0
_log = logging.getLogger(__name__)


class Complaints:
    """At most one line a backend in ten seconds; the next one tells how many were left out."""

    def __init__(self) -> None:
        """Start with nothing to complain of."""
        self._told: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def __call__(self, backend: str, text: str) -> None:
        """Tell, or count."""
        now = monotonic()
        if now - self._told.get(backend, -_EVERY_S) < _EVERY_S:
            self._left_out[backend] = self._left_out.get(backend, 0) + 1
            return
        self._told[backend] = now
        left_out = self._left_out.pop(backend, 0)
        _log.warning("backend %s: %s%s", backend, text, f" ({left_out} more before it)" if left_out else "")
