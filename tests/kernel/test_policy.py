"""The policy's rules as clients and servers see them: in the kernel, and in a worker where one came to it."""

import contextlib
import errno
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import (
    Daemon,
    Gateway,
    TcpService,
    UdpService,
    answers,
    ask,
    cli,
    config,
    eventually,
    service,
    write_config,
)
from tests.lab.namespace import Namespace

KINDS = [(network, version) for network in ("tcp", "udp") for version in (4, 6)]
IP_RECVTTL = 12
NINE = ["10.2.0.9", "fd02::9"]
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
RECEIVE_TTL = {4: (socket.SOL_IP, IP_RECVTTL), 6: (socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT)}
QUIET_S = 0.3

Services = list[tuple[str, TcpService | UdpService]]


@contextlib.contextmanager
def everywhere(lab: Gateway, host: int = 9, port: int = 0) -> Iterator[Services]:
    """A service of each transport and family on the server."""
    with contextlib.ExitStack() as stack:
        yield [(n, stack.enter_context(service(lab.server, n, lab.server_address(v, host), port))) for n, v in KINDS]


def seen(services: Services) -> int:
    return sum(len(each.peers) for _, each in services)


def flows_taken(counters: dict[str, Any]) -> int:
    return counters["tcp_flows"] + counters["udp_flows"]


def error_of(namespace: Namespace, network: str, peer: tuple[str, int], timeout_s: float = 5.0) -> int | None:
    """What an attempt to get an answer ends with; None for silence."""
    try:
        ask(namespace, network, peer, timeout_s=timeout_s)
    except TimeoutError:
        return None
    except OSError as error:
        return error.errno
    raise AssertionError(f"{network} to {peer} was answered")


def apply(lab: Gateway, running: Daemon, **sections: Any) -> None:
    done = cli(lab.gateway, "apply-rules", "-c", write_config(running.path.parent, **sections))
    assert (done.returncode, done.stdout) == (0, "applied\n"), done.stderr


# In the kernel


def test_bypassed_flows_are_routed(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    rules = [{"name": "past", "match": {"destination": NINE}, "action": "bypass"}]
    running = daemon(interception={"ruleset": ruleset}, rules=rules)
    with everywhere(lab) as services:
        for network, far in services:
            assert ask(lab.client, network, far.address) in far.peers
    for version in (4, 6):
        assert ttl_seen(lab, version, 9) == 63, "routed once"
        assert ttl_seen(lab, version, 2) == 64, "sent by the gateway itself"
    assert running.counters()["udp_flows"] == 2
    assert running.recent_counters()["tcp_flows"] == 0
    assert "past" in lab.gateway.run(["nft", "list", "ruleset"]).stdout or ruleset == "iptables"


def ttl_seen(lab: Gateway, version: int, host: int) -> int:
    with (
        lab.server.socket(FAMILY[version], socket.SOCK_DGRAM) as far,
        lab.client.socket(FAMILY[version], socket.SOCK_DGRAM) as near,
    ):
        far.setsockopt(*RECEIVE_TTL[version], 1)
        far.bind((lab.server_address(version, host), 0))
        near.sendto(b"x", far.getsockname())
        _, ((_, _, data),), _, _ = far.recvmsg(16, 64)
        return int.from_bytes(data[:4], "little")


STRICT = """
table inet strict {
    chain out {
        type filter hook output priority filter
        ct state invalid counter drop
    }
    chain in {
        type filter hook input priority filter
        ct state invalid counter drop
    }
}
"""


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_rejected_flows_are_refused_at_once(lab: Gateway, daemon, ruleset: str, on_failure: str) -> None:
    """Whether or not the box forwards, and beside a firewall that drops what connection tracking doesn't know."""
    lab.gateway.nft(STRICT)
    rules = [{"name": "no", "match": {"destination": NINE}, "action": "reject"}]
    running = daemon(interception={"ruleset": ruleset, "on_failure": on_failure}, rules=rules)
    with everywhere(lab) as services:
        for forwarding in (False, True):
            lab.forwarding(forwarding)
            for network, far in services:
                assert error_of(lab.client, network, far.address) == errno.ECONNREFUSED
        assert seen(services) == 0
    assert flows_taken(running.counters()) == 0
    listing = lab.gateway.run(["nft", "list", "table", "inet", "strict"]).stdout
    assert listing.count("counter packets 0 ") == 2, listing
    lab.gateway.nft("delete table inet strict")


def test_dropped_flows_get_no_answer(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    rules = [{"name": "hush", "match": {"destination": NINE}, "action": "drop"}]
    running = daemon(interception={"ruleset": ruleset}, rules=rules)
    with everywhere(lab) as services:
        assert [error_of(lab.client, n, far.address, QUIET_S) for n, far in services] == [None] * 4
        assert seen(services) == 0
    assert flows_taken(running.counters()) == 0


def test_the_first_rule_that_matches_wins(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    rules = [
        {"name": "web", "match": {"network": "tcp", "port": 8080, "destination": NINE}, "backend": "direct"},
        {"name": "low", "match": {"source_port": "4000-4010", "port": [8080, 8081]}, "action": "bypass"},
        {"name": "other", "match": {"interface": "lan0", "source": ["10.1.0.0/24", "fd01::/64"]}, "action": "reject"},
        {"name": "never", "action": "drop"},
    ]
    running = daemon(interception={"ruleset": ruleset}, rules=rules)
    for version in (4, 6):
        client, server = lab.client_address(version), lab.server_address(version, 9)
        with service(lab.server, "tcp", server, 8080) as far, service(lab.server, "tcp", server, 8081) as other:
            assert ask(lab.client, "tcp", far.address) in far.peers
            assert ask(lab.client, "tcp", far.address, (client, 4001)) == (client, 4001)
            assert ask(lab.client, "tcp", other.address, (client, 4002)) in other.peers
            assert error_of(lab.client, "tcp", other.address) == errno.ECONNREFUSED
            assert error_of(lab.client, "udp", far.address) == errno.ECONNREFUSED
    ends = running.wait_flow_ends(4)
    assert [(end["rule"], end["backend"]) for end in ends] == [("web", "direct")] * 4
    counters = running.counters()
    assert flows_taken(counters) == 4
    by_worker = int(ruleset == "iptables")  # it can't refuse UDP over IPv4
    assert counters["rules"] == {"web": 4, "low": 0, "other": by_worker, "never": 0, "default": 0}
    assert kernel_counts(lab, ruleset) == {"web": 4, "low": 2, "other": 4, "never": 0}


def kernel_counts(lab: Gateway, ruleset: str) -> dict[str, int]:
    """Packets by rule, of IPv4 and IPv6; only what begins a flow is counted, and nothing is lost here."""
    if ruleset == "nftables":
        listing = lab.gateway.run(["nft", "list", "chain", "inet", "tproxyd", "rules"]).stdout
        found = [(name, int(packets)) for packets, name in re.findall(r'packets (\d+) .* comment "(.*)"', listing)]
    else:
        saved = [
            lab.gateway.run([f"{each}-legacy-save", "-c", "-t", "raw"]).stdout for each in ("iptables", "ip6tables")
        ]
        pattern = r'(?m)^\[(\d+):\d+\] -A TPROXYD_RULES .*--comment "?([\w-]+)"?'
        found = [(name, int(packets)) for each in saved for packets, name in re.findall(pattern, each)]
    return {name: sum(packets for each, packets in found if each == name) for name, _ in found}


def test_what_is_not_intercepted_is_no_matter_of_the_rules(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    daemon(
        interception={"ruleset": ruleset, "tcp_ports": [80], "udp_ports": [80], "exclude": {"destinations": NINE}},
        rules=[{"name": "nothing", "action": "reject"}],
    )
    with everywhere(lab, 9, 80) as excluded, everywhere(lab, 2, 81) as others:
        assert all(answers(lab.client, network, far.address, 5) for network, far in (*excluded, *others))
    with everywhere(lab, 2, 80) as refused:
        assert [error_of(lab.client, n, far.address) for n, far in refused] == [errno.ECONNREFUSED] * 4


# Changes while flows run


def test_running_flows_go_on_whatever_rules_come(lab: Gateway, daemon, ruleset: str) -> None:
    """Relayed ones, and those that a rule left to the kernel; they keep the decision they were given."""
    lab.forwarding(True)
    past = [{"name": "past", "match": {"destination": NINE}, "action": "bypass"}]
    running = daemon(interception={"ruleset": ruleset}, rules=past, timeouts={"udp_idle": "30s"})
    with everywhere(lab, 2) as relayed, everywhere(lab, 9) as routed, contextlib.ExitStack() as stack:
        lasting = [*relayed, *(each for each in routed if each[0] == "tcp")]
        flows = [stack.enter_context(getattr(lab.client, network)(far.address)) for network, far in lasting]
        assert [echoed(flow, b"one") for flow in flows] == [True] * 6
        for action in ("reject", "drop"):
            apply(lab, running, interception={"ruleset": ruleset}, rules=[{"name": "all", "action": action}])
            assert [echoed(flow, b"two") for flow in flows] == [True] * 6
            new = error_of(lab.client, "tcp", relayed[0][1].address, QUIET_S)
            assert new == {"reject": errno.ECONNREFUSED, "drop": None}[action]
        before = running.counters()["tcp_flows"]
        apply(lab, running, interception={"ruleset": ruleset})
        assert [echoed(flow, b"three") for flow in flows] == [True] * 6
    assert before == 2


def echoed(flow: socket.socket, data: bytes) -> bool:
    flow.sendall(data)
    return flow.recv(16) == data


def test_rules_meet_connections_that_were_there_before_the_daemon(lab: Gateway, daemon, ruleset: str) -> None:
    """A closed gateway resets them, but for those that a rule lets by."""
    lab.forwarding(True)
    rules = [
        {"name": "past", "match": {"destination": NINE}, "action": "bypass"},
        {"name": "no", "match": {"destination": ["10.2.0.8", "fd02::8"]}, "action": "reject"},
    ]
    with contextlib.ExitStack() as stack:
        ends = [(version, host) for version in (4, 6) for host in (9, 8, 2)]
        services = [stack.enter_context(TcpService(lab.server, lab.server_address(*end))) for end in ends]
        flows = [stack.enter_context(lab.client.tcp(far.address)) for far in services]
        assert all(echoed(flow, b"one") for flow in flows)
        running = daemon(interception={"ruleset": ruleset}, rules=rules)
        for (_, host), flow in zip(ends, flows, strict=True):
            if host == 9:
                assert echoed(flow, b"two")
            else:
                with pytest.raises(ConnectionResetError):
                    echoed(flow, b"two")
        assert flows_taken(running.counters()) == 0


def test_a_client_port_can_be_relayed_and_bypassed_at_once(lab: Gateway, daemon, ruleset: str) -> None:
    """Its full cone on the gateway takes datagrams from anyone, but not the answers of whom the kernel routes to."""
    lab.forwarding(True)
    rules = [{"name": "past", "match": {"port": 5001}, "action": "bypass"}]
    running = daemon(interception={"ruleset": ruleset}, rules=rules)
    for version in (4, 6):
        address = lab.server_address(version)
        with (
            UdpService(lab.server, address, 5000) as relayed,
            UdpService(lab.server, address, 5001) as routed,
            lab.client.socket(FAMILY[version], socket.SOCK_DGRAM) as asking,
        ):
            asking.bind((lab.client_address(version), 0))
            for number, far in enumerate((relayed, routed, relayed, routed)):
                asking.sendto(b"%d" % number, far.address)
                data, peer = asking.recvfrom(16)
                assert (data, peer[:2]) == (b"%d" % number, far.address)
    assert running.counters()["udp_flows"] == 2
    assert {end["orig_dst"][-5:] for end in running.wait_flow_ends(2)} == {":5000"}


def test_udp_that_was_let_by_is_relayed_both_ways_once_no_rule_says_otherwise(
    lab: Gateway, daemon, ruleset: str
) -> None:
    """Its connection is still known to the kernel, with the very addresses and ports that tproxyd then uses."""
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset})
    past = [{"name": "past", "action": "bypass"}]
    with everywhere(lab) as services, contextlib.ExitStack() as stack:
        flows = [stack.enter_context(lab.client.udp(far.address)) for network, far in services if network == "udp"]
        apply(lab, running, interception={"ruleset": ruleset}, rules=past)
        assert [echoed(flow, b"routed") for flow in flows] == [True] * 2
        apply(lab, running, interception={"ruleset": ruleset})
        assert [echoed(flow, b"two") for flow in flows] == [True] * 2
        ends = running.wait_flow_ends(2)
    assert [(end["bytes_up"], end["bytes_down"]) for end in ends] == [(3, 3)] * 2


def test_the_kernels_rules_need_no_daemon(lab: Gateway, daemon, ruleset: str) -> None:
    """Even where the gateway is to let everything else by."""
    lab.forwarding(True)
    running = daemon(
        interception={"ruleset": ruleset, "on_failure": "open"},
        rules=[{"name": "no", "match": {"destination": NINE}, "action": "reject"}],
    )
    running.kill_all()
    with everywhere(lab, 9) as refused, TcpService(lab.server, lab.server_address(4)) as far:
        eventually(lambda: answers(lab.client, "tcp", far.address), "others are routed", 10)
        found = [error_of(lab.client, n, each.address, QUIET_S) for n, each in refused]
        by_worker = None if ruleset == "iptables" else errno.ECONNREFUSED
        assert found == [errno.ECONNREFUSED, errno.ECONNREFUSED, by_worker, errno.ECONNREFUSED]


# The box's own traffic


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_rules_for_the_boxs_own_traffic(lab: Gateway, daemon, ruleset: str, on_failure: str) -> None:
    hosts = {host: [f"10.2.0.{host}", f"fd02::{host}"] for host in (7, 8, 9)}
    rules = [
        {"name": "past", "match": {"interface": "lo", "destination": hosts[7]}, "action": "bypass"},
        {"name": "no", "match": {"interface": ["lan0", "lo"], "destination": hosts[8]}, "action": "reject"},
        {"name": "hush", "match": {"destination": hosts[9]}, "action": "drop"},
        {"name": "clients", "match": {"interface": "lan0"}, "action": "drop"},
    ]
    interception = {"ruleset": ruleset, "own_traffic": True, "on_failure": on_failure}
    running = daemon(interception=interception, rules=rules)
    with everywhere(lab, 7) as past, everywhere(lab, 8) as refused, everywhere(lab, 9) as dropped:
        assert all(ask(lab.gateway, network, far.address) in far.peers for network, far in past)
        assert [error_of(lab.gateway, n, far.address) for n, far in refused] == [errno.ECONNREFUSED] * 4
        ends = [error_of(lab.gateway, n, far.address, QUIET_S) for n, far in dropped]
        assert ends == [None, None, errno.EPERM, errno.EPERM], "a datagram's sender is told that it can't"
        assert seen([*refused, *dropped]) == 0
    assert flows_taken(running.counters()) == 0
    with everywhere(lab, 2) as relayed:
        for network, far in relayed:
            ask(lab.gateway, network, far.address)
        assert not answers(lab.client, *("tcp", relayed[0][1].address), QUIET_S)
    assert flows_taken(running.counters()) == 4


# In a worker


BACKENDS = {"box": {"type": "direct", "source": "gateway"}}


def test_a_worker_carries_out_what_the_kernel_left_to_it(lab: Gateway, daemon, ruleset: str) -> None:
    """Such as when someone else's rules stand in the kernel: the handshake is over, so a drop is a reset there."""
    hosts = {host: [f"10.2.0.{host}", f"fd02::{host}"] for host in (7, 8, 9)}
    rules = [
        {"name": "past", "match": {"destination": hosts[7]}, "action": "bypass"},
        {"name": "no", "match": {"destination": hosts[8]}, "action": "reject"},
        {"name": "hush", "match": {"destination": hosts[9]}, "action": "drop"},
    ]
    running = daemon(interception={"ruleset": ruleset}, rules=rules, backends=BACKENDS, default="box")
    apply(lab, running, interception={"ruleset": ruleset}, backends=BACKENDS, default="box")
    with everywhere(lab, 7) as past, everywhere(lab, 8) as refused, everywhere(lab, 9) as dropped:
        assert all(ask(lab.client, network, far.address) in far.peers for network, far in past)
        ends = [error_of(lab.client, n, far.address, 1.0) for n, far in refused]
        assert ends == [errno.ECONNRESET, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNREFUSED]
        ends = [error_of(lab.client, n, far.address, QUIET_S) for n, far in dropped]
        assert ends == [errno.ECONNRESET, errno.ECONNRESET, None, None]
        assert seen([*refused, *dropped]) == 0
    with UdpService(lab.server, lab.server_address(4)) as far:
        ask(lab.client, "udp", far.address)
        assert far.peers[0][0] == lab.gateway_address(4, "server")
    ends = running.wait_flow_ends(9)
    found = sorted(
        {(end["rule"], end["backend"], end["cause"], end["phase"]) for end in ends if "tcp" in end["network"]}
    )
    assert found == [
        ("hush", "drop", "dropped", "accept"),
        ("no", "reject", "rejected", "accept"),
        ("past", "bypass", "done", "relay"),
    ]
    assert running.counters()["rules"] == {"past": 4, "no": 4, "hush": 4, "default": 1}


def test_a_worker_knows_the_interface(lab: Gateway, daemon, ruleset: str) -> None:
    rules = [
        {"name": "clients", "match": {"interface": "lan0"}, "backend": "box"},
        {"name": "own", "match": {"interface": "lo", "listener": "tproxy"}, "backend": "direct"},
    ]
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True}, rules=rules, backends=BACKENDS)
    with everywhere(lab) as services:
        for network, far in services:
            ask(lab.client, network, far.address)
            ask(lab.gateway, network, far.address)
    assert running.counters()["rules"] == {"clients": 4, "own": 4, "default": 0}


def test_rules_that_share_a_backend_are_told_apart_in_the_log(lab: Gateway, daemon) -> None:
    """UDP flows of a client port share a socket towards the servers, but not the rule."""
    running = daemon(rules=[{"name": "five", "match": {"port": 5000}, "backend": "direct"}])
    with (
        UdpService(lab.server, lab.server_address(4), 5000) as one,
        UdpService(lab.server, lab.server_address(4), 5001) as other,
    ):
        for far in (one, other):
            ask(lab.client, "udp", far.address, (lab.client_address(4), 4000))
    ends = running.wait_flow_ends(2)
    assert {(end["orig_dst"][-4:], end["rule"]) for end in ends} == {("5000", "five"), ("5001", "default")}


# Many of them


@pytest.mark.timeout(180)
def test_many_rules_and_prefixes(lab: Gateway, tmp_path: Path, ruleset: str) -> None:
    """100,000 prefixes, half of them in the kernel, and 300 rules behind those."""
    prefixes = [f"100.{64 + (n >> 15)}.{n >> 7 & 255}.{(n & 127) * 2}" for n in range(100_000)]
    rules = [
        {"name": "listed", "match": {"destination": [*prefixes[:50_000], *NINE]}, "action": "reject"},
        *({"name": f"r{n}", "match": {"network": "tcp", "port": 10_000 + n}, "action": "reject"} for n in range(300)),
        {"name": "counted", "match": {"destination": [*prefixes[50_000:], "10.2.0.7"]}, "backend": "direct"},
    ]
    text = json.dumps(config(interception={"ruleset": ruleset}, rules=rules))  # JSON is YAML
    running = Daemon(lab.gateway, tmp_path / "many", text, ready_s=90)
    with everywhere(lab) as refused, everywhere(lab, 7, 10_299) as last:
        assert [error_of(lab.client, n, far.address) for n, far in refused] == [errno.ECONNREFUSED] * 4
        assert error_of(lab.client, "tcp", last[0][1].address) == errno.ECONNREFUSED
        ask(lab.client, "udp", last[2][1].address)
    counted = running.counters()["rules"]
    running.stop()
    by_worker = {"listed": 1} if ruleset == "iptables" else {}
    assert {name: count for name, count in counted.items() if count} == {**by_worker, "counted": 1}
