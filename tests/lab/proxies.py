"""Proxies that let everything through as it is, half-closes and resets included; real ones lose some of it."""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Final

from tests.lab.dialogue import converse
from tests.lab.namespace import Namespace, family_of
from tests.lab.services import TcpService
from tproxyd.errors import ProtocolError
from tproxyd.flow import Endpoint
from tproxyd.protocols import socks5
from tproxyd.protocols.address import Address
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.socks5 import Command, Method, Reply, Request

_CHUNK_BYTES: Final = 1 << 16
_CONNECT_S: Final = 2.0
_RESET: Final = struct.pack("ii", 1, 0)
_REPLY: Final = {
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
}
_STATUS: Final = {errno.ECONNREFUSED: b"502 Refused", errno.EHOSTUNREACH: b"502 No Route"}


def socks5_proxy(
    namespace: Namespace,
    host: str,
    credentials: Credentials | None = None,
    on_request: Callable[[Address], None] = lambda _: None,
) -> TcpService:
    """A SOCKS5 proxy: CONNECT and UDP ASSOCIATE, with credentials if they are given; it tells what it is asked for."""
    return TcpService(namespace, host, handler=partial(_serve_socks5, namespace, credentials, on_request))


def http_proxy(namespace: Namespace, host: str) -> TcpService:
    """An HTTP proxy that knows CONNECT alone."""
    return TcpService(namespace, host, handler=partial(_serve_http, namespace))


def relay(one: socket.socket, other: socket.socket) -> None:
    """Copy both ways until both have ended; a reset of either resets the other."""
    for side in (one, other):
        side.settimeout(10)
    reading = {one: other, other: one}
    poll = select.poll()
    for side in reading:
        poll.register(side, select.POLLIN)
    by_fd = {side.fileno(): side for side in reading}
    try:
        while reading:
            for fd, _ in poll.poll():
                source = by_fd[fd]
                data = source.recv(_CHUNK_BYTES)
                if data:
                    reading[source].sendall(data)
                    continue
                poll.unregister(source)
                reading.pop(source).shutdown(socket.SHUT_WR)
    except ConnectionError:
        for side in (one, other):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    finally:
        other.close()


def _serve_socks5(
    namespace: Namespace,
    credentials: Credentials | None,
    on_request: Callable[[Address], None],
    client: socket.socket,
) -> None:
    server = socks5.Server([Method.USER_PASSWORD if credentials else Method.NONE])
    try:
        request = converse(client, server)
        if isinstance(request, Credentials):
            if request != credentials:
                server.reject_credentials()
                client.sendall(server.data_to_send())
                return
            server.accept_credentials()
            request = converse(client, server)
    except ProtocolError:
        return
    assert isinstance(request, Request)
    on_request(request.address)
    if request.command is Command.UDP_ASSOCIATE:
        _associate(namespace, client, server)
        return
    try:
        target = namespace.tcp((_host(request.address), request.address.port), timeout_s=_CONNECT_S)
    except OSError as error:
        server.reply(_REPLY.get(error.errno or 0, Reply.GENERAL_FAILURE), socks5.UNSPECIFIED)
        client.sendall(server.data_to_send())
        return
    server.reply(Reply.SUCCEEDED, Endpoint(*target.getsockname()[:2]))
    client.sendall(server.data_to_send())
    relay(client, target)


def _associate(namespace: Namespace, client: socket.socket, server: socks5.Server) -> None:
    """Relay datagrams for whoever sends the first one, while the connection stands; told is 0.0.0.0."""
    inner = namespace.socket(client.family, socket.SOCK_DGRAM)
    outer = {version: namespace.socket(family_of(host), socket.SOCK_DGRAM) for version, host in _ANY.items()}
    inner.bind((client.getsockname()[0], 0))
    for version, host in _ANY.items():
        outer[version].bind((host, 0))
    server.reply(Reply.SUCCEEDED, Endpoint("0.0.0.0", inner.getsockname()[1]))
    client.sendall(server.data_to_send())
    peer = None
    while True:
        ready, _, _ = select.select([client, inner, *outer.values()], [], [])
        for sock in ready:
            if sock is client:
                if not client.recv(100):
                    for each in (inner, *outer.values()):
                        each.close()
                    return
            elif sock is inner:
                datagram, peer = inner.recvfrom(_CHUNK_BYTES)
                address, payload = socks5.decode_datagram(datagram)
                outer[6 if ":" in _host(address) else 4].sendto(payload, (_host(address), address.port))
            elif peer is not None:
                payload, source = sock.recvfrom(_CHUNK_BYTES)
                inner.sendto(socks5.datagram_header(Endpoint(*source[:2])) + payload, peer)


_ANY: Final = {4: "0.0.0.0", 6: "::"}


def _serve_http(namespace: Namespace, client: socket.socket) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = client.recv(_CHUNK_BYTES)
        if not piece:
            return
        head += piece
    host, _, port = head.split(b" ")[1].decode().rpartition(":")
    try:
        target = namespace.tcp((host.strip("[]"), int(port)), timeout_s=_CONNECT_S)
    except OSError as error:
        client.sendall(b"HTTP/1.1 %s\r\n\r\n" % _STATUS.get(error.errno or 0, b"500 Failed"))
        return
    client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
    relay(client, target)


def _host(address: object) -> str:
    host: str = getattr(address, "address", None) or address.name  # type: ignore[attr-defined]
    return host
