"""Names of proxies to addresses, by the system's own resolver (getaddrinfo(3)), without blocking the worker.

Names of clients' flows are not resolved here: a flow has an original destination.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from time import monotonic
from typing import Final

Found = Callable[[list[str]], None]

_KEPT_S: Final = 30.0
_KEPT_IF_NONE_S: Final = 2.0
_log = logging.getLogger(__name__)


class Resolver:
    """Asks once for each name, however many wait, and keeps the answer for a short time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start with no names."""
        self._loop = loop
        self._known: dict[str, tuple[float, list[str]]] = {}
        self._waiting: dict[str, list[Found]] = {}
        self._lookups: dict[str, asyncio.Task[None]] = {}

    def resolve(self, name: str, found: Found) -> None:
        """Call `found` with the addresses of a name, perhaps at once; with none if it has none."""
        until, addresses = self._known.get(name, (0.0, []))
        if monotonic() < until:
            found(addresses)
            return
        self._waiting.setdefault(name, []).append(found)
        if name not in self._lookups:
            self._lookups[name] = self._loop.create_task(self._look_up(name))
            self._lookups[name].add_done_callback(_report)

    async def _look_up(self, name: str) -> None:
        addresses: list[str] = []
        try:
            answers = await self._loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            addresses = [text for *_, address in answers if "%" not in (text := str(address[0]))]
        except (OSError, UnicodeError) as error:
            _log.warning("the name %s has no address: %s", name, error)
        self._known[name] = (monotonic() + (_KEPT_S if addresses else _KEPT_IF_NONE_S), addresses)
        del self._lookups[name]
        for found in self._waiting.pop(name, []):
            found(addresses)


def _report(lookup: asyncio.Task[None]) -> None:
    if not lookup.cancelled() and (error := lookup.exception()) is not None:
        _log.error("whoever waited for a name met an unforeseen error: %r", error, exc_info=error)
