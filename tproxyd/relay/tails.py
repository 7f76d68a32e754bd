"""The tails of long transfers: what is less than a patient source waits for, and must not wait for more."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final, Protocol

from tproxyd.relay.poller import Poller, Resumable

_TICK_S: Final = 0.002


class Patient(Resumable, Protocol):
    """Whoever is told of much data only.

    Attributes:
        last: monotonic seconds of its last move.
    """

    last: float

    @property
    def patient(self) -> bool:
        """It still is."""


class Tails:
    """Lets those go on that have not moved for a moment; idle when nobody is patient."""

    def __init__(self, loop: asyncio.AbstractEventLoop, poller: Poller) -> None:
        """Watch nobody yet."""
        self._loop = loop
        self._poller = poller
        self._watched: set[Patient] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, patient: Patient) -> None:
        """Look after someone for as long as it is patient; doing so twice is no more than once."""
        self._watched.add(patient)
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def close(self) -> None:
        """Watch nobody any more."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self._watched = {patient for patient in self._watched if patient.patient}
        self._timer = self._loop.call_later(_TICK_S, self._tick) if self._watched else None
        long_ago = monotonic() - _TICK_S
        for patient in self._watched:
            if patient.last < long_ago:
                self._poller.later(patient)
