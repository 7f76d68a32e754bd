"""on_failure: what clients get while no worker serves; the same with both rulesets."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.lab import Gateway, TcpService, UdpService, answers, ask, cli, eventually, service, write_config
from tests.lab.namespace import Namespace

LEASE_S = 5
KINDS = [(network, version) for network in ("tcp", "udp") for version in (4, 6)]

Services = list[tuple[str, TcpService | UdpService]]


@contextmanager
def everywhere(lab: Gateway) -> Iterator[Services]:
    """A service of each transport and family on the server."""
    with ExitStack() as stack:
        yield [(n, stack.enter_context(service(lab.server, n, lab.server_address(v)))) for n, v in KINDS]


def reachable(namespace: Namespace, services: Services) -> list[bool]:
    return [answers(namespace, network, each.address) for network, each in services]


def seen(services: Services) -> int:
    return sum(len(each.peers) for _, each in services)


def test_closed_stays_closed_when_everything_is_killed(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset, "on_failure": "closed"})
    with everywhere(lab) as services:
        assert reachable(lab.client, services) == [True] * 4
        eventually(lambda: len(running.flow_ends()) >= 2, "the TCP flows went through the daemon")
        before = seen(services)
        running.kill_all()
        assert reachable(lab.client, services) == [False] * 4
        assert seen(services) == before, "something reached the server"


def test_open_lets_flows_pass_when_everything_is_killed(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset, "on_failure": "open"})
    with everywhere(lab) as services:
        assert reachable(lab.client, services) == [True] * 4
        assert len(running.wait_flow_ends(2)) >= 2, "the flows went through the daemon"
        running.kill_all()
        eventually(lambda: reachable(lab.client, services) == [True] * 4, "flows are routed", LEASE_S + 3)
        assert cli(lab.gateway, "apply-rules", "-c", running.path).stdout == "nothing to change\n"
        asked = ask(lab.client, "tcp", services[0][1].address)
        assert services[0][1].peers[-1] == asked


def test_a_waiting_syn_passes_once_the_lease_is_over(lab: Gateway, daemon, ruleset: str) -> None:
    """A client that asks right after the kill is answered within lease and SYN retransmission."""
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset, "on_failure": "open"})
    with TcpService(lab.server, lab.server_address(4)) as far:
        running.kill_all()
        assert ask(lab.client, "tcp", far.address, timeout_s=LEASE_S + 5) in far.peers


def test_open_and_stopped_in_order_is_open_at_once(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset, "on_failure": "open"})
    with everywhere(lab) as services:
        running.stop()
        assert reachable(lab.client, services) == [True] * 4


def test_open_opens_when_workers_hang_and_closes_again(lab: Gateway, daemon, ruleset: str) -> None:
    lab.forwarding(True)
    running = daemon(interception={"ruleset": ruleset, "on_failure": "open"})
    (worker,) = running.worker_pids()
    with TcpService(lab.server, lab.server_address(4)) as far:
        os.kill(worker, signal.SIGSTOP)
        try:
            eventually(lambda: answers(lab.client, "tcp", far.address), "flows are routed", 2 * LEASE_S + 3)
        finally:
            os.kill(worker, signal.SIGCONT)
        ends = len(running.flow_ends())
        eventually(
            lambda: answers(lab.client, "tcp", far.address) and len(running.flow_ends()) > ends + 1,
            "flows are relayed again",
        )


def test_rules_without_a_daemon_are_closed_or_open_from_the_start(lab: Gateway, tmp_path, ruleset: str) -> None:
    lab.forwarding(True)
    with everywhere(lab) as services:
        for on_failure, expected in (("closed", False), ("open", True)):
            path = write_config(tmp_path, interception={"ruleset": ruleset, "on_failure": on_failure})
            assert cli(lab.gateway, "apply-rules", "-c", path).returncode == 0
            assert reachable(lab.client, services) == [expected] * 4
    cli(lab.gateway, "remove-rules")


@pytest.mark.parametrize("on_failure", ["closed", "open"])
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_running_flows_are_reset_and_do_not_look_complete(
    lab: Gateway, daemon, ruleset: str, on_failure: str, version: int
) -> None:
    running = daemon(interception={"ruleset": ruleset, "on_failure": on_failure})
    ends = []

    def until_cut(connection: socket.socket) -> None:
        try:
            while data := connection.recv(100):
                connection.sendall(data)
            ends.append("end")
        except ConnectionResetError:
            ends.append("reset")

    with TcpService(lab.server, lab.server_address(version), 80, until_cut) as far, lab.client.tcp(far.address) as flow:
        flow.sendall(b"x")
        assert flow.recv(10) == b"x"
        running.kill_all()
        with pytest.raises(ConnectionResetError):
            flow.recv(10)
        eventually(lambda: ends, "the server learns of it")
    assert ends == ["reset"]
