"""TCP through the gateway, as both ends see it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Gateway, TcpService, eventually

RESET = struct.pack("ii", 1, 0)
IP_RECVERR = {4: (socket.SOL_IP, 11), 6: (41, 25)}
SIZE = 3_000_000

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(1 << 20):
        found += data
    return found


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def read_until_reset(connection: socket.socket) -> bytes:
    """What arrives before the reset; a clean end is a failure."""
    got = b""
    while True:
        try:
            piece = connection.recv(1 << 16)
        except ConnectionResetError:
            return got
        assert piece, f"a clean end after {len(got)} bytes"
        got += piece


def connect_and_read(client: socket.socket, peer: tuple[str, int]) -> None:
    client.connect(peer)
    client.recv(1)


class Pair:
    """A client's connection and the server's end of it."""

    def __init__(self, lab: Gateway, version: int, *, source_port: int = 0) -> None:
        self.listener = lab.server.socket({4: socket.AF_INET, 6: socket.AF_INET6}[version], socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((lab.server_address(version), 0))
        self.listener.listen()
        source = (lab.client_address(version), source_port)
        self.client = lab.client.tcp(self.listener.getsockname()[:2], source)
        self.server, self.peer = self.listener.accept()
        self.server.settimeout(5)

    def close(self) -> None:
        for each in (self.client, self.server, self.listener):
            each.close()


@versions
def test_both_ends_see_the_original_four_tuple(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon()
    with TcpService(lab.server, lab.server_address(version)) as service:
        with lab.client.tcp(service.address, (lab.client_address(version), 0)) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
            assert service.peers == [client.getsockname()[:2]]
            assert client.getpeername()[:2] == service.address
            mine = client.getsockname()
    (end,) = running.wait_flow_ends(1)
    shown = f"[{mine[0]}]:{mine[1]}" if version == 6 else f"{mine[0]}:{mine[1]}"
    assert (end["client"], end["source"]) == (shown, shown)
    assert (end["rule"], end["backend"], end["layer"], end["cause"]) == ("default", "direct", "copy", "done")
    assert (end["bytes_up"], end["bytes_down"]) == (5, 5)


@versions
@pytest.mark.parametrize("source", ["address", "gateway"])
def test_the_server_sees_the_source_that_the_backend_names(
    lab: Gateway, daemon: DaemonFactory, version: int, source: str
) -> None:
    daemon(backends={"direct": {"type": "direct", "source": source}})
    with TcpService(lab.server, lab.server_address(version)) as service:
        with lab.client.tcp(service.address, (lab.client_address(version), 4321)) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        ((address, port),) = service.peers
    expected = {"address": lab.client_address(version), "gateway": lab.gateway_address(version, "server")}[source]
    assert address == expected
    assert port != 4321


@versions
@pytest.mark.parametrize("first", ["client", "server"])
def test_half_close_reaches_the_other_end_and_the_rest_flows_on(
    lab: Gateway, daemon: DaemonFactory, version: int, first: str
) -> None:
    running = daemon()
    pair = Pair(lab, version)
    closing, other = (pair.client, pair.server) if first == "client" else (pair.server, pair.client)
    closing.sendall(b"last words")
    closing.shutdown(socket.SHUT_WR)
    assert read_all(other) == b"last words"
    data = os.urandom(SIZE)
    sender = threading.Thread(target=lambda: (other.sendall(data), other.shutdown(socket.SHUT_WR)))
    sender.start()
    assert read_all(closing) == data
    sender.join()
    pair.close()
    assert running.wait_flow_ends(1)[0]["cause"] == "done"


@versions
@pytest.mark.parametrize("first", ["client", "server"])
def test_reset_is_passed_on_as_reset_after_the_data_before_it(
    lab: Gateway, daemon: DaemonFactory, version: int, first: str
) -> None:
    running = daemon()
    pair = Pair(lab, version)
    closing, other = (pair.client, pair.server) if first == "client" else (pair.server, pair.client)
    data = os.urandom(300_000)
    closing.sendall(data)
    eventually(lambda: unsent(closing) == 0, "the data is acknowledged")
    reset(closing)
    assert read_until_reset(other) == data
    pair.close()
    assert running.wait_flow_ends(1)[0]["cause"] == f"{first}-reset"


def unsent(connection: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(connection.fileno(), 0x5411, bytes(4)), "little")


@versions
def test_refused_connect_resets_the_client_at_once(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon()
    client = lab.client.socket({4: socket.AF_INET, 6: socket.AF_INET6}[version], socket.SOCK_STREAM)
    with pytest.raises(ConnectionResetError):
        connect_and_read(client, (lab.server_address(version), 9))
    (end,) = running.wait_flow_ends(1)
    assert (end["cause"], end["phase"]) == ("refused", "connect")


@versions
def test_unreachable_destination_gives_the_client_icmp_and_reset(
    lab: Gateway, daemon: DaemonFactory, version: int
) -> None:
    running = daemon()
    nowhere = {4: "10.77.0.1", 6: "fd77::1"}[version]
    client = lab.client.socket({4: socket.AF_INET, 6: socket.AF_INET6}[version], socket.SOCK_STREAM)
    client.setsockopt(*IP_RECVERR[version], 1)
    with pytest.raises(OSError, match=r"unreachable|No route|reset") as caught:
        connect_and_read(client, (nowhere, 80))
    assert caught.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNRESET)
    (end,) = running.wait_flow_ends(1)
    assert (end["cause"], end["phase"]) == ("unreachable", "connect")
    assert running.counters()["icmp_errors_sent"] == 1


@versions
def test_silent_destination_times_out_as_configured(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon(timeouts={"connect": "500ms"})
    lab.server.run(["nft", "add table inet mute"])
    lab.server.run(["nft", "add chain inet mute input { type filter hook input priority 0; }"])
    lab.server.run(["nft", "add rule inet mute input tcp dport 81 drop"])
    with lab.client.tcp((lab.server_address(version), 81)) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    (end,) = running.wait_flow_ends(1)
    assert (end["cause"], end["phase"]) == ("timed-out", "connect")


@versions
def test_client_that_gives_up_while_connecting_frees_the_flow(
    lab: Gateway, daemon: DaemonFactory, version: int
) -> None:
    running = daemon()
    lab.server.run(["nft", "add table inet mute"])
    lab.server.run(["nft", "add chain inet mute input { type filter hook input priority 0; }"])
    lab.server.run(["nft", "add rule inet mute input tcp dport 81 drop"])
    reset(lab.client.tcp((lab.server_address(version), 81)))
    (end,) = running.wait_flow_ends(1)
    assert (end["cause"], end["phase"]) == ("client-reset", "connect")


@versions
def test_slow_reader_holds_a_bounded_amount_and_loses_nothing(
    lab: Gateway, daemon: DaemonFactory, version: int
) -> None:
    running = daemon()
    pair = Pair(lab, version)
    before = resident_bytes(running.worker_pids()[0])
    pair.server.setblocking(False)
    digest, sent, quiet_since = hashlib.sha256(), 0, time.monotonic()
    piece = os.urandom(1 << 16)
    while time.monotonic() - quiet_since < 0.5:
        try:
            count = pair.server.send(piece)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        digest.update(piece[:count])
        sent, quiet_since = sent + count, time.monotonic()
    assert sent > 1 << 20
    assert resident_bytes(running.worker_pids()[0]) - before < 4 << 20
    pair.server.shutdown(socket.SHUT_WR)
    assert hashlib.sha256(read_all(pair.client)).digest() == digest.digest()
    pair.close()


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@versions
@pytest.mark.parametrize("towards", ["server", "client"])
def test_the_tail_of_a_long_transfer_waits_for_nothing(
    lab: Gateway, daemon: DaemonFactory, version: int, towards: str
) -> None:
    """Whoever relays much at a time (SO_RCVLOWAT) must still hand on what comes after it, however little."""
    daemon(timeouts={"tcp_idle": "2m"})
    pair = Pair(lab, version)
    sender, receiver = (pair.client, pair.server) if towards == "server" else (pair.server, pair.client)
    for much in (20_000_000, 64, 7_000_000, 1):
        writer = threading.Thread(target=sender.sendall, args=(bytes(much),))
        writer.start()
        received = 0
        while received < much:
            received += len(receiver.recv(1 << 20))  # times out after 5 s
        writer.join()
        receiver.sendall(b"!")
        assert sender.recv(10) == b"!"
    pair.close()


@versions
def test_idle_flow_is_reset_and_a_busy_one_is_not(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon(timeouts={"tcp_idle": "1s"})
    idle, busy = Pair(lab, version), Pair(lab, version)
    for _ in range(8):
        busy.client.sendall(b"x")
        assert busy.server.recv(1) == b"x"
        time.sleep(0.25)
    for end in (idle.client, idle.server):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    assert [end["cause"] for end in running.flow_ends()] == ["idle"]
    idle.close()
    busy.close()


@versions
@pytest.mark.parametrize("bulk", [b"", bytes(400_000)], ids=["alone", "within-bulk"])
def test_urgent_data_passes_as_urgent_and_stalls_nothing(
    lab: Gateway, daemon: DaemonFactory, version: int, bulk: bytes
) -> None:
    daemon()
    pair = Pair(lab, version)
    rounds = 20

    def send() -> None:
        for _ in range(rounds):
            pair.client.sendall(b"before" + bulk)
            pair.client.send(b"!", socket.MSG_OOB)
            pair.client.sendall(bulk + b"after")
        pair.client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(0.3 if not bulk else 0)
    got = read_all(pair.server)
    sender.join()
    in_band = (b"before" + bulk + bulk + b"after") * rounds
    assert got.replace(b"!", b"") == in_band  # an urgent byte that a later one overtook is read in band, as ever
    pair.close()


def test_single_urgent_byte_is_out_of_band_at_the_server(lab: Gateway, daemon: DaemonFactory) -> None:
    daemon()
    pair = Pair(lab, 4)
    pair.client.sendall(b"before")
    pair.client.send(b"!", socket.MSG_OOB)

    def urgent() -> bytes:
        try:
            return pair.server.recv(1, socket.MSG_OOB)
        except OSError:
            return b""

    assert eventually(urgent, "the urgent byte arrives") == b"!"
    assert pair.server.recv(16) == b"before"
    pair.close()


@versions
def test_keepalive_probes_are_answered_and_change_nothing(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    daemon()
    pair = Pair(lab, version)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
    time.sleep(3.2)
    pair.client.sendall(b"still here")
    assert pair.server.recv(16) == b"still here"
    pair.close()


@versions
def test_one_client_port_reaches_two_servers_at_once(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon()
    first, second = Pair(lab, version, source_port=5555), Pair(lab, version, source_port=5555)
    assert first.peer[1] == second.peer[1] == 5555
    first.close()
    second.close()
    assert running.counters()["source_port_clashes"] == 0


@versions
def test_taken_source_port_falls_back_to_another_and_is_counted(
    lab: Gateway, daemon: DaemonFactory, version: int
) -> None:
    running = daemon()
    address = lab.client_address(version)
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with lab.gateway.socket(family, socket.SOCK_STREAM) as holder:
        transparent = (socket.SOL_IP, socket.IP_TRANSPARENT) if version == 4 else (41, 75)
        holder.setsockopt(*transparent, 1)
        holder.bind((address, 6666))
        with TcpService(lab.server, lab.server_address(version)) as service:
            with lab.client.tcp(service.address, (address, 6666)) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            ((seen_address, seen_port),) = service.peers
    assert seen_address == address
    assert seen_port != 6666
    assert running.counters()["source_port_clashes"] == 1
    assert any("source port" in message for message in running.messages())


@versions
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_port_in_time_wait_can_be_used_again(lab: Gateway, daemon: DaemonFactory, version: int, first: str) -> None:
    """Whoever closes first leaves a TIME_WAIT socket in the gateway; the next SYN must get past it."""
    daemon()
    lab.client.sysctl("net.ipv4.tcp_tw_reuse", 1)
    with TcpService(lab.server, lab.server_address(version)) as service:
        for _ in range(3):
            connection = lab.client.tcp(service.address, (lab.client_address(version), 7777))
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            if first == "client":
                connection.close()
                time.sleep(1.1)  # tcp_tw_reuse wants a newer timestamp
            else:
                reset(connection)


@versions
def test_many_connections_at_once_keep_their_bytes_apart(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon(workers=2)
    with TcpService(lab.server, lab.server_address(version)) as service:
        connections = [lab.client.tcp(service.address) for _ in range(200)]
        for number, connection in enumerate(connections):
            connection.sendall(str(number).encode() * 10)
        for number, connection in enumerate(connections):
            expected = str(number).encode() * 10
            got = b""
            while len(got) < len(expected):
                got += connection.recv(len(expected) - len(got))
            assert got == expected
        assert running.counters()["flows"] == 200
        for connection in connections:
            connection.close()
    ends = running.wait_flow_ends(200)
    assert {end["cause"] for end in ends} == {"done"}
    assert running.counters()["flows"] == 0


def test_flows_over_the_limits_are_reset_and_counted(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(limits={"max_flows": 5, "max_flows_per_client": 3})
    with TcpService(lab.server, lab.server_address(4)) as service:

        def attempt(host: int) -> Any:
            try:
                connection = lab.client.tcp(service.address, (lab.client_address(4, host), 0))
                connection.sendall(b"x")
                return connection if connection.recv(1) == b"x" else None
            except (ConnectionResetError, BrokenPipeError):
                return None

        first = [attempt(2) for _ in range(4)]
        assert [bool(each) for each in first] == [True, True, True, False]
        second = [attempt(3) for _ in range(3)]
        assert [bool(each) for each in second] == [True, True, False]
        first[0].close()
        eventually(lambda: attempt(2) is not None, "a place is free again")
    assert running.counters()["refused_limit"] >= 2


def flood_with_syns() -> None:
    from scapy.all import IP, TCP

    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for number in range(2000):
            source = f"10.1.{1 + number // 250}.{number % 250 + 1}"
            packet = IP(src=source, dst="10.2.0.2") / TCP(sport=1024 + number, dport=80, seq=number)
            raw.sendto(bytes(packet), ("10.2.0.2", 0))


def test_syn_flood_leaves_the_gateway_serving(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon()
    lab.client.call(flood_with_syns)
    with TcpService(lab.server, lab.server_address(4)) as service, lab.client.tcp(service.address) as client:
        client.sendall(b"alive")
        assert client.recv(5) == b"alive"
    assert running.counters()["flow_errors"] == 0


@versions
@pytest.mark.parametrize("ruleset", ["nftables", "iptables"])
@pytest.mark.parametrize("on_failure", ["closed", "open"])
@pytest.mark.parametrize("last", ["client", "server"])
def test_a_lost_last_acknowledgement_is_sent_again(
    lab: Gateway, daemon: DaemonFactory, version: int, ruleset: str, on_failure: str, last: str
) -> None:
    """Packets of half-open and TIME_WAIT sockets must reach them, too: the kernel knows little of those."""
    daemon(interception={"ruleset": ruleset, "on_failure": on_failure})
    pair = Pair(lab, version)
    first, second, namespace = (
        (pair.server, pair.client, lab.client) if last == "client" else (pair.client, pair.server, lab.server)
    )
    first.close()
    assert second.recv(1) == b""
    namespace.nft("table inet deaf { chain input { type filter hook input priority 0; tcp flags ack drop; }; }")
    second.close()
    time.sleep(0.3)
    assert namespace.run(["ss", "-tanH", "state", "last-ack"]).stdout, "its last acknowledgement was lost"
    namespace.nft("delete table inet deaf")
    eventually(lambda: not namespace.run(["ss", "-tanH", "state", "last-ack"]).stdout, "the FIN sent again is answered")
    pair.close()
