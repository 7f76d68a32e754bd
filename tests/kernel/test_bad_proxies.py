"""Proxies that refuse, misbehave or vanish: each has a clear end cause, and none costs a socket or the daemon.

One daemon for each kind of proxy serves all cases; what the proxy does next, the case says.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kernel.conftest import DaemonFactory, checked_lab
from tests.lab import Arena, Daemon, Gateway, TcpService, UdpService, config, eventually
from tests.lab.proxies import socks5_proxy
from tproxyd.flow import Endpoint
from tproxyd.protocols import socks5

Act = Callable[[socket.socket], None]
Case = tuple[Act, str]

RESET = struct.pack("ii", 1, 0)
GREETED = b"\x05\x00"
GRANTED = b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
OK = b"HTTP/1.1 200 OK\r\n\r\n"
IP_RECVERR = 11


class Stage:
    """A server that acts as it is told at the moment."""

    def __init__(self) -> None:
        self.act: Act = lambda _: None

    def __call__(self, connection: socket.socket) -> None:
        connection.settimeout(20)  # longer than a test waits for sockets to be closed
        self.act(connection)


@contextlib.contextmanager
def staged(kind: str, folder: Any) -> Iterator[tuple[Arena, Stage]]:
    stage = Stage()
    with checked_lab() as lab, TcpService(lab.server, lab.server_address(4, host=3), handler=stage) as proxy:
        host, port = proxy.address
        backends = {"bad": {"type": kind, "server": f"{host}:{port}"}}
        daemon = Daemon(lab.gateway, folder, config(backends=backends, default="bad", timeouts={"connect": "500ms"}))
        try:
            arena = Arena(lab, daemon, kind)
            stage.act = says(b"HTTP/1.1 403 No\r\n\r\n") if kind == "http_connect" else says(GREETED, b"\x05\x04")
            arena.fails(4, (lab.server_address(4), 80))  # the worker opens its raw socket for ICMP, and keeps it
            yield arena, stage
        finally:
            daemon.stop()


@pytest.fixture(scope="module")
def bad_socks5(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Arena, Stage]]:
    with staged("socks5", tmp_path_factory.mktemp("stage")) as made:
        yield made


@pytest.fixture(scope="module")
def bad_http(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Arena, Stage]]:
    with staged("http_connect", tmp_path_factory.mktemp("stage")) as made:
        yield made


# What proxies do


def says(*answers: bytes) -> Act:
    """Answer each message with the next of these, then wait until the other end leaves."""

    def act(connection: socket.socket) -> None:
        leaves(*answers)(connection)
        while connection.recv(4096):
            pass

    return act


def leaves(*answers: bytes) -> Act:
    """As `says`, but hang up after the last one."""

    def act(connection: socket.socket) -> None:
        for answer in answers:
            connection.recv(4096)
            connection.sendall(answer)

    return act


def goes_on(*answers: bytes, piece_bytes: int = 1) -> Act:
    """As `says`, in pieces, and echo what comes then."""

    def act(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for answer in answers:
            connection.recv(4096)
            for at in range(0, len(answer), piece_bytes):
                connection.sendall(answer[at : at + piece_bytes])
                time.sleep(0.001)
        connection.sendall(connection.recv(4096))

    return act


def resets(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def never_ends(connection: socket.socket) -> None:
    connection.recv(4096)
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-Filler: more\r\n" * 100)


def refused(code: int) -> Act:
    return says(GREETED, bytes([5, code, 0, 1]) + bytes(6))


BAD_SOCKS5: dict[str, Case] = {
    "silence": (says(), "timed-out"),
    "silence after the greeting": (says(GREETED), "timed-out"),
    "half a reply": (says(GREETED, GRANTED[:5]), "timed-out"),
    "hanging up": (leaves(b""), "protocol"),
    "hanging up in the reply": (leaves(GREETED, GRANTED[:5]), "protocol"),
    "a reset": (resets, "server-reset"),
    "version 4": (says(b"\x04\x00"), "protocol"),
    "version 4 in the reply": (says(GREETED, b"\x04" + GRANTED[1:]), "protocol"),
    "HTTP": (says(OK), "protocol"),
    "a method nobody offered": (says(b"\x05\x02"), "protocol"),
    "no method in common": (says(b"\x05\xff"), "rejected"),
    "an unknown address type": (says(GREETED, b"\x05\x00\x00\x02" + bytes(6)), "protocol"),
    "a name of no length": (says(GREETED, b"\x05\x00\x00\x03\x00\x00\x00"), "protocol"),
    "a name cut short": (leaves(GREETED, b"\x05\x00\x00\x03\xffshort"), "protocol"),
    "general failure": (refused(1), "rejected"),
    "not allowed": (refused(2), "rejected"),
    "network unreachable": (refused(3), "unreachable"),
    "host unreachable": (refused(4), "unreachable"),
    "connection refused": (refused(5), "refused"),
    "time to live expired": (refused(6), "timed-out"),
    "command not supported": (refused(7), "rejected"),
    "address type not supported": (refused(8), "rejected"),
    "an unknown code": (refused(9), "rejected"),
    "the last code": (refused(255), "rejected"),
    "a refusal without an address": (says(GREETED, b"\x05\x05"), "refused"),
}

GOOD_SOCKS5: dict[str, Act] = {
    "byte for byte": goes_on(GREETED, GRANTED + b"hello"),
    "data glued to the reply": goes_on(GREETED, GRANTED + b"hello", piece_bytes=100),
    "the longest name": goes_on(GREETED, b"\x05\x00\x00\x03\xff" + b"n" * 255 + b"\x00\x50" + b"hello"),
    "an IPv6 address": goes_on(GREETED, b"\x05\x00\x00\x04" + bytes(18) + b"hello"),
}

BAD_HTTP: dict[str, Case] = {
    "silence": (says(), "timed-out"),
    "half a head": (says(b"HTTP/1.1 200 OK\r\n"), "timed-out"),
    "hanging up": (leaves(b""), "protocol"),
    "hanging up in the head": (leaves(b"HTTP/1.1 200"), "protocol"),
    "a reset": (resets, "server-reset"),
    "SOCKS5": (says(GREETED), "protocol"),
    "HTTP/2": (says(bytes.fromhex("000000040000000000")), "protocol"),
    "a head without end": (never_ends, "protocol"),
    "a broken head": (says(b"HTTP/1.1 abc OK\r\n\r\n"), "protocol"),
    "407": (says(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 5\r\n\r\nsorry"), "rejected"),
    "403": (says(b"HTTP/1.1 403 Forbidden\r\n\r\n"), "rejected"),
    "500": (says(b"HTTP/1.1 500 Sorry\r\n\r\n"), "rejected"),
    "301": (says(b"HTTP/1.1 301 Elsewhere\r\nLocation: x\r\n\r\n"), "rejected"),
    "502": (says(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), "unreachable"),
    "503": (says(b"HTTP/1.1 503 Unavailable\r\n\r\n"), "unreachable"),
    "504": (says(b"HTTP/1.1 504 Timeout\r\n\r\n"), "timed-out"),
}

GOOD_HTTP: dict[str, Act] = {
    "byte for byte": goes_on(OK + b"hello"),
    "an interim answer first": goes_on(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"hello"),
    "a length that means nothing": goes_on(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhello"),
    "HTTP/1.0": goes_on(b"HTTP/1.0 200 Connection established\r\n\r\nhello"),
}


@pytest.mark.parametrize("case", list(BAD_SOCKS5))
def test_a_bad_socks5_proxy_has_a_clear_end(bad_socks5: tuple[Arena, Stage], case: str) -> None:
    ends_as(*bad_socks5, *BAD_SOCKS5[case])


@pytest.mark.parametrize("case", list(BAD_HTTP))
def test_a_bad_http_proxy_has_a_clear_end(bad_http: tuple[Arena, Stage], case: str) -> None:
    ends_as(*bad_http, *BAD_HTTP[case])


@pytest.mark.parametrize("case", list(GOOD_SOCKS5))
def test_an_odd_socks5_proxy_is_understood(bad_socks5: tuple[Arena, Stage], case: str) -> None:
    carries(*bad_socks5, GOOD_SOCKS5[case])


@pytest.mark.parametrize("case", list(GOOD_HTTP))
def test_an_odd_http_proxy_is_understood(bad_http: tuple[Arena, Stage], case: str) -> None:
    carries(*bad_http, GOOD_HTTP[case])


def ends_as(arena: Arena, stage: Stage, act: Act, cause: str) -> None:
    before = arena.sockets()
    stage.act = act
    end = arena.end_of(arena.fails(4, (arena.lab.server_address(4), 80)))
    assert (end["cause"], end["phase"], end["backend"]) == (cause, "handshake", "bad")
    assert (end["bytes_up"], end["bytes_down"]) == (0, 0)
    eventually(lambda: arena.sockets() == before, "all sockets are closed")


def carries(arena: Arena, stage: Stage, act: Act) -> None:
    before = arena.sockets()
    stage.act = act
    with arena.lab.client.tcp((arena.lab.server_address(4), 80)) as client:
        client.sendall(b"world")
        client.shutdown(socket.SHUT_WR)
        got = b""
        while piece := client.recv(100):
            got += piece
        name = client.getsockname()[:2]
    assert got == b"helloworld"
    end = arena.end_of(name)
    assert (end["cause"], end["bytes_up"], end["bytes_down"]) == ("done", 5, 10)
    eventually(lambda: arena.sockets() == before, "all sockets are closed")


def test_a_proxy_that_is_not_there_is_told_from_a_server_that_is_not(lab: Gateway, daemon: DaemonFactory) -> None:
    """The phase tells: `connect` is about the proxy, `handshake` about what lies behind it."""
    running = daemon(
        backends={"gone": {"type": "socks5", "server": f"[{lab.server_address(6)}]:9"}},
        default="gone",
    )
    arena = Arena(lab, running, "socks5")
    end = arena.end_of(arena.fails(4, (lab.server_address(4), 80)))
    assert (end["cause"], end["phase"]) == ("refused", "connect")
    assert any("backend gone: no connection to the proxy" in message for message in running.messages())


# UDP


class FakeRelay:
    """Grants associations as long as it is told to; remembers their connections and where datagrams came from."""

    def __init__(self, lab: Gateway) -> None:
        self.controls: list[socket.socket] = []
        self.sock = lab.server.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((lab.server_address(4, host=3), 0))
        self.peer: tuple[str, int] = ("", 0)

    def __call__(self, control: socket.socket) -> None:
        control.recv(100)
        control.sendall(GREETED)
        control.recv(100)
        self.controls.append(control)
        control.sendall(b"\x05\x00\x00\x01" + socket.inet_aton(self.sock.getsockname()[0]))
        control.sendall(self.sock.getsockname()[1].to_bytes(2, "big"))
        control.settimeout(None)
        control.recv(100)

    def receive(self) -> tuple[object, bytes]:
        datagram, self.peer = self.sock.recvfrom(1000)
        return socks5.decode_datagram(datagram)


def udp_gateway(lab: Gateway, daemon: DaemonFactory, proxy: TcpService) -> Daemon:
    host, port = proxy.address
    return daemon(
        backends={"corp": {"type": "socks5", "server": f"{host}:{port}"}},
        default="corp",
        timeouts={"connect": "500ms", "udp_idle": "30s"},
    )


def test_an_association_takes_no_odd_datagrams(lab: Gateway, daemon: DaemonFactory) -> None:
    relay = FakeRelay(lab)
    with TcpService(lab.server, lab.server_address(4, host=3), handler=relay) as proxy:
        running = udp_gateway(lab, daemon, proxy)
        server = Endpoint(lab.server_address(4), 53)
        with lab.client.udp(server) as client:
            client.send(b"ask")
            assert relay.receive() == (server, b"ask")
            good = socks5.datagram_header(server)
            odd = [
                b"",
                b"\x00\x00\x00",
                good[:6],
                b"\x00\x00\x01" + good[3:] + b"a fragment",
                b"\x00\x00\x00\x02" + good[4:] + b"an unknown type",
                b"\x00\x00\x00\x03\x00\x00\x35a name of no length",
                b"\x00\x00\x00\x03\x04name\x00\x35a name",
                socks5.datagram_header(Endpoint("127.0.0.1", 53)) + b"this box",
                socks5.datagram_header(Endpoint("224.0.0.1", 53)) + b"a group",
                socks5.datagram_header(Endpoint("fd02::2", 53)) + b"the other family",
                socks5.datagram_header(Endpoint(server.address, 0)) + b"no port",
            ]
            for datagram in (*odd, good + b"", good + b"answer"):
                relay.sock.sendto(datagram, relay.peer)
            assert (client.recv(100), client.recv(100)) == (b"", b"answer")
            stranger = lab.server.socket(socket.AF_INET, socket.SOCK_DGRAM)
            stranger.sendto(good + b"forged", relay.peer)
            relay.sock.sendto(good + b"last", relay.peer)
            assert client.recv(100) == b"last"
        counters = running.counters()
        assert counters["udp_dropped"] == len(odd)
        assert counters["udp_flows"] == 1


@pytest.mark.parametrize("what", ["connection", "relay"])
def test_an_association_that_is_lost_is_made_again(lab: Gateway, daemon: DaemonFactory, what: str) -> None:
    relay = FakeRelay(lab)
    with TcpService(lab.server, lab.server_address(4, host=3), handler=relay) as proxy:
        running = udp_gateway(lab, daemon, proxy)
        server = Endpoint(lab.server_address(4), 53)
        with lab.client.udp(server) as client:
            client.send(b"one")
            assert relay.receive() == (server, b"one")
            before = relay.peer
            if what == "connection":
                relay.controls[0].shutdown(socket.SHUT_RDWR)
            else:
                old, relay.sock = relay.sock, FakeRelay(lab).sock
                old.close()
                client.send(b"is lost")
            eventually(lambda: len(relay.controls) == 2, "another association is made")
            client.send(b"two")
            assert relay.receive() == (server, b"two")
            assert relay.peer != before
            relay.sock.sendto(socks5.datagram_header(server) + b"answer", relay.peer)
            assert client.recv(100) == b"answer"
        counters = running.counters()
        assert (counters["udp_associations_lost"], counters["udp_flows"]) == (1, 1)


@pytest.mark.parametrize(
    ("act", "code"),
    [(refused(7), errno.EHOSTUNREACH), (refused(4), errno.EHOSTUNREACH), (says(), None)],
    ids=["not supported", "unreachable", "silence"],
)
def test_an_association_that_is_refused_is_told_to_the_client(
    lab: Gateway, daemon: DaemonFactory, act: Act, code: int | None
) -> None:
    with TcpService(lab.server, lab.server_address(4, host=3), handler=act) as proxy:
        running = udp_gateway(lab, daemon, proxy)
        with lab.client.udp((lab.server_address(4), 53), timeout_s=1) as client:
            client.setsockopt(socket.SOL_IP, IP_RECVERR, 1)
            client.send(b"ask")
            with pytest.raises(OSError, match=r"route|timed out") as caught:
                client.recv(10)
            assert caught.value.errno == code
        assert running.counters()["udp_dropped"] >= 1


def test_the_association_ends_with_the_last_flow(lab: Gateway, daemon: DaemonFactory) -> None:
    with (
        socks5_proxy(lab.server, lab.server_address(4, host=3)) as proxy,
        UdpService(lab.server, lab.server_address(4)) as echo,
    ):
        host, port = proxy.address
        running = daemon(backends={"corp": {"type": "socks5", "server": f"{host}:{port}"}}, default="corp")
        arena = Arena(lab, running, "socks5")
        before = arena.sockets()
        with lab.client.udp(echo.address) as client:
            client.send(b"hello")
            assert client.recv(10) == b"hello"
        assert arena.sockets() > before
        eventually(lambda: arena.sockets() == before, "all sockets are closed")
