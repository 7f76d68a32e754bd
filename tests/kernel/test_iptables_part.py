"""The iptables ruleset in real namespaces: client - gateway - server, each its own, thrown away after each test."""

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tproxyd.config import Mark, PortRange
from tproxyd.errors import KernelUnsupported, RulesetError, TryAgain
from tproxyd.flow import Network
from tproxyd.netfilter import ipset, iptables, iptables_part
from tproxyd.netfilter.child import in_child
from tproxyd.netfilter.iptables_part import IptablesPart
from tproxyd.netfilter.marks import check_marks
from tproxyd.netfilter.nft_part import NftPart
from tproxyd.netfilter.plan import Intercept, PrefixSet, Ruleset
from tproxyd.netfilter.preflight import check_box
from tproxyd.netfilter.routing import RoutingPart

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("iptables-legacy-save") is None, reason="needs iptables"),
]

PORT = 7440
CLIENT = {4: "10.71.0.2", 6: "fd71::2"}
GATEWAY = {4: "10.71.0.1", 6: "fd71::1"}
SERVER = {4: "10.72.0.2", 6: "fd72::2"}
EXCLUDED = {4: "10.72.0.3", 6: "fd72::3"}
GATEWAY_FAR = {4: "10.72.0.1", 6: "fd72::1"}
LISTEN = {4: "127.0.0.1", 6: "::1"}
LONGEST = {4: 32, 6: 128}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
IP_RECVORIGDSTADDR = {4: (socket.SOL_IP, 20), 6: (41, 74)}
TRANSPARENT = {4: (socket.SOL_IP, socket.IP_TRANSPARENT), 6: (41, 75)}
WAIT_S = 1.0

RULESET = Ruleset(
    interfaces=("lan0",),
    versions=(4, 6),
    excluded=(
        PrefixSet("destination", 4, ("10.72.0.3/32", "127.0.0.0/8", "224.0.0.0/4")),
        PrefixSet("source", 4, ("127.0.0.0/8",)),
        PrefixSet("destination", 6, ("::/127", "fd72::3/128", "fe80::/10", "ff00::/8")),
        PrefixSet("source", 6, ("::/127", "fe80::/10")),
    ),
    intercepts=tuple(
        Intercept(network, version, (PortRange(1, 65535),), LISTEN[version], PORT)
        for version in (4, 6)
        for network in (Network.TCP, Network.UDP)
    ),
    own_traffic=False,
    lease=False,
    learned=None,
    mark=Mark(0x1, 0x1),
    client_mark=Mark(0x2, 0x2),
    server_mark=Mark(0x4, 0x4),
    route_table=7440,
    rule_priority=7440,
)

both_families = pytest.mark.parametrize("version", [4, 6])


@dataclass
class Lab:
    client: str
    gateway: str
    server: str


def run(namespace: str, *command: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *command], check=False, capture_output=True, text=True, input=stdin
    )
    assert done.returncode == 0, f"{command}: {done.stderr[:500]}"
    return done.stdout


def inside(namespace: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a child that lives in the namespace."""

    def enter() -> Any:
        descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0) == 0
        os.close(descriptor)
        return function(*args)

    return in_child(enter)


def socket_in(namespace: str, *args: int) -> socket.socket:
    """Open a socket in a namespace; it stays there, whoever uses it."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        assert libc.setns(there, 0) == 0
        return socket.socket(*args)
    finally:
        assert libc.setns(own, 0) == 0
        os.close(own)
        os.close(there)


@pytest.fixture
def lab() -> Iterator[Lab]:
    names = [f"xipt-{os.getpid()}-{role}" for role in ("client", "gateway", "server")]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            run(name, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
            run(name, "ip", "link", "set", "lo", "up")
        client, gateway, server = names
        link(client, "eth0", gateway, "lan0")
        link(server, "eth0", gateway, "wan0")
        for namespace, device, addresses in (
            (client, "eth0", CLIENT),
            (gateway, "lan0", GATEWAY),
            (server, "eth0", SERVER),
            (server, "eth0", EXCLUDED),
            (gateway, "wan0", GATEWAY_FAR),
        ):
            run(namespace, "ip", "addr", "add", f"{addresses[4]}/24", "dev", device)
            run(namespace, "ip", "addr", "add", f"{addresses[6]}/64", "dev", device, "nodad")
        for namespace, via in ((client, GATEWAY), (server, GATEWAY_FAR)):
            for version in (4, 6):
                run(namespace, "ip", f"-{version}", "route", "add", "default", "via", via[version])
        run(gateway, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for command in ("iptables-legacy", "ip6tables-legacy"):  # so that the tables exist before and after
            for table in ("raw", "mangle"):
                run(gateway, command, "-t", table, "-S")
        yield Lab(*names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def link(one: str, device: str, other: str, other_device: str) -> None:
    peer = ["peer", "name", other_device, "netns", other]
    run(one, "ip", "link", "add", device, "type", "veth", *peer)
    run(one, "ip", "link", "set", device, "up")
    run(other, "ip", "link", "set", other_device, "up")


def state(namespace: str) -> str:
    """All that a ruleset could leave behind; counters and times of day left out."""
    shown = []
    for command in ("iptables-legacy-save", "ip6tables-legacy-save"):
        lines = run(namespace, command).splitlines()
        shown += [line.partition("[")[0] for line in lines if not line.startswith("#")]
    for command in (("ipset", "save"), ("nft", "list", "ruleset"), ("ip", "rule"), ("ip", "-6", "rule")):
        shown.append(run(namespace, *command))
    return "\n".join([*shown, run(namespace, "ip", "route", "show", "table", "all")])


def apply(lab: Lab, ruleset: Ruleset) -> None:
    inside(lab.gateway, RoutingPart(ruleset).write)
    inside(lab.gateway, IptablesPart(ruleset).write)


def listener(lab: Lab, network: Network, version: int, address: str | None = None, port: int = PORT) -> socket.socket:
    kind = socket.SOCK_STREAM if network is Network.TCP else socket.SOCK_DGRAM
    sock = socket_in(lab.gateway, FAMILY[version], kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(*TRANSPARENT[version], 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RULESET.client_mark.value)
    sock.setsockopt(*IP_RECVORIGDSTADDR[version], 1)
    sock.bind((address or LISTEN[version], port))
    sock.settimeout(WAIT_S)
    if network is Network.TCP:
        sock.listen()
    return sock


def original_destination(ancillary: list[tuple[int, int, bytes]], version: int) -> tuple[str, int]:
    ((_, _, data),) = ancillary
    (port,) = struct.unpack_from("!H", data, 2)
    packed = data[4:8] if version == 4 else data[8:24]
    return socket.inet_ntop(FAMILY[version], packed), port


def connect(lab: Lab, version: int, address: str, port: int) -> socket.socket:
    sock = socket_in(lab.client, FAMILY[version], socket.SOCK_STREAM)
    sock.settimeout(WAIT_S)
    sock.connect((address, port))
    return sock


def tracked(lab: Lab) -> list[str]:
    """Connection tracking entries of IPv4 and IPv6 that name the client's address."""
    lines = run(lab.gateway, "cat", "/proc/net/nf_conntrack").splitlines()
    return [line for line in lines if str(CLIENT[4]) in line or "fd71:0000:0000:0000:0000:0000:0000:0002" in line]


@both_families
def test_tcp_reaches_the_listener_with_its_original_destination(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with listener(lab, Network.TCP, version) as door, connect(lab, version, SERVER[version], 8080) as client:
        accepted, source = door.accept()
        with accepted:
            assert accepted.getsockname()[:2] == (SERVER[version], 8080)
            assert source[:2] == client.getsockname()[:2]
            client.sendall(b"ping")
            assert accepted.recv(16) == b"ping"
            accepted.sendall(b"pong" * 1000)
            assert client.recv(4000, socket.MSG_WAITALL) == b"pong" * 1000


@both_families
def test_udp_reaches_the_listener_and_the_flow_socket_after_it(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with (
        listener(lab, Network.UDP, version) as door,
        socket_in(lab.client, FAMILY[version], socket.SOCK_DGRAM) as client,
        listener(lab, Network.UDP, version, SERVER[version], 5353) as flow,
    ):
        flow.connect(("10.71.0.9" if version == 4 else "fd71::9", 9))  # someone else's: must not get the first datagram
        client.settimeout(WAIT_S)
        client.sendto(b"first", (SERVER[version], 5353))
        data, ancillary, _flags, source = door.recvmsg(100, 256)
        assert (data, original_destination(ancillary, version)) == (b"first", (SERVER[version], 5353))
        flow.connect(source[:2])
        client.sendto(b"second", (SERVER[version], 5353))
        assert flow.recv(100) == b"second"
        flow.send(b"answer")
        assert client.recvfrom(100)[1][:2] == (SERVER[version], 5353)


@both_families
def test_client_side_stays_out_of_connection_tracking(lab: Lab, version: int) -> None:
    run(lab.gateway, "iptables-legacy", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW")  # tracking on
    run(lab.gateway, "ip6tables-legacy", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW")
    apply(lab, RULESET)
    with listener(lab, Network.TCP, version) as door, connect(lab, version, SERVER[version], 8080) as client:
        accepted, _ = door.accept()
        client.sendall(b"ping")
        assert accepted.recv(16) == b"ping"
        accepted.close()
    assert tracked(lab) == []
    with (
        socket_in(lab.server, FAMILY[version], socket.SOCK_DGRAM) as server,
        socket_in(lab.client, FAMILY[version], socket.SOCK_DGRAM) as client,
    ):
        server.bind((EXCLUDED[version], 8080))
        client.sendto(b"routed", (EXCLUDED[version], 8080))
        assert server.recv(100) == b"routed"
    assert len(tracked(lab)) == 1, "a routed flow is tracked: the check above can fail"


@both_families
def test_server_side_answers_reach_the_four_tuple_socket_and_are_tracked(lab: Lab, version: int) -> None:
    run(lab.gateway, "iptables-legacy", "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    run(lab.gateway, "ip6tables-legacy", "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    apply(lab, RULESET)
    with (
        socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server,
        socket_in(lab.gateway, FAMILY[version], socket.SOCK_STREAM) as onward,
    ):
        server.bind((SERVER[version], 8080))
        server.listen()
        onward.setsockopt(*TRANSPARENT[version], 1)
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RULESET.server_mark.value)
        onward.settimeout(WAIT_S)
        onward.bind((CLIENT[version], 40000))
        onward.connect((SERVER[version], 8080))
        accepted, source = server.accept()
        with accepted:
            assert source[:2] == (CLIENT[version], 40000)
            accepted.sendall(b"hello")
            assert onward.recv(16) == b"hello"
    assert len(tracked(lab)) == 1


@both_families
def test_server_side_answers_through_a_client_interface_are_tracked(lab: Lab, version: int) -> None:
    """A server may stand behind an interface that clients use, too."""
    for command in ("iptables-legacy", "ip6tables-legacy"):
        states = ("-m", "conntrack", "--ctstate", "INVALID,UNTRACKED")
        run(lab.gateway, command, "-A", "INPUT", "-p", "tcp", *states, "-j", "DROP")
    apply(lab, replace(RULESET, interfaces=("lan0", "wan0")))
    with (
        socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server,
        socket_in(lab.gateway, FAMILY[version], socket.SOCK_STREAM) as onward,
    ):
        server.bind((SERVER[version], 8080))
        server.listen()
        onward.setsockopt(*TRANSPARENT[version], 1)
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RULESET.server_mark.value)
        onward.settimeout(WAIT_S)
        onward.bind((CLIENT[version], 40000))
        onward.connect((SERVER[version], 8080))
        server.accept()[0].sendall(b"hello")
        assert onward.recv(16) == b"hello"


@both_families
def test_excluded_destination_and_the_gateway_itself_stay_routed(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with (
        listener(lab, Network.TCP, version) as door,
        socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server,
        socket_in(lab.gateway, FAMILY[version], socket.SOCK_STREAM) as local,
    ):
        for sock, address in ((server, EXCLUDED), (local, GATEWAY)):
            sock.bind((address[version], 8080))
            sock.listen()
            with connect(lab, version, address[version], 8080):
                sock.settimeout(WAIT_S)
                sock.accept()[0].close()
        door.settimeout(0.1)
        with pytest.raises(TimeoutError):
            door.accept()


@both_families
def test_closed_drops_new_flows_while_nobody_listens(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server:
        server.bind((SERVER[version], 8080))
        server.listen()
        with pytest.raises(TimeoutError):
            connect(lab, version, SERVER[version], 8080)


@both_families
def test_open_intercepts_only_while_the_lease_runs(lab: Lab, version: int) -> None:
    leased = replace(RULESET, lease=True)
    apply(lab, leased)
    with (
        socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server,
        listener(lab, Network.TCP, version) as door,
    ):
        server.bind((SERVER[version], 8080))
        server.listen()
        server.settimeout(WAIT_S)

        def taken_by(expected: socket.socket) -> bool:
            with connect(lab, version, SERVER[version], 8080):
                expected.accept()[0].close()
                return True

        assert taken_by(server)
        inside(lab.gateway, ipset.renew_lease, (4, 6), 1)
        inside(lab.gateway, ipset.renew_lease, (4, 6), 3)
        assert taken_by(door)
        time.sleep(1.5)
        assert taken_by(door), "a renewal moves the end of the lease"
        inside(lab.gateway, ipset.renew_lease, (4, 6), 0)
        assert taken_by(server)
        inside(lab.gateway, ipset.renew_lease, (4, 6), 1)
        time.sleep(2.1)
        assert taken_by(server), "the lease ends by itself"


@both_families
def test_a_running_connection_goes_on_when_an_open_gateway_begins_to_intercept(lab: Lab, version: int) -> None:
    with socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server:
        server.bind((SERVER[version], 8080))
        server.listen()
        with connect(lab, version, SERVER[version], 8080) as client:
            accepted, _ = server.accept()
            apply(lab, replace(RULESET, lease=True))
            inside(lab.gateway, ipset.renew_lease, (4, 6), 5)
            with listener(lab, Network.TCP, version):
                client.sendall(b"still here")
                accepted.settimeout(WAIT_S)
                assert accepted.recv(16) == b"still here"


def without_server(ruleset: Ruleset) -> Ruleset:
    excluded = tuple(
        replace(each, prefixes=(*each.prefixes, f"{SERVER[each.version]}/{LONGEST[each.version]}"))
        if each.field == "destination"
        else each
        for each in ruleset.excluded
    )
    return replace(ruleset, excluded=excluded)


@both_families
def test_a_running_flow_goes_on_when_its_destination_is_excluded(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with listener(lab, Network.TCP, version) as door, connect(lab, version, SERVER[version], 8080) as client:
        accepted, _ = door.accept()
        accepted.settimeout(WAIT_S)
        apply(lab, without_server(RULESET))
        run(lab.gateway, "ipset", "test", f"tproxyd_excluded_destination_v{version}", SERVER[version])
        for command in ("iptables-legacy", "ip6tables-legacy"):
            run(lab.gateway, command, "-A", "INPUT", "-p", "tcp", "-m", "conntrack", "!", "--ctstate", "UNTRACKED",
                "-j", "DROP")  # fmt: skip
        client.sendall(b"still here")
        assert accepted.recv(16) == b"still here"


@both_families
def test_a_syn_finds_the_listener_past_a_socket_in_time_wait(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with listener(lab, Network.TCP, version) as door:
        for _ in range(2):
            client = socket_in(lab.client, FAMILY[version], socket.SOCK_STREAM)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.settimeout(WAIT_S)
            client.bind((CLIENT[version], 45000))
            client.connect((SERVER[version], 8080))
            accepted, _ = door.accept()
            accepted.close()  # first to close: TIME_WAIT stays here
            assert client.recv(1) == b""
            client.close()
            time.sleep(0.1)
    statistics = run(lab.client, "cat", "/proc/net/snmp").split("Tcp:")[1:]
    tcp = dict(zip(statistics[0].split(), statistics[1].split(), strict=False))
    assert tcp["OutRsts"] == "0", "the socket in TIME_WAIT answered the SYN, and the client had to try again"


@both_families
def test_a_syn_to_a_destination_excluded_since_is_routed_past_a_socket_in_time_wait(lab: Lab, version: int) -> None:
    apply(lab, RULESET)
    with (
        listener(lab, Network.TCP, version) as door,
        socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server,
    ):
        server.bind((SERVER[version], 8080))
        server.listen()
        server.settimeout(WAIT_S)
        for taker in (door, server):
            with socket_in(lab.client, FAMILY[version], socket.SOCK_STREAM) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.settimeout(WAIT_S)
                client.bind((CLIENT[version], 45000))
                client.connect((SERVER[version], 8080))
                taker.accept()[0].close()
                assert client.recv(1) == b""
            time.sleep(0.1)
            apply(lab, without_server(RULESET))


@both_families
def test_icmp_errors_about_a_flow_reach_its_socket(lab: Lab, version: int) -> None:
    for command in ("iptables-legacy", "ip6tables-legacy"):  # untracked is not invalid
        run(lab.gateway, command, "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    apply(lab, RULESET)
    with (
        listener(lab, Network.UDP, version) as door,
        socket_in(lab.client, FAMILY[version], socket.SOCK_DGRAM) as client,
        listener(lab, Network.UDP, version, SERVER[version], 5353) as flow,
    ):
        flow.connect(("10.71.0.9" if version == 4 else "fd71::9", 9))
        client.sendto(b"first", (SERVER[version], 5353))
        source = door.recvmsg(100, 256)[3]
        flow.connect(source[:2])
        client.close()  # the answer will meet no socket
        flow.send(b"answer")
        with pytest.raises(ConnectionRefusedError):
            flow.recv(100)


@both_families
def test_a_transparent_socket_bound_to_all_addresses_takes_no_flow(lab: Lab, version: int) -> None:
    """Another transparent proxy on the box may listen on 0.0.0.0; the flow is still ours."""
    apply(lab, RULESET)
    everything = {4: "0.0.0.0", 6: "::"}[version]
    with (
        listener(lab, Network.UDP, version) as door,
        listener(lab, Network.UDP, version, everything, 5353),
        socket_in(lab.client, FAMILY[version], socket.SOCK_DGRAM) as client,
    ):
        client.sendto(b"mine", (SERVER[version], 5353))
        assert door.recv(100) == b"mine"


@both_families
def test_own_traffic_is_intercepted_without_loops(lab: Lab, version: int) -> None:
    apply(lab, replace(RULESET, own_traffic=True))
    with (
        listener(lab, Network.TCP, version) as door,
        socket_in(lab.gateway, FAMILY[version], socket.SOCK_STREAM) as own,
        socket_in(lab.gateway, FAMILY[version], socket.SOCK_STREAM) as onward,
        socket_in(lab.server, FAMILY[version], socket.SOCK_STREAM) as server,
    ):
        server.bind((SERVER[version], 8080))
        server.listen()
        server.settimeout(WAIT_S)
        own.settimeout(WAIT_S)
        own.connect((SERVER[version], 8080))
        accepted, source = door.accept()
        with accepted:
            assert source[:2] == own.getsockname()[:2]
            own.sendall(b"ping")
            assert accepted.recv(16) == b"ping"
            accepted.sendall(b"pong")
            assert own.recv(16) == b"pong"
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RULESET.server_mark.value)
        onward.settimeout(WAIT_S)
        onward.connect((SERVER[version], 8080))
        server.accept()[0].close()


def test_the_rest_of_the_box_is_as_before_after_removal(lab: Lab) -> None:
    run(lab.gateway, "iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-s", "192.0.2.1", "-j", "DROP")
    run(lab.gateway, "iptables-legacy", "-t", "mangle", "-N", "THEIRS")
    run(
        lab.gateway, "iptables-legacy", "-t", "mangle", "-A", "PREROUTING", "-m", "ttl", "--ttl-eq", "3", "-j", "THEIRS"
    )
    run(lab.gateway, "ip6tables-legacy", "-t", "mangle", "-P", "FORWARD", "DROP")
    run(lab.gateway, "ipset", "create", "theirs", "hash:net")
    run(lab.gateway, "nft", "add table inet theirs")
    before = state(lab.gateway)
    for ruleset in (RULESET, replace(RULESET, lease=True, own_traffic=True), replace(RULESET, versions=(4,))):
        apply(lab, ruleset)
        assert state(lab.gateway) != before
        assert "-A PREROUTING -s 192.0.2.1/32 -j DROP" in state(lab.gateway)
    inside(lab.gateway, IptablesPart(None).restore, None)
    inside(lab.gateway, RoutingPart(None).restore, None)
    assert state(lab.gateway) == before
    assert inside(lab.gateway, IptablesPart(None).snapshot) is None


def test_jumps_come_first_and_others_keep_their_counters(lab: Lab) -> None:
    run(lab.gateway, "iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-s", CLIENT[4])
    run(lab.client, "ping", "-c2", "-i0.1", "-q", GATEWAY[4])
    apply(lab, RULESET)
    listing = run(lab.gateway, "iptables-legacy-save", "-c", "-t", "raw")
    rules = [line for line in listing.splitlines() if "-A PREROUTING" in line]
    assert [rule.partition("] ")[2] for rule in rules] == [
        "-A PREROUTING -i lan0 -j TPROXYD_RAW",
        f"-A PREROUTING -s {CLIENT[4]}/32",
    ]
    assert rules[1].startswith("[2:")


def test_others_rules_in_raw_still_see_our_flows(lab: Lab) -> None:
    run(lab.gateway, "iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-s", CLIENT[4], "-j", "DROP")
    apply(lab, RULESET)
    with listener(lab, Network.TCP, 4), pytest.raises(TimeoutError):
        connect(lab, 4, SERVER[4], 8080)


def test_a_second_write_changes_nothing(lab: Lab) -> None:
    ruleset = replace(RULESET, lease=True, own_traffic=True)
    assert inside(lab.gateway, IptablesPart(ruleset).difference) != ""
    apply(lab, ruleset)
    before = run(lab.gateway, "iptables-legacy-save", "-c", "-t", "mangle")
    assert inside(lab.gateway, IptablesPart(ruleset).difference) == ""
    run(lab.client, "ping", "-c1", "-q", GATEWAY[4])
    counters = run(lab.gateway, "iptables-legacy-save", "-c", "-t", "mangle").splitlines()[1:-1]
    assert counters != before.splitlines()[1:-1]
    inside(lab.gateway, IptablesPart(ruleset).write)
    assert run(lab.gateway, "iptables-legacy-save", "-c", "-t", "mangle").splitlines()[1:-1] == counters


def test_difference_names_a_rule_deleted_by_hand(lab: Lab) -> None:
    apply(lab, RULESET)
    run(lab.gateway, "ip6tables-legacy", "-t", "raw", "-D", "TPROXYD_CLIENT", "1")
    run(lab.gateway, "ipset", "del", "tproxyd_excluded_destination_v4", "10.72.0.3")
    lines = inside(lab.gateway, IptablesPart(RULESET).difference).splitlines()
    assert "+-A TPROXYD_CLIENT -j CT --notrack" in lines
    assert "+add tproxyd_excluded_destination_v4 10.72.0.3/32" in lines
    inside(lab.gateway, IptablesPart(RULESET).write)
    assert inside(lab.gateway, IptablesPart(RULESET).difference) == ""


def test_a_snapshot_brings_the_old_rules_back(lab: Lab) -> None:
    apply(lab, RULESET)
    before = state(lab.gateway)
    snapshot = inside(lab.gateway, IptablesPart(None).snapshot)
    apply(lab, replace(RULESET, versions=(4,), lease=True, mark=Mark(0x10, 0xF0)))
    inside(lab.gateway, IptablesPart(None).restore, snapshot)
    inside(lab.gateway, RoutingPart(RULESET).write)
    assert sorted(state(lab.gateway).splitlines()) == sorted(before.splitlines())


def test_what_is_rendered_loads_and_is_what_is_written(lab: Lab) -> None:
    ruleset = replace(RULESET, lease=True, own_traffic=True)
    load(lab, ruleset)
    assert inside(lab.gateway, IptablesPart(ruleset).difference) == ""


def entries(version: int, table: str) -> list[bytes]:
    """A table in the kernel's own form (IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES), without counters."""
    get_info, get_entries, info_bytes, head_bytes = 64, 65, 84, 40
    level, basic_bytes, counters_at = {4: (socket.SOL_IP, 84, 96), 6: (41, 136, 152)}[version]
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:

        def get(option: int, size: int, head: bytes) -> bytes:
            buffer = ctypes.create_string_buffer(head, size)
            assert libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(ctypes.c_uint32(size))) == 0
            return buffer.raw

        name = table.encode().ljust(32, b"\0")
        (size,) = struct.unpack_from("=I", get(get_info, info_bytes, name), 80)
        blob = get(get_entries, head_bytes + size, name + struct.pack("=I", size))[head_bytes:]
    found = []
    while blob:
        _cache, target_at, length, _from = struct.unpack_from("=IHHI", blob, basic_bytes)
        entry = blob[:basic_bytes] + blob[counters_at + 16 : length]
        found.append(struct.pack("=HH", target_at, length) + entry)
        blob = blob[length:]
    return found


def test_the_kernel_holds_the_very_bytes_that_iptables_restore_writes(lab: Lab) -> None:
    """Listings don't show it all: python-iptables makes IPv6 interface masks that take lan2 for lan0."""
    ports = (PortRange(80, 80), PortRange(443, 443), PortRange(1000, 2000))
    intercepts = tuple(replace(intercept, ports=ports) for intercept in RULESET.intercepts)
    ruleset = replace(RULESET, interfaces=("lan0", "lan2"), intercepts=intercepts, lease=True, own_traffic=True)
    tables = [(version, table) for version in (4, 6) for table in ("raw", "mangle")]
    inside(lab.gateway, IptablesPart(ruleset).write)
    written = {(version, table): inside(lab.gateway, entries, version, table) for version, table in tables}
    inside(lab.gateway, IptablesPart(ruleset).restore, None)
    load(lab, ruleset)
    assert written == {(version, table): inside(lab.gateway, entries, version, table) for version, table in tables}


def load(lab: Lab, ruleset: Ruleset) -> None:
    for section in iptables.render(ruleset).split("# ")[1:]:
        command, _, text = section.partition("\n")
        run(lab.gateway, *command.replace("tables-restore", "tables-legacy-restore").split(), stdin=text)


def test_a_busy_xtables_lock_is_waited_for_and_then_reported(lab: Lab, tmp_path: Path, monkeypatch: Any) -> None:
    lock = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    monkeypatch.setattr(iptables_part, "_LOCK_WAIT_S", 0.3)
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(TryAgain, match="another program"):
            inside(lab.gateway, IptablesPart(RULESET).write)
    inside(lab.gateway, IptablesPart(RULESET).write)


def test_a_rule_that_python_iptables_passes_over_is_never_committed(lab: Lab, monkeypatch: Any) -> None:
    before = state(lab.gateway)
    monkeypatch.setattr(iptables, "_OUR_SOCKET", {"transparent": "", "no-such-option": "1"})
    with pytest.raises(RulesetError, match="can't express"):
        inside(lab.gateway, IptablesPart(RULESET).write)
    inside(lab.gateway, IptablesPart(None).restore, None)
    assert state(lab.gateway) == before


@pytest.mark.parametrize(
    "rule",
    [
        "nft add rule inet theirs prerouting meta mark set 0x3",
        "nft add rule inet theirs prerouting meta mark and 0x2 != 0 drop",
        "iptables-nft -t mangle -A OUTPUT -j MARK --set-mark 0x4/0xff",
        "ip6tables-legacy -t mangle -A FORWARD -m mark --mark 0x1/0x3 -j ACCEPT",
    ],
)
def test_a_mark_of_ours_in_someones_rule_is_refused_whichever_tool_wrote_it(lab: Lab, rule: str) -> None:
    run(lab.gateway, "nft", "add table inet theirs; add chain inet theirs prerouting")
    apply(lab, replace(RULESET, lease=True, own_traffic=True))
    inside(lab.gateway, NftPart(RULESET).write)
    inside(lab.gateway, check_marks, RULESET)  # ours don't count
    run(lab.gateway, *rule.split())
    with pytest.raises(RulesetError, match=r"mark 0x\d/0x\d is in use: .* set another interception\."):
        inside(lab.gateway, check_marks, RULESET)


def test_marks_are_checked_swiftly_beside_a_hundred_thousand_set_elements(lab: Lab) -> None:
    elements = ", ".join(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(0, 200_000, 2))
    table = f"table inet theirs {{\nset s {{ type ipv4_addr; flags interval; elements = {{ {elements} }}\n}}\n}}\n"
    run(lab.gateway, "nft", "-f", "-", stdin=table)
    start = time.monotonic()
    inside(lab.gateway, check_marks, RULESET)
    assert (took := time.monotonic() - start) < 0.3, took


def test_a_missing_python_iptables_is_named_and_needed_only_where_it_was_used(lab: Lab, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "iptc", None)
    monkeypatch.setattr(iptables_part, "find_spec", lambda name: None)
    assert inside(lab.gateway, iptables_part.tables_in_use) is False
    with pytest.raises(KernelUnsupported, match=r"pip install tproxyd\[iptables\]"):
        inside(lab.gateway, IptablesPart(RULESET).check)
    run(lab.gateway, "ipset", "create", "tproxyd_lease_v4", "hash:net", "timeout", "0")
    assert inside(lab.gateway, iptables_part.tables_in_use) is True


def test_looking_makes_no_tables(lab: Lab) -> None:
    with_none = f"{lab.client}"  # no one has touched iptables there
    assert inside(with_none, iptables_part.tables_in_use) is False
    assert inside(with_none, IptablesPart(None).snapshot) is None
    inside(with_none, IptablesPart(RULESET).check)
    inside(with_none, IptablesPart(RULESET).difference)
    assert run(with_none, "cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names") == ""
    inside(with_none, IptablesPart(RULESET).write)
    names = run(with_none, "cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names").split()
    assert sorted(names) == ["mangle", "mangle", "raw", "raw"]


@pytest.mark.parametrize(
    ("src_valid_mark", "rp_filter", "accept_local", "works"),
    [(0, 0, 0, True), (0, 1, 0, True), (1, 0, 0, False), (1, 2, 0, False), (1, 1, 1, False), (1, 2, 1, True)],
)
def test_preflight_refuses_just_the_source_checks_that_swallow_flows(
    lab: Lab, src_valid_mark: int, rp_filter: int, accept_local: int, works: bool
) -> None:
    apply(lab, RULESET)
    for interface in ("lan0", "wan0"):
        settings = {"src_valid_mark": src_valid_mark, "rp_filter": rp_filter, "accept_local": accept_local}
        for name, value in settings.items():
            run(lab.gateway, "sysctl", "-qw", f"net.ipv4.conf.{interface}.{name}={value}")
        assert relayed(lab) is works
        if works:
            assert inside(lab.gateway, check_box, RULESET) == []
        elif interface == "lan0":
            with pytest.raises(RulesetError, match=r"lan0.*net\.ipv4\.conf\.lan0\.src_valid_mark=0"):
                inside(lab.gateway, check_box, RULESET)
        else:
            (warning,) = inside(lab.gateway, check_box, RULESET)
            assert "behind wan0" in warning
        for name in settings:
            run(lab.gateway, "sysctl", "-qw", f"net.ipv4.conf.{interface}.{name}=0")


def relayed(lab: Lab) -> bool:
    """Tell whether both halves of a flow work: client to listener, four-tuple socket to server."""
    with (
        listener(lab, Network.TCP, 4) as door,
        socket_in(lab.server, socket.AF_INET, socket.SOCK_STREAM) as server,
        socket_in(lab.gateway, socket.AF_INET, socket.SOCK_STREAM) as onward,
    ):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((SERVER[4], 8080))
        server.listen()
        onward.setsockopt(*TRANSPARENT[4], 1)
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RULESET.server_mark.value)
        onward.settimeout(WAIT_S)
        try:
            with connect(lab, 4, SERVER[4], 8080) as client:
                door.accept()[0].close()
                onward.bind((CLIENT[4], client.getsockname()[1]))
                onward.connect((SERVER[4], 8080))
        except TimeoutError:
            return False
        return True
