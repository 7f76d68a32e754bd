"""A gateway with one interface: clients and servers stand on the same side, and only marks tell them apart."""

from __future__ import annotations

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Gateway, TcpService, UdpService

pytestmark = pytest.mark.one_armed


@pytest.mark.parametrize("ruleset", ["nftables", "iptables"])
@pytest.mark.parametrize("on_failure", ["closed", "open"])
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_both_ends_see_the_four_tuple_through_one_interface(
    lab: Gateway, daemon: DaemonFactory, version: int, on_failure: str, ruleset: str
) -> None:
    running = daemon(interception={"ruleset": ruleset, "on_failure": on_failure})
    source = (lab.client_address(version), 0)
    with TcpService(lab.server, lab.server_address(version)) as tcp, lab.client.tcp(tcp.address, source) as client:
        for _ in range(3):
            client.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(client.recv(left))
        assert tcp.peers == [client.getsockname()[:2]]
    with UdpService(lab.server, lab.server_address(version)) as udp, lab.client.udp(udp.address, source) as client:
        for size in (1, 0, 9000):
            client.send(bytes(size))
            assert client.recv(1 << 16) == bytes(size)
        assert udp.peers == [client.getsockname()[:2]] * 3
    counters = running.counters()
    assert (counters["tcp_flows"], counters["udp_flows"]) == (1, 1)
