"""What stays in the kernel: the box's own addresses, broadcast, multicast, excluded prefixes."""

import json
import re
import socket
import struct
from pathlib import Path

import pytest

from tests.lab import Daemon, Gateway, TcpService, UdpService, ask, cli, config, service, write_config

NETWORKS = pytest.mark.parametrize("network", ["tcp", "udp"])
FAMILIES = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
IPV6_HDRINCL = 36
SO_BROADCAST_TO = ("10.1.0.255", "255.255.255.255")


def flows_taken(daemon: Daemon) -> int:
    counters = daemon.counters()
    return counters["tcp_flows"] + counters["udp_flows"]


@NETWORKS
@FAMILIES
def test_services_of_the_box_are_reached_directly(
    lab: Gateway, daemon, ruleset: str, version: int, network: str
) -> None:
    running = daemon(interception={"ruleset": ruleset})
    for side in ("client", "server"):
        with service(lab.gateway, network, lab.gateway_address(version, side)) as own:
            assert ask(lab.client, network, own.address) in own.peers
    assert flows_taken(running) == 0


def test_broadcast_and_multicast_stay_on_the_link(lab: Gateway, daemon, ruleset: str) -> None:
    running = daemon(interception={"ruleset": ruleset})
    got = []
    for group in (*SO_BROADCAST_TO, "239.1.2.3", "ff15::7440"):
        family = socket.AF_INET6 if ":" in group else socket.AF_INET
        hearing, sending = (each.socket(family, socket.SOCK_DGRAM) for each in (lab.gateway, lab.client))
        with hearing, sending:
            hearing.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 999))
            with lab.gateway.entered():
                interface = socket.if_nametoindex("lan0")
            with lab.client.entered():
                outgoing = socket.if_nametoindex("eth0")
            if family == socket.AF_INET6:
                membership = socket.inet_pton(family, group) + struct.pack("@I", interface)
                hearing.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
                sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, outgoing)
            elif group.startswith("239"):
                membership = struct.pack("@4s4si", socket.inet_aton(group), bytes(4), interface)
                hearing.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sending.sendto(b"anyone?", (group, 999))
            got.append((group, hearing.recv(16)))
    assert len(got) == 4
    assert flows_taken(running) == 0


@NETWORKS
@FAMILIES
def test_excluded_prefixes_are_routed_and_others_relayed(
    lab: Gateway, daemon, ruleset: str, version: int, network: str
) -> None:
    lab.forwarding(True)
    excluded = {"destinations": ["10.2.0.8/31", "fd02::9"], "sources": ["10.1.0.9", "fd01::8/127"]}
    running = daemon(interception={"ruleset": ruleset, "exclude": excluded})
    for server, client in ((9, 2), (2, 9)):
        with service(lab.server, network, lab.server_address(version, server)) as far:
            assert ask(lab.client, network, far.address, (lab.client_address(version, client), 0)) in far.peers
    assert flows_taken(running) == 0
    with service(lab.server, network, lab.server_address(version, 7)) as far:
        ask(lab.client, network, far.address, (lab.client_address(version, 7), 0))
    (end,) = running.wait_flow_ends(1)
    assert end["orig_dst"].rpartition(":")[0].strip("[]") == far.address[0]


@FAMILIES
def test_ports_that_are_not_named_are_routed(lab: Gateway, daemon, ruleset: str, version: int) -> None:
    lab.forwarding(True)
    ports = {"tcp_ports": [80, "8000-8009"], "udp_ports": []}
    running = daemon(interception={"ruleset": ruleset, **ports})
    for network, port, relayed in (("tcp", 79, 0), ("udp", 80, 0), ("tcp", 8010, 0), ("tcp", 80, 1), ("tcp", 8009, 2)):
        with service(lab.server, network, lab.server_address(version), port) as far:
            ask(lab.client, network, far.address)
        if relayed:
            assert len(running.wait_flow_ends(relayed)) == relayed
    assert flows_taken(running) == 2


@FAMILIES
@NETWORKS
@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_flows_from_the_other_side_are_routed(
    lab: Gateway, daemon, ruleset: str, network: str, on_failure: str, version: int
) -> None:
    """A port forwarding, or a server among the clients: the answers come in where new flows do."""
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset, "on_failure": on_failure})
    with service(lab.client, network, lab.client_address(version)) as near:
        asked = ask(lab.server, network, near.address, timeout_s=0.5)
        assert near.peers == [asked]
    assert flows_taken(running) == 0


@FAMILIES
@pytest.mark.parametrize("why", ["excluded address", "other port", "other port of the same server"])
def test_what_is_routed_for_a_port_that_is_relayed_too_is_answered_directly(
    lab: Gateway, daemon, ruleset: str, version: int, why: str
) -> None:
    """The client's socket has a full cone on the gateway that would take datagrams from anyone else."""
    lab.forwarding(True)
    wanted = {"udp_ports": [5000], "exclude": {"destinations": ["10.2.0.9", "fd02::9"]}}
    host, port = {"excluded address": (9, 5000), "other port": (3, 5001)}.get(why, (2, 5001))
    running = daemon(interception={"ruleset": ruleset, **wanted})
    with (
        UdpService(lab.server, lab.server_address(version), 5000) as relayed,
        UdpService(lab.server, lab.server_address(version, host), port) as routed,
        lab.client.socket(FAMILY[version], socket.SOCK_DGRAM) as asking,
    ):
        asking.bind((lab.client_address(version), 0))
        for number, far in enumerate((relayed, routed, relayed, routed)):
            asking.sendto(b"%d" % number, far.address)
            data, peer = asking.recvfrom(16)
            assert (data, peer[:2]) == (b"%d" % number, far.address)
        assert {*relayed.peers, *routed.peers} == {asking.getsockname()[:2]}
        assert running.counters()["udp_flows"] == 1
    (end,) = running.wait_flow_ends(1)
    assert end["orig_dst"].endswith(":5000")
    assert (end["bytes_up"], end["bytes_down"]) == (2, 2)


# Packets that claim to come from the box itself

SEEN = """
table inet watch {
    chain in {
        type filter hook input priority filter
        iifname lan0 ip saddr { 10.1.0.1, 10.2.0.1 } counter
        iifname lan0 ip6 saddr { fd01::1, fd02::1 } meta l4proto { tcp, udp } counter
        iifname lan0 meta mark & 0x1 == 0x1 counter
    }
}
"""


def send_from(version: int, source: str) -> None:
    """A SYN and a datagram of a source that need not be the sender's."""
    from scapy.all import IP, TCP, UDP, IPv6, Raw

    target = {4: "10.2.0.2", 6: "fd02::2"}[version]
    head = {4: IP, 6: IPv6}[version](src=source, dst=target)
    with socket.socket(FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        if version == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
        for packet in (head / TCP(sport=4000, dport=5000, flags="S"), head / UDP(sport=4000, dport=5000) / Raw(b"x")):
            raw.sendto(bytes(packet), (target, 0))


@FAMILIES
@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_a_client_that_claims_an_address_of_the_box_makes_no_flow(
    lab: Gateway, daemon, ruleset: str, version: int, on_failure: str
) -> None:
    """The kernel itself refuses such IPv4 packets, unless it is told to accept them."""
    lab.gateway.sysctl("net.ipv4.conf.lan0.accept_local", 1)
    lab.gateway.nft(SEEN)
    running = daemon(interception={"ruleset": ruleset, "on_failure": on_failure})
    with UdpService(lab.server, lab.server_address(version), 5000) as far:
        for side in ("client", "server"):
            lab.client.call(send_from, version, lab.gateway_address(version, side))
        lab.client.call(send_from, version, lab.client_address(version, 5))
        (end,) = running.wait_flow_ends(1)
        assert end["client"].strip("[]").startswith(lab.client_address(version, 5)), "the last ones were honest"
        assert {address for address, _ in far.peers} == {lab.client_address(version, 5)}
    assert running.counters()["udp_flows"] == 1
    listing = lab.gateway.run(["nft", "list", "table", "inet", "watch"]).stdout
    claimed4, claimed6, taken = map(int, re.findall(r"counter packets (\d+)", listing))
    assert claimed4 + claimed6 == 0
    assert taken >= 2
    lab.gateway.nft("delete table inet watch")


def test_running_flows_outlive_their_exclusion(lab: Gateway, daemon, ruleset: str) -> None:
    """Excluding a destination is for new flows; what is relayed stays relayed."""
    running = daemon(interception={"ruleset": ruleset})
    with TcpService(lab.server, lab.server_address(4)) as far, lab.client.tcp(far.address) as flow:
        flow.sendall(b"one")
        assert flow.recv(8) == b"one"
        wanted = {"ruleset": ruleset, "exclude": {"destinations": ["10.2.0.0/24"]}}
        done = cli(lab.gateway, "apply-rules", "-c", write_config(running.path.parent, interception=wanted))
        assert done.returncode == 0, done.stderr
        flow.sendall(b"two")
        assert flow.recv(8) == b"two"
    assert running.wait_flow_ends(1)[0]["bytes_up"] == 6


# Many prefixes

MANY = 100_000
SUPERVISOR_LIMIT_KB = 80 * 1024
APPLY_LIMIT_S = 60


@pytest.mark.timeout(180)
def test_a_hundred_thousand_prefixes(lab: Gateway, tmp_path: Path, ruleset: str) -> None:
    lab.forwarding(True)
    first = int.from_bytes(socket.inet_aton("100.64.0.0"), "big")
    prefixes = [socket.inet_ntoa(struct.pack("!I", first + 2 * number)) for number in range(MANY - 2)]
    excluded = {"destinations": [*prefixes, "10.2.0.9", "fd02::9"]}
    text = json.dumps(config(interception={"ruleset": ruleset, "exclude": excluded}))  # JSON is YAML
    running = Daemon(lab.gateway, tmp_path / "many", text, ready_s=APPLY_LIMIT_S)
    assert resident_kb(running.process.pid) < SUPERVISOR_LIMIT_KB
    for version in (4, 6):
        with TcpService(lab.server, lab.server_address(version, 9)) as far:
            ask(lab.client, "tcp", far.address)
    with (
        TcpService(lab.server, lab.server_address(4, 8)) as far,
        UdpService(lab.server, lab.server_address(6, 8)) as far6,
    ):
        ask(lab.client, "tcp", far.address)
        ask(lab.client, "udp", far6.address)
    assert {end["orig_dst"] for end in running.wait_flow_ends(2)} == {
        f"{far.address[0]}:{far.address[1]}",
        f"[{far6.address[0]}]:{far6.address[1]}",
    }
    assert flows_taken(running) == 2
    assert resident_kb(running.process.pid) < SUPERVISOR_LIMIT_KB
    running.stop()


def resident_kb(pid: int) -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def test_a_stray_datagram_of_its_server_cuts_no_relayed_flow(lab: Gateway, daemon, ruleset: str) -> None:
    """It comes as a flow from the other side would; what the client says to that server stays its own flow."""
    lab.forwarding(True)
    running = daemon(
        interception={"ruleset": ruleset, "udp_ports": [5000]},
        backends={"direct": {"type": "direct", "source": "gateway", "nat": "symmetric"}},
        timeouts={"udp_idle": "10s"},
    )
    client = lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind((lab.client_address(4), 4000))
    server = lab.server.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((lab.server_address(4), 5000))
    client.sendto(b"one", server.getsockname())
    data, peer = server.recvfrom(100)
    assert (data, peer[0]) == (b"one", lab.gateway_address(4, "server"))
    server.sendto(b"stray", client.getsockname())
    assert client.recvfrom(100)[0] == b"stray"
    client.sendto(b"two", server.getsockname())
    assert server.recvfrom(100) == (b"two", peer)
    assert running.counters()["udp_flows"] == 1
