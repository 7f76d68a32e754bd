"""`python -m benchmarks.experiments.sockmap.relay PORT`: a transparent TCP relay that does nothing but join sockets.

It accepts, connects with the client's address, joins both in a sockmap and waits for an end; a process a core. What a
product would need besides is left out: limits, idle times, and copying for what a sockmap doesn't take (a client that
half-closed before the server answered is reset here).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
from time import monotonic
from typing import Final

from benchmarks.experiments.sockmap.bpf import Sockmap
from tproxyd.flow import LOOPBACK
from tproxyd.relay import sockets

_ACCEPTS: Final = 64
_LOOK_S: Final = 0.001
_GRACE_S: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1
_TCP_INFO_BYTES: Final = 216


class Pair:
    """The two sockets of a flow.

    Attributes:
        joined: the kernel moves what they receive.
        ended: what each side said last: EPOLLRDHUP for FIN, EPOLLERR for a reset.
        told: sides that were told of the other's FIN.
        until: when waiting for bytes that are on their way ends, after a reset; monotonic seconds.
    """

    __slots__ = ("client", "ended", "joined", "server", "told", "until")

    def __init__(self, client: sockets.Socket, server: sockets.Socket) -> None:
        self.client = client
        self.server = server
        self.joined = False
        self.ended: dict[sockets.Socket, int] = {}
        self.told: set[sockets.Socket] = set()
        self.until = 0.0

    def end(self, sock: sockets.Socket, event: int, now: float) -> None:
        """Note that a side has ended."""
        self.ended[sock] = event
        if event == select.EPOLLERR:
            self.until = self.until or now + _GRACE_S

    def settle(self, now: float) -> bool | None:
        """Pass on what ended, once what came before has gone out: True when all is over, None to be asked again.

        No event tells that the kernel's queue between two sockets is empty: their counters must be compared.
        """
        again = False
        for source, event in list(self.ended.items()):
            sink = self.server if source is self.client else self.client
            if sink in self.told and event == select.EPOLLRDHUP:
                continue
            source_fin = 1 if event == select.EPOLLRDHUP else 0
            on_their_way = _received(source) - source_fin > _written(sink)
            if on_their_way and not (self.until and now > self.until):
                again = True
            elif event == select.EPOLLERR:
                return True
            else:
                self.told.add(sink)
                if len(self.told) == 2:
                    self._close_in_order()
                    return True
                sink.shutdown(socket.SHUT_WR)
        return None if again else False

    def _close_in_order(self) -> None:
        for sock in (self.client, self.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, sockets.LINGER_OFF)


class Relay:
    """All flows of a process."""

    def __init__(self, listeners: list[sockets.Socket]) -> None:
        """Take over listening sockets."""
        self._sockmap = Sockmap()
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._epoll = select.epoll()
        self._pairs: dict[int, Pair] = {}
        self._ending: set[Pair] = set()
        self._over: list[Pair] = []
        for fd in self._listeners:
            self._epoll.register(fd, select.EPOLLIN)

    def run(self) -> None:
        """Serve until killed."""
        while True:
            for fd, events in self._epoll.poll(_LOOK_S if self._ending else None):
                if fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif pair := self._pairs.get(fd):
                    self._on_event(pair, fd, events)
            for pair in list(self._ending):
                self._settle(pair)
            self._close()

    def _accept(self, listener: sockets.Socket) -> None:
        for _ in range(_ACCEPTS):
            try:
                client, peer = sockets.accept(listener)
            except OSError:
                return
            version = 4 if listener.family == socket.AF_INET else 6
            server = sockets.tcp_server_side(version, 0, transparent=True)
            try:
                sockets.bind_address_only(server, version, peer[0])
                server.connect_ex(client.getsockname())
            except OSError:
                client.close()
                server.close()
                continue
            self._pairs[server.fileno()] = pair = Pair(client, server)
            self._pairs[client.fileno()] = pair
            self._epoll.register(server.fileno(), select.EPOLLOUT)

    def _on_event(self, pair: Pair, fd: int, events: int) -> None:
        if not pair.joined:
            self._join(pair, events)
            return
        sock = pair.client if fd == pair.client.fileno() else pair.server
        for event in (select.EPOLLRDHUP, select.EPOLLERR):
            if events & event:
                pair.end(sock, event, monotonic())
        self._settle(pair)

    def _join(self, pair: Pair, events: int) -> None:
        if events & (select.EPOLLERR | select.EPOLLHUP):
            self._drop(pair)
            return
        try:
            self._sockmap.join(pair.client, pair.server)
        except OSError:
            self._drop(pair)
            return
        pair.joined = True
        # Not EPOLLIN: the kernel would wake this process for each packet that it has already sent on.
        self._epoll.modify(pair.server.fileno(), select.EPOLLRDHUP | select.EPOLLET)
        self._epoll.register(pair.client.fileno(), select.EPOLLRDHUP | select.EPOLLET)

    def _settle(self, pair: Pair) -> None:
        try:
            over = pair.settle(monotonic())
        except OSError:
            over = True
        if over:
            self._drop(pair)
        elif over is None:
            self._ending.add(pair)
        else:
            self._ending.discard(pair)

    def _drop(self, pair: Pair) -> None:
        self._ending.discard(pair)
        for sock in (pair.client, pair.server):
            self._pairs.pop(sock.fileno(), None)
        self._over.append(pair)

    def _close(self) -> None:
        """After the batch, so that no event meets a descriptor's next owner."""
        for pair in self._over:
            pair.client.close()
            pair.server.close()
        self._over.clear()


def _received(sock: sockets.Socket) -> int:
    """Bytes that came in, a FIN counted as one (tcpi_bytes_received)."""
    found: int = struct.unpack_from("=Q", _info(sock), 128)[0]
    return found


def _written(sock: sockets.Socket) -> int:
    """Bytes put into the send queue so far (tcpi_bytes_sent - tcpi_bytes_retrans + tcpi_notsent_bytes)."""
    info = _info(sock)
    sent, again = struct.unpack_from("=QQ", info, 200)
    waiting: int = struct.unpack_from("=I", info, 144)[0]
    return int(sent - again + waiting)


def _info(sock: sockets.Socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)


def main(port: int) -> None:
    """Run a process a core; all end with the first."""
    for _ in range(1, os.cpu_count() or 1):
        if not os.fork():
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            break
    Relay([sockets.tcp_listener(LOOPBACK[version], port, 0) for version in (4, 6)]).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
