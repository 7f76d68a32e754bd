"""What every backend must do, whatever way it takes: one kit for `direct`, `socks5`, `http_connect` and a chain.

The proxies here are faithful ones of our own; real ones, each with its quirks, stand in `test_proxies.py`, bad ones in
`test_bad_proxies.py`. One daemon serves all tests of a way, and after each test its worker must hold no more sockets
than before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import checked_lab
from tests.lab import Arena, Daemon, Gateway, TcpService, UdpService, config, eventually
from tests.lab.proxies import http_proxy, socks5_proxy
from tproxyd.protocols.credentials import Credentials

RESET = struct.pack("ii", 1, 0)
USER = Credentials("user", "hünter 2")
NOBODY_ANSWERS = 9999
CARRY_UDP = ("direct", "socks5")
UNREACHABLE = {4: "198.51.100.1", 6: "2001:db8::1"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
BULK = 6_000_000
MOST_HELD = 200_000_000
CONNECT_S = 1

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def chain(lab: Gateway, folder: Path, stack: contextlib.ExitStack, types: list[str]) -> dict[str, Any]:
    """Start a proxy of each type, the first one nearest to the gateway; return backends, `way` the last of them.

    Proxies listen on IPv4 and IPv6 by turns, so that each way crosses both.
    """
    secret = folder / "secret"
    secret.write_text(f"{USER.password}\n")
    secret.chmod(0o600)
    backends: dict[str, Any] = {}
    for number, kind in enumerate(types):
        host = lab.server_address(4 if number % 2 == 0 else 6, host=3)
        if kind == "socks5":
            proxy = stack.enter_context(socks5_proxy(lab.server, host, USER))
            login = {"username": USER.username, "password_file": str(secret)}
        else:
            proxy, login = stack.enter_context(http_proxy(lab.server, host)), {}
        name = "way" if number == len(types) - 1 else f"hop{number}"
        via = {"via": f"hop{number - 1}"} if number else {}
        at = f"[{host}]:{proxy.address[1]}" if ":" in host else f"{host}:{proxy.address[1]}"
        backends[name] = {"type": kind, "server": at, **login, **via}
    return backends


WAYS: dict[str, list[str]] = {
    "direct": [],
    "socks5": ["socks5"],
    "http_connect": ["http_connect"],
    "chain": ["socks5", "http_connect", "socks5"],
}


@pytest.fixture(scope="module", params=list(WAYS))
def shared(root: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    with checked_lab() as lab, contextlib.ExitStack() as stack:
        backends = chain(lab, folder, stack, WAYS[request.param]) or {"way": {"type": "direct"}}
        for box in (lab.gateway, lab.server):
            box.ip(f"route add unreachable {UNREACHABLE[4]}\nroute add unreachable {UNREACHABLE[6]}")
        lab.server.nft(
            "add table inet silent; add chain inet silent input { type filter hook input priority 0; };"
            f"add rule inet silent input tcp dport {NOBODY_ANSWERS} drop"
        )
        timeouts = {"connect": f"{CONNECT_S}s", "udp_idle": "1s"}
        daemon = Daemon(lab.gateway, folder / "daemon", config(backends=backends, default="way", timeouts=timeouts))
        try:
            made = Arena(lab, daemon, request.param)
            for version in (4, 6):  # the worker opens its raw sockets for ICMP once, and keeps them
                made.fails(version, (UNREACHABLE[version], 80))
            yield made
        finally:
            daemon.stop()
            lab.gateway.ip(f"route del unreachable {UNREACHABLE[4]}\nroute del unreachable {UNREACHABLE[6]}")


@pytest.fixture
def arena(shared: Arena) -> Iterator[Arena]:
    """The arena; after the test, all sockets that the worker opened for it are closed."""
    before = shared.sockets()
    yield shared
    eventually(lambda: shared.sockets() == before, f"the worker holds {before} sockets again ({shared.sockets()})")


class Pair:
    """A client's connection and the server's end of it."""

    def __init__(self, arena: Arena, version: int) -> None:
        lab = arena.lab
        listener = lab.server.socket(FAMILY[version], socket.SOCK_STREAM)
        listener.bind((lab.server_address(version), 0))
        listener.listen()
        self.client = lab.client.tcp(listener.getsockname()[:2], (lab.client_address(version), 0))
        self.name = self.client.getsockname()[:2]
        self.server, _ = listener.accept()
        self.server.settimeout(5)
        listener.close()

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def pair(arena: Arena) -> Iterator[Callable[[int], Pair]]:
    made: list[Pair] = []

    def make(version: int) -> Pair:
        made.append(Pair(arena, version))
        return made[-1]

    yield make
    for each in made:
        each.close()


def read_all(connection: socket.socket) -> bytes:
    found = bytearray()
    while data := connection.recv(1 << 20):
        found += data
    return bytes(found)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


# Streams


@versions
def test_bytes_arrive_whole_are_counted_and_are_spliced(
    arena: Arena, pair: Callable[[int], Pair], version: int
) -> None:
    ends = pair(version)
    data = os.urandom(BULK)

    def echo() -> None:
        while piece := ends.server.recv(1 << 20):
            ends.server.sendall(piece)
        ends.server.shutdown(socket.SHUT_WR)

    threads = [
        threading.Thread(target=echo),
        threading.Thread(target=lambda: (ends.client.sendall(data), ends.client.shutdown(socket.SHUT_WR))),
    ]
    for thread in threads:
        thread.start()
    got = read_all(ends.client)
    for thread in threads:
        thread.join()
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    end = arena.end_of(ends.name)
    assert (end["backend"], end["layer"], end["cause"], end["phase"]) == ("way", "splice", "done", "relay")
    assert (end["bytes_up"], end["bytes_down"]) == (BULK, BULK)


@versions
def test_a_server_that_speaks_first_is_heard_and_early_data_waits(
    arena: Arena, pair: Callable[[int], Pair], version: int
) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"220 welcome")
        connection.sendall(connection.recv(100))

    with TcpService(arena.lab.server, arena.lab.server_address(version), handler=greet) as service:
        with arena.lab.client.tcp(service.address) as client:
            client.sendall(b"early")
            assert read_all(client) == b"220 welcomeearly"
            name = client.getsockname()[:2]
    end = arena.end_of(name)
    assert (end["bytes_up"], end["bytes_down"]) == (5, 16)


@versions
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_close_reaches_the_other_end_and_the_rest_flows_on(
    arena: Arena, pair: Callable[[int], Pair], version: int, first: str
) -> None:
    ends = pair(version)
    closing, other = (ends.client, ends.server) if first == "client" else (ends.server, ends.client)
    closing.sendall(b"last words")
    closing.shutdown(socket.SHUT_WR)
    assert read_all(other) == b"last words"
    data = os.urandom(300_000)
    sender = threading.Thread(target=lambda: (other.sendall(data), other.shutdown(socket.SHUT_WR)))
    sender.start()
    assert read_all(closing) == data
    sender.join()
    assert arena.end_of(ends.name)["cause"] == "done"


@versions
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_reset_is_passed_on_as_a_reset(arena: Arena, pair: Callable[[int], Pair], version: int, first: str) -> None:
    ends = pair(version)
    closing, other = (ends.client, ends.server) if first == "client" else (ends.server, ends.client)
    closing.sendall(b"x")
    assert other.recv(1) == b"x"
    reset(closing)
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    assert arena.end_of(ends.name)["cause"] == f"{first}-reset"


@versions
def test_a_reader_that_stops_stops_the_sender(arena: Arena, pair: Callable[[int], Pair], version: int) -> None:
    """What is in between holds a bounded amount; then everything that was sent arrives."""
    ends = pair(version)
    ends.client.settimeout(0.4)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < MOST_HELD:
            sent += ends.client.send(b"x" * 65536)
    assert sent < MOST_HELD
    ends.client.shutdown(socket.SHUT_WR)
    assert len(read_all(ends.server)) == sent
    ends.server.shutdown(socket.SHUT_WR)
    end = arena.end_of(ends.name)
    assert (end["bytes_up"], end["cause"]) == (sent, "done")


@versions
def test_a_refusal_is_a_reset(arena: Arena, version: int) -> None:
    name = arena.fails(version, (arena.lab.server_address(version), 9))
    end = arena.end_of(name)
    expected = {
        "direct": ("refused", "connect"),
        "http_connect": ("unreachable", "handshake"),
    }  # HTTP has no word for it
    assert (end["cause"], end["phase"]) == expected.get(arena.way, ("refused", "handshake"))


@versions
def test_what_is_unreachable_is_told_by_icmp_and_a_reset(arena: Arena, version: int) -> None:
    before = arena.daemon.recent_counters()["icmp_errors_sent"]
    name = arena.fails(version, (UNREACHABLE[version], 80))
    end = arena.end_of(name)
    assert (end["cause"], end["phase"]) == ("unreachable", "connect" if arena.way == "direct" else "handshake")
    eventually(lambda: arena.daemon.recent_counters()["icmp_errors_sent"] > before, "an ICMP error is sent")


@versions
def test_silence_is_a_reset_after_the_time_for_it(arena: Arena, version: int) -> None:
    name = arena.fails(version, (arena.lab.server_address(version), NOBODY_ANSWERS))
    end = arena.end_of(name)
    assert (end["cause"], end["phase"]) == ("timed-out", "connect" if arena.way == "direct" else "handshake")
    assert CONNECT_S <= end["duration_s"] < 4


@versions
def test_a_client_that_leaves_cancels_the_way(arena: Arena, version: int) -> None:
    peer = arena.lab.server_address(version), NOBODY_ANSWERS
    client = arena.lab.client.tcp(peer, (arena.lab.client_address(version), 0))
    name = client.getsockname()[:2]
    reset(client)
    assert arena.end_of(name)["cause"] == "client-reset"


# Datagrams


@versions
def test_datagrams_of_all_sizes_arrive_whole(arena: Arena, version: int) -> None:
    if arena.way not in CARRY_UDP:
        refused_as_not_carried(arena, version)
        return
    header = {4: 10, 6: 22}[version] if arena.way == "socks5" else 0
    largest = 65507 - header if header else {4: 65507, 6: 65487}[version]  # the proxy is spoken to over IPv4
    with UdpService(arena.lab.server, arena.lab.server_address(version)) as service:
        with arena.lab.client.udp(service.address) as client:
            for size in (0, 1, 1472, 9000, 60000, largest, 0):
                data = os.urandom(size)
                client.send(data)
                assert client.recv(1 << 16) == data
            if header:
                client.send(bytes(largest + 1))  # leaves no room for the header: dropped, and nothing else happens
                client.send(b"after")
                assert client.recv(100) == b"after"
            name = client.getsockname()[:2]
    end = arena.end_of(name)
    total = 1 + 1472 + 9000 + 60000 + largest + (5 if header else 0)
    assert (end["bytes_up"], end["bytes_down"], end["cause"]) == (total, total, "idle")


def refused_as_not_carried(arena: Arena, version: int) -> None:
    """The client hears at once that its datagrams go nowhere: a browser takes TCP instead of QUIC."""
    with arena.lab.client.udp((arena.lab.server_address(version), 443)) as client:
        receive_errors = {4: (socket.SOL_IP, 11, 1), 6: (41, 25, 1)}[version]
        client.setsockopt(*receive_errors)
        client.send(b"hello")
        with pytest.raises(OSError, match=r"No route|Permission") as caught:
            client.recv(10)
    assert caught.value.errno in (errno.EHOSTUNREACH, errno.EACCES)
    eventually(lambda: arena.daemon.recent_counters()["udp_not_carried"], "it is counted")


@versions
def test_flows_of_a_client_endpoint_are_seen_from_one_address(arena: Arena, version: int) -> None:
    if arena.way not in CARRY_UDP:
        return
    hosts = [arena.lab.server_address(version, host=host) for host in (2, 3, 4)]
    client = arena.lab.client.socket(FAMILY[version], socket.SOCK_DGRAM)
    client.bind((arena.lab.client_address(version), 0))
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(UdpService(arena.lab.server, host)) for host in hosts]
        for service in services:
            client.sendto(service.address[0].encode(), service.address)
        answers = {client.recvfrom(100) for _ in services}
        seen = {port for service in services for _, port in service.peers}
    client.close()
    assert {(data.decode(), peer[0]) for data, peer in answers} == {(host, host) for host in hosts}
    assert len(seen) == 1
