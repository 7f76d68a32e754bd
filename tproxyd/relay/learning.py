"""Which UDP flows the kernel could carry, and asking the supervisor for it, in batches.

The supervisor says in which families it may be asked. It need not answer: a flow that goes on is offered again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from tproxyd.flow import FlowKey

FIRST_OFFER: Final = 7
"""Datagrams, of both ends, before a flow is offered: three questions and their answers (A, AAAA and HTTPS of one
name from one port) are over before that, and would only cost two transactions each."""
NEXT_OFFER: Final = 64
"""Datagrams until it is offered again."""

_TURN_S: Final = 0.02
_BATCH: Final = 256


class Learning:
    """What a worker offers to its supervisor.

    Attributes:
        versions: the families in which flows can be learned now.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ask: Callable[[list[FlowKey]], None]) -> None:
        """Args: ask: sends what is offered to the supervisor."""
        self.versions: frozenset[int] = frozenset()
        self._loop = loop
        self._ask = ask
        self._offered: list[FlowKey] = []

    def offer(self, key: FlowKey) -> None:
        """Offer a flow; over a batch's size, it is not."""
        if len(self._offered) >= _BATCH:
            return
        if not self._offered:
            self._loop.call_later(_TURN_S, self._send)
        self._offered.append(key)

    def _send(self) -> None:
        offered, self._offered = self._offered, []
        self._ask(offered)
