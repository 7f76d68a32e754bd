"""One edge-triggered epoll object for all relayed flows, inside the event loop.

An asyncio transport costs three times the CPU per connection. So flows live in an epoll object of their own,
whose descriptor the loop watches like any other; when it is readable, a batch of events is handed out.
"""

from __future__ import annotations

import asyncio
import logging
import select
from time import monotonic
from typing import Final, Protocol

from tproxyd.relay.counters import Counters
from tproxyd.relay.sockets import Socket

EDGE: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
LEVEL: Final = select.EPOLLIN

_BATCH: Final = 256
_SLICE_S: Final = 0.0005
"""How long those who have much to move may go on before events are looked at again."""

_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Whoever owns a registered descriptor."""

    def on_event(self, fd: int, events: int) -> None:
        """Take an event of `fd`; `events` are EPOLL* bits."""

    def abort(self, error: Exception) -> None:
        """End: handling an event raised what nobody foresaw."""


class Resumable(Protocol):
    """Whoever has more to do than one turn allows."""

    def resume(self) -> None:
        """Go on where the last turn stopped."""

    def abort(self, error: Exception) -> None:
        """End: going on raised what nobody foresaw."""


class Poller:
    """Hands out events; closes sockets after the batch, so that no event meets a descriptor's next owner.

    Attributes:
        now: monotonic seconds at the start of the batch in hand.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters) -> None:
        """Make the epoll object and let `loop` watch it until `close`."""
        self._loop = loop
        self._counters = counters
        self._epoll = select.epoll()
        self._watchers: dict[int, Watcher] = {}
        self._closing: list[Socket] = []
        self._waiting: dict[Resumable, None] = {}
        self._going_on = False
        self.now = monotonic()
        loop.add_reader(self._epoll.fileno(), self._on_ready)

    def register(self, fd: int, watcher: Watcher, events: int = EDGE) -> None:
        """Watch a descriptor; its first event comes at once if it is ready."""
        self._epoll.register(fd, events)
        self._watchers[fd] = watcher

    def hand_over(self, fd: int, watcher: Watcher, events: int = EDGE) -> None:
        """Let another watch a descriptor from now on; its first event comes at once if it is ready."""
        self._epoll.modify(fd, events)
        self._watchers[fd] = watcher

    def unregister(self, fd: int) -> None:
        """Stop watching a descriptor that stays open."""
        if self._watchers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close_socket(self, sock: Socket) -> None:
        """Stop watching a socket and close it after the batch in hand."""
        self._watchers.pop(sock.fileno(), None)
        if not self._closing:
            self._loop.call_soon(self._close_sockets)
        self._closing.append(sock)

    def later(self, resumable: Resumable) -> None:
        """Let others have their turn before this one goes on; those who wait go on in turn, one turn each."""
        self._waiting[resumable] = None
        self._go_on_soon()

    def close(self) -> None:
        """Stop watching everything; the sockets are their owners'."""
        self._close_sockets()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _on_ready(self) -> None:
        self.now = monotonic()
        watchers = self._watchers
        for fd, events in self._epoll.poll(0, _BATCH):
            watcher = watchers.get(fd)
            if watcher is None:
                continue
            try:
                watcher.on_event(fd, events)
            except Exception as error:  # noqa: BLE001  # the program's one broad except: a flow dies, not the worker
                self._supervise(watcher, error)

    def _resume(self) -> None:
        self._going_on = False
        self.now = monotonic()
        end = self.now + _SLICE_S
        for _ in range(len(self._waiting)):
            resumable = next(iter(self._waiting))
            del self._waiting[resumable]
            try:
                resumable.resume()
            except Exception as error:  # noqa: BLE001  # as above
                self._supervise(resumable, error)
            if monotonic() > end:
                break
        if self._waiting:
            self._go_on_soon()

    def _go_on_soon(self) -> None:
        if not self._going_on:
            self._going_on = True
            self._loop.call_soon(self._resume)

    def _supervise(self, watcher: Watcher | Resumable, error: Exception) -> None:
        self._counters.flow_errors += 1
        _log.error("a flow ended by an unforeseen error: %r", error, exc_info=error)
        watcher.abort(error)

    def _close_sockets(self) -> None:
        closing, self._closing = self._closing, []
        for sock in closing:
            sock.close()
