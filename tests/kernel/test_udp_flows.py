"""UDP through the gateway, as both ends see it."""

from __future__ import annotations

import errno
import os
import socket
import time

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Gateway, UdpService, eventually, hears_refusal

IP_RECVERR = {4: (socket.SOL_IP, 11), 6: (41, 25)}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LARGEST = {4: 65507, 6: 65487}

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def bound(lab: Gateway, where: str, version: int, port: int = 0, host: int = 2) -> socket.socket:
    """A UDP socket of the client's or the server's, bound to its address."""
    namespace = getattr(lab, where)
    address = {"client": lab.client_address, "server": lab.server_address}[where](version, host)
    made: socket.socket = namespace.socket(FAMILY[version], socket.SOCK_DGRAM)
    made.bind((address, port))
    return made


@versions
def test_both_ends_see_the_original_four_tuple(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon()
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    client.sendto(b"ask", server.getsockname())
    data, peer = server.recvfrom(100)
    assert (data, peer) == (b"ask", client.getsockname())
    server.sendto(b"answer", peer)
    assert client.recvfrom(100) == (b"answer", server.getsockname())
    (end,) = running.wait_flow_ends(1)
    assert end["client"] == end["source"]
    assert (end["bytes_up"], end["bytes_down"], end["cause"]) == (3, 6, "idle")


@versions
@pytest.mark.parametrize("nat", ["full-cone", "symmetric"])
@pytest.mark.parametrize("source", ["address", "gateway"])
def test_the_server_sees_the_source_that_the_backend_names(
    lab: Gateway, daemon: DaemonFactory, version: int, source: str, nat: str
) -> None:
    running = daemon(backends={"direct": {"type": "direct", "source": source, "nat": nat}})
    client, server = bound(lab, "client", version, 4321), bound(lab, "server", version)
    client.sendto(b"ask", server.getsockname())
    _, peer = server.recvfrom(100)
    expected = {"address": lab.client_address(version), "gateway": lab.gateway_address(version, "server")}[source]
    assert peer[0] == expected
    assert peer[1] != 4321
    server.sendto(b"answer", peer)
    assert client.recvfrom(100) == (b"answer", server.getsockname())
    (end,) = running.wait_flow_ends(1)
    assert end["source"] == (f"[{peer[0]}]:{peer[1]}" if version == 6 else f"{peer[0]}:{peer[1]}")


@versions
@pytest.mark.parametrize("nat", ["full-cone", "symmetric"])
def test_datagrams_of_all_sizes_arrive_whole(lab: Gateway, daemon: DaemonFactory, version: int, nat: str) -> None:
    """0 bytes is a datagram, not an end; the large ones are fragmented on both sides."""
    daemon(backends={"direct": {"type": "direct", "nat": nat}})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    for size in (0, 1, 1472, 1473, 9000, 60000, LARGEST[version], 0):
        data = os.urandom(size)
        client.sendto(data, server.getsockname())
        got, peer = server.recvfrom(1 << 16)
        assert got == data
        server.sendto(data[::-1], peer)
        assert client.recvfrom(1 << 16) == (data[::-1], server.getsockname())


@versions
@pytest.mark.parametrize(("nat", "passes"), [("full-cone", True), ("symmetric", False)])
@pytest.mark.parametrize("source", ["four-tuple", "gateway"])
def test_a_stranger_may_answer_only_through_a_full_cone(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str, passes: bool, source: str
) -> None:
    daemon(backends={"direct": {"type": "direct", "nat": nat, "source": source}})
    client = bound(lab, "client", version)
    server, stranger = bound(lab, "server", version), bound(lab, "server", version, host=3)
    client.sendto(b"ask", server.getsockname())
    _, peer = server.recvfrom(100)
    stranger.sendto(b"hello", peer)
    client.settimeout(0.5)
    if passes:
        assert client.recvfrom(100) == (b"hello", stranger.getsockname())
        client.sendto(b"who are you", stranger.getsockname())
        assert stranger.recvfrom(100) == (b"who are you", peer)
    else:
        with pytest.raises(TimeoutError):
            client.recvfrom(100)


@versions
def test_full_cone_shows_every_server_the_same_mapping(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    daemon(backends={"direct": {"type": "direct", "source": "gateway"}})
    client = bound(lab, "client", version)
    servers = [bound(lab, "server", version, host=host) for host in (2, 3, 4)]
    for server in servers:
        client.sendto(b"x", server.getsockname())
    assert len({server.recvfrom(10)[1] for server in servers}) == 1


@versions
def test_symmetric_shows_every_server_another_mapping(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    daemon(backends={"direct": {"type": "direct", "source": "gateway", "nat": "symmetric"}})
    client = bound(lab, "client", version)
    servers = [bound(lab, "server", version, host=host) for host in (2, 3, 4)]
    for server in servers:
        client.sendto(b"x", server.getsockname())
    assert len({server.recvfrom(10)[1] for server in servers}) == 3


@versions
@pytest.mark.parametrize("nat", ["full-cone", "symmetric"])
def test_closed_server_port_is_told_to_the_client(lab: Gateway, daemon: DaemonFactory, version: int, nat: str) -> None:
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}})
    with lab.client.udp((lab.server_address(version), 9)) as client:
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)
        client.send(b"again")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)
    eventually(lambda: running.recent_counters()["flows"] == 0, "the flow table is clean")


@versions
def test_unreachable_network_is_told_to_the_client(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    daemon()
    with lab.client.udp(({4: "10.77.0.1", 6: "fd77::1"}[version], 53)) as client:
        client.setsockopt(*IP_RECVERR[version], 1)
        client.send(b"x")
        with pytest.raises(OSError, match="unreachable") as caught:
            client.recv(10)
    assert caught.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)


@versions
def test_client_that_left_is_told_to_the_server(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    daemon()
    server = bound(lab, "server", version)
    client = bound(lab, "client", version, 6101)
    client.sendto(b"x", server.getsockname())
    server.connect(server.recvfrom(10)[1])
    client.close()
    assert eventually(lambda: hears_refusal(server), "the server hears that the port is closed")


@versions
def test_many_clients_of_one_server_get_their_own_answers(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    """An unconnected reply socket would steal the other clients' datagrams."""
    running = daemon(workers=2)
    server = bound(lab, "server", version)
    clients = [bound(lab, "client", version, host=2 + number % 8) for number in range(80)]
    for round_ in range(3):
        for number, client in enumerate(clients):
            client.sendto(f"{round_}/{number}".encode(), server.getsockname())
        for _ in clients:
            data, peer = server.recvfrom(100)
            server.sendto(data, peer)
        for number, client in enumerate(clients):
            assert client.recvfrom(100) == (f"{round_}/{number}".encode(), server.getsockname())
    assert running.counters()["udp_flows"] == 80


@versions
def test_no_datagram_of_a_burst_goes_out_as_another_clients(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    """A datagram may find the socket of another flow while that is between bind and connect."""
    daemon(workers=2)
    server = bound(lab, "server", version)
    mixed_up = []
    for _ in range(10):
        clients = [bound(lab, "client", version, host=2 + number % 8) for number in range(200)]
        said = [str(client.getsockname()[:2]).encode() for client in clients]
        for client, data in zip(clients, said, strict=True):
            client.sendto(data, server.getsockname())
        for _ in clients:
            data, peer = server.recvfrom(100)
            if data != str(peer[:2]).encode():
                mixed_up.append((data, peer))
        for client in clients:
            client.close()
    assert not mixed_up


@versions
def test_one_client_port_talks_to_many_servers(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    daemon()
    client = bound(lab, "client", version)
    servers = [bound(lab, "server", version, host=host) for host in range(2, 10)]
    for server in servers:
        client.sendto(b"x", server.getsockname())
    for server in servers:
        assert server.recvfrom(10)[1] == client.getsockname()
        server.sendto(b"y", client.getsockname())
    assert {client.recvfrom(10)[1] for _ in servers} == {server.getsockname() for server in servers}


@versions
@pytest.mark.parametrize("reuse", [False, True], ids=["exclusive", "reuseaddr"])
def test_a_wildcard_service_on_the_same_port_costs_nothing(
    lab: Gateway, daemon: DaemonFactory, version: int, reuse: bool
) -> None:
    running = daemon()
    service = lab.gateway.socket(FAMILY[version], socket.SOCK_DGRAM)
    if reuse:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    service.bind(({4: "0.0.0.0", 6: "::"}[version], 53))
    with (
        UdpService(lab.server, lab.server_address(version), 53) as server,
        lab.client.udp(server.address) as client,
    ):
        for size in (3, 0, 1400, 20_000):
            data = os.urandom(size)
            client.send(data)
            assert client.recv(1 << 16) == data
        assert server.peers[0] == client.getsockname()[:2]
    counters = running.counters()
    assert counters["udp_raw_replies"] == (0 if reuse else 4)
    assert counters["udp_dropped"] == 0
    with lab.client.udp((lab.gateway_address(version), 53)) as client:
        client.send(b"to the box itself")
        assert service.recvfrom(100)[0] == b"to the box itself"
    service.close()


@versions
def test_idle_flows_expire_and_busy_ones_stay(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon(timeouts={"udp_idle": "1s"})
    server = bound(lab, "server", version)
    busy, idle = bound(lab, "client", version), bound(lab, "client", version)
    idle.sendto(b"x", server.getsockname())
    for _ in range(10):
        busy.sendto(b"x", server.getsockname())
        time.sleep(0.3)
    assert running.recent_counters()["flows"] == 1
    assert running.recent_counters()["udp_flows"] == 2


def test_flows_over_the_limits_are_not_taken_in(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(limits={"max_flows": 5, "max_flows_per_client": 3}, timeouts={"udp_idle": "10s"})
    with UdpService(lab.server, lab.server_address(4)) as service:

        def answered(host: int) -> bool:
            client = bound(lab, "client", 4, host=host)
            client.settimeout(0.3)
            client.sendto(b"x", service.address)
            try:
                return client.recv(10) == b"x"
            except TimeoutError:
                return False

        assert [answered(2) for _ in range(4)] == [True, True, True, False]
        assert [answered(3) for _ in range(3)] == [True, True, False]
    assert running.counters()["refused_limit"] == 2


FRAGMENTED = bytes(range(256)) * 12


def send_fragments(version: int, name: str) -> None:
    from scapy.all import IP, UDP, IPv6, IPv6ExtHdrFragment, Raw, fragment, fragment6

    content = UDP(sport=4000, dport=5000) / Raw(FRAGMENTED)
    if version == 4:
        pieces = fragment(IP(src="10.1.0.2", dst="10.2.0.2", id=77) / content, 1024)
    else:
        pieces = fragment6(IPv6(src="fd01::2", dst="fd02::2") / IPv6ExtHdrFragment(id=77) / content, 1280)
    if name == "reversed":
        pieces = pieces[::-1]
    elif name == "missing the middle":
        del pieces[1]
    elif name == "overlapping":
        again = pieces[1].copy()
        if version == 4:
            again.frag -= 8
        else:
            again[IPv6ExtHdrFragment].offset -= 8
        pieces.insert(1, again)
    send_raw(version, [bytes(piece) for piece in pieces])


def send_odd_datagrams() -> None:
    from scapy.all import IP, UDP, Raw

    base = IP(src="10.1.0.2", dst="10.2.0.2")
    odd = [
        base / UDP(sport=4000, dport=5000, chksum=0x1234) / Raw(b"wrong checksum"),
        base / UDP(sport=4000, dport=5000, len=4) / Raw(b"shorter than its header"),
        base / UDP(sport=4000, dport=5000, len=9000) / Raw(b"longer than it is"),
        base / UDP(sport=0, dport=5000) / Raw(b"from port 0"),
        base / UDP(sport=4000, dport=0) / Raw(b"to port 0"),
        IP(src="127.0.0.1", dst="10.2.0.2") / UDP(sport=4000, dport=5000) / Raw(b"martian"),
        IP(src="255.255.255.255", dst="10.2.0.2") / UDP(sport=4000, dport=5000) / Raw(b"broadcast"),
        IP(src="10.2.0.2", dst="10.2.0.2") / UDP(sport=5000, dport=5000) / Raw(b"land"),
    ]
    send_raw(4, [bytes(packet) for packet in odd])


def send_raw(version: int, packets: list[bytes]) -> None:
    """Send packets as they are, IP header included (raw(7), IPV6_HDRINCL)."""
    with socket.socket(FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        if version == 6:
            raw.setsockopt(41, 36, 1)
        for packet in packets:
            raw.sendto(packet, ({4: "10.2.0.2", 6: "fd02::2"}[version], 0))


@versions
@pytest.mark.parametrize(
    ("name", "arrives"),
    [("in order", True), ("reversed", True), ("overlapping", False), ("missing the middle", False)],
)
def test_fragments_reach_the_server_whole_or_not_at_all(
    lab: Gateway, daemon: DaemonFactory, version: int, name: str, arrives: bool
) -> None:
    running = daemon()
    server = bound(lab, "server", version, 5000)
    lab.client.call(send_fragments, version, name)
    server.settimeout(3 if arrives else 0.7)
    if arrives:
        data, peer = server.recvfrom(1 << 16)
        assert data == FRAGMENTED
        assert peer[:2] == (lab.client_address(version), 4000)
    else:
        with pytest.raises(TimeoutError):
            server.recvfrom(1 << 16)
    assert running.counters()["flow_errors"] == 0


def test_odd_datagrams_do_no_harm(lab: Gateway, daemon: DaemonFactory) -> None:
    """Wrong checksums, wrong lengths, port 0, an unroutable source: the kernel or the relay drops them."""
    running = daemon()
    lab.client.call(send_odd_datagrams)
    with UdpService(lab.server, lab.server_address(4), 5000) as server, lab.client.udp(server.address) as client:
        client.send(b"good")
        assert client.recv(10) == b"good"
    counters = running.counters()
    assert counters["flow_errors"] == 0
    assert counters["refused_loop"] == 0


def test_strangers_cannot_use_up_a_clients_flows(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(limits={"max_flows": 200, "max_flows_per_client": 20}, timeouts={"udp_idle": "10s"})
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    client.sendto(b"ask", server.getsockname())
    _, peer = server.recvfrom(100)
    for _ in range(150):
        with bound(lab, "server", 4, host=3) as stranger:
            stranger.sendto(b"hello", peer)
    with UdpService(lab.server, lab.server_address(4, 4)) as service:
        for _ in range(15):
            other = bound(lab, "client", 4)
            other.sendto(b"x", service.address)
            assert other.recv(10) == b"x"
    counters = running.counters()
    assert counters["refused_limit"] == 0
    assert counters["udp_flows"] == 1 + 64 + 15
