"""own_traffic: the box's own connections go through the daemon, too, and nothing goes round in circles."""

import pytest

from tests.lab import Gateway, answers, ask, eventually, service
from tproxyd.flow import Endpoint

NETWORKS = pytest.mark.parametrize("network", ["tcp", "udp"])
FAMILIES = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
LEASE_S = 5


@NETWORKS
@FAMILIES
@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_own_flows_are_relayed_once(
    lab: Gateway, daemon, ruleset: str, version: int, network: str, on_failure: str
) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True, "on_failure": on_failure})
    with service(lab.server, network, lab.server_address(version)) as far:
        asked = [ask(lab.gateway, network, far.address) for _ in range(3)]
        ends = running.wait_flow_ends(3)
        assert [address for address, _ in far.peers] == [lab.gateway_address(version, "server")] * 3
    assert {each["client"] for each in ends} == {str(Endpoint(*each)) for each in asked}
    assert {each["source"] for each in ends} == {str(Endpoint(*each)) for each in far.peers}
    counters = running.counters()
    assert counters[f"{network}_flows"] == 3
    assert counters["refused_loop"] == 0


@NETWORKS
@FAMILIES
def test_clients_are_still_relayed(lab: Gateway, daemon, ruleset: str, version: int, network: str) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True})
    with service(lab.server, network, lab.server_address(version)) as far:
        assert ask(lab.client, network, far.address) in far.peers
        running.wait_flow_ends(1)
    assert running.counters()[f"{network}_flows"] == 1


@NETWORKS
@FAMILIES
def test_answers_of_own_services_are_not_intercepted(
    lab: Gateway, daemon, ruleset: str, version: int, network: str
) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True})
    for namespace, side in ((lab.client, "client"), (lab.server, "server")):
        with service(lab.gateway, network, lab.gateway_address(version, side)) as own:
            assert ask(namespace, network, own.address) in own.peers
    assert running.counters()[f"{network}_flows"] == 0


@NETWORKS
@FAMILIES
def test_the_box_talks_to_itself_directly(lab: Gateway, daemon, ruleset: str, version: int, network: str) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True})
    for address in ({4: "127.0.0.1", 6: "::1"}[version], lab.gateway_address(version, "server")):
        with service(lab.gateway, network, address) as own:
            assert ask(lab.gateway, network, own.address) in own.peers
    assert running.counters()[f"{network}_flows"] == 0


def test_excluded_destinations_are_reached_directly(lab: Gateway, daemon, ruleset: str) -> None:
    excluded = {"destinations": ["10.2.0.9", "fd02::9"]}
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True, "exclude": excluded})
    for version in (4, 6):
        for network in ("tcp", "udp"):
            with service(lab.server, network, lab.server_address(version, 9)) as far:
                assert ask(lab.gateway, network, far.address) in far.peers
    counters = running.counters()
    assert counters["tcp_flows"] == counters["udp_flows"] == 0


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_own_flows_stop_or_pass_when_everything_is_killed(lab: Gateway, daemon, ruleset: str, on_failure: str) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": True, "on_failure": on_failure})
    kinds = [(network, version) for network in ("tcp", "udp") for version in (4, 6)]
    services = [(network, service(lab.server, network, lab.server_address(version))) for network, version in kinds]

    def reachable() -> list[bool]:
        return [answers(lab.gateway, network, far.address) for network, far in services]

    assert reachable() == [True] * 4
    assert len(running.wait_flow_ends(2)) >= 2
    before = sum(len(far.peers) for _, far in services)
    running.kill_all()
    if on_failure == "closed":
        assert reachable() == [False] * 4
        assert sum(len(far.peers) for _, far in services) == before
    else:
        eventually(lambda: reachable() == [True] * 4, "own flows pass", LEASE_S + 3)
    for _, far in services:
        far.close()


def test_without_it_own_flows_go_their_own_way(lab: Gateway, daemon, ruleset: str) -> None:
    running = daemon(interception={"ruleset": ruleset})
    with service(lab.server, "tcp", lab.server_address(4)) as far:
        assert ask(lab.gateway, "tcp", far.address) in far.peers
    assert running.counters()["tcp_flows"] == 0
