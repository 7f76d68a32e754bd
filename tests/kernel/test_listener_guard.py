"""The listener's port is no door: whoever knocks there is refused, and nothing loops."""

from pathlib import Path

import pytest

from tests.lab import Daemon, Gateway, ask, eventually

PORT = 7440
KNOCKS = 300
FAMILIES = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def open_files(running: Daemon) -> int:
    (worker,) = running.worker_pids()
    return len(list(Path(f"/proc/{worker}/fd").iterdir()))


@FAMILIES
@pytest.mark.parametrize("network", ["tcp", "udp"])
@pytest.mark.parametrize("own_traffic", [False, True], ids=["", "own_traffic"])
def test_the_port_is_closed_on_every_address_of_the_box(
    lab: Gateway, daemon, ruleset: str, version: int, network: str, own_traffic: bool
) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": own_traffic})
    knocks = [(lab.client, "client"), (lab.client, "server"), (lab.server, "server"), (lab.gateway, "client")]
    for namespace, side in knocks:
        with pytest.raises(ConnectionRefusedError):
            ask(namespace, network, (lab.gateway_address(version, side), PORT))
    counters = running.counters()
    assert counters["tcp_flows"] == counters["udp_flows"] == counters["refused_loop"] == 0


@FAMILIES
@pytest.mark.parametrize("own_traffic", [False, True], ids=["", "own_traffic"])
def test_connecting_to_the_listener_itself_is_reset_not_looped(
    lab: Gateway, daemon, ruleset: str, version: int, own_traffic: bool
) -> None:
    running = daemon(interception={"ruleset": ruleset, "own_traffic": own_traffic})
    before = open_files(running)
    for _ in range(KNOCKS):
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            ask(lab.gateway, "tcp", (LOOPBACK[version], PORT))
    counters = running.counters()
    assert counters["refused_loop"] == KNOCKS
    assert counters["tcp_flows"] == counters["flows"] == 0
    assert {end["cause"] for end in running.flow_ends()} == {"loop"}
    eventually(lambda: open_files(running) == before, "no file stays open")


@FAMILIES
def test_datagrams_to_the_listener_itself_are_dropped(lab: Gateway, daemon, ruleset: str, version: int) -> None:
    running = daemon(interception={"ruleset": ruleset})
    before = open_files(running)
    with lab.gateway.udp((LOOPBACK[version], PORT), timeout_s=0.1) as knocking:
        for _ in range(KNOCKS):
            knocking.send(b"who is there?")
        with pytest.raises(TimeoutError):
            knocking.recv(16)
    counters = running.counters()
    assert counters["refused_loop"] == KNOCKS
    assert counters["udp_flows"] == counters["flows"] == 0
    assert open_files(running) == before


@FAMILIES
def test_a_server_that_is_a_loopback_address_is_not_reached_from_outside(
    lab: Gateway, daemon, ruleset: str, version: int
) -> None:
    daemon(interception={"ruleset": ruleset})
    lab.client.ip(f"route add {LOOPBACK[4]}/32 via 10.1.0.1\n" if version == 4 else "route add ::1/128 via fd01::1\n")
    with pytest.raises(OSError, match=r"timed out|refused|reset"):
        ask(lab.client, "tcp", (LOOPBACK[version], PORT), timeout_s=0.3)
