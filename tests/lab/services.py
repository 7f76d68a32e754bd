"""Echo servers inside a namespace, in threads; they remember whom they saw."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Final, Self

from tests.lab.namespace import Namespace, family_of

_POLL_S: Final = 0.05
_CHUNK_BYTES: Final = 1 << 16


class TcpService:
    """Answers each connection in a thread of its own: by default it echoes until EOF, then closes.

    Attributes:
        address: host and port it listens on.
        peers: addresses and ports of those who connected, in their order.
    """

    def __init__(
        self,
        namespace: Namespace,
        host: str,
        port: int = 0,
        handler: Callable[[socket.socket], None] | None = None,
    ) -> None:
        """Listen at once; use it as a context manager, or `close` it."""
        self.peers: list[tuple[str, int]] = []
        self._handler = handler or _echo
        self._listener = namespace.socket(family_of(host), socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host, port))
        self._listener.listen(256)
        self._listener.settimeout(None)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, cut what still runs."""
        _shut_down(self._listener)
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            _shut_down(connection)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer[:2])
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._handler(connection)
            except OSError:
                return  # the client left, or the service is closed


class UdpService:
    """Sends each datagram back to where it came from.

    Attributes:
        address: host and port it is bound to.
        peers: senders of the datagrams, in their order.
    """

    def __init__(self, namespace: Namespace, host: str, port: int = 0) -> None:
        """Answer at once; use it as a context manager, or `close` it."""
        self.peers: list[tuple[str, int]] = []
        self._socket = namespace.socket(family_of(host), socket.SOCK_DGRAM, timeout_s=_POLL_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                data, peer = self._socket.recvfrom(_CHUNK_BYTES)
                self.peers.append(peer[:2])
                self._socket.sendto(data, peer)
            except OSError:
                continue  # nothing came, or a client is gone


def service(namespace: Namespace, network: str, host: str, port: int = 0) -> TcpService | UdpService:
    """An echo service of `tcp` or `udp`."""
    return {"tcp": TcpService, "udp": UdpService}[network](namespace, host, port)


def ask(
    namespace: Namespace,
    network: str,
    peer: tuple[str, int],
    source: tuple[str, int] | None = None,
    *,
    timeout_s: float = 5.0,
) -> tuple[str, int]:
    """Have a service echo something, and return the address and port that asked.

    Raises:
        OSError: no answer came, or a reset or an ICMP error.
    """
    connected = {"tcp": namespace.tcp, "udp": namespace.udp}[network]
    with connected(peer, source, timeout_s=timeout_s) as asking:
        asking.sendall(b"hello")
        if asking.recv(16) != b"hello":
            raise ConnectionError("cut short")
        asked: tuple[str, int] = asking.getsockname()[:2]
        return asked


def answers(namespace: Namespace, network: str, peer: tuple[str, int], timeout_s: float = 0.4) -> bool:
    """Whether a service can be reached."""
    try:
        return bool(ask(namespace, network, peer, timeout_s=timeout_s))
    except OSError:
        return False


def hears_refusal(sock: socket.socket) -> bool:
    """Send a datagram on a connected socket; tell whether an earlier one was refused (ICMP port unreachable)."""
    try:
        sock.send(b"y")
    except ConnectionRefusedError:
        return True
    return False


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(_CHUNK_BYTES):
        connection.sendall(data)


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # never connected, or gone already
