"""The laboratory itself: what every other kernel test relies on."""

import socket

import pytest

from tests.lab import Gateway, Residue, TcpService, UdpService


@pytest.mark.parametrize("version", [4, 6])
def test_gateway_forwards_only_when_told_to(lab: Gateway, version: int) -> None:
    with TcpService(lab.server, lab.server_address(version)) as service:
        with pytest.raises(OSError, match=r"timed out|unreachable"):
            lab.client.tcp(service.address, timeout_s=0.2)
        lab.forwarding(True)
        with lab.client.tcp(service.address, (lab.client_address(version, 3), 0)) as connection:
            connection.sendall(b"hello")
            assert connection.recv(10) == b"hello"
            assert service.peers == [connection.getsockname()[:2]]


@pytest.mark.parametrize("version", [4, 6])
def test_daemon_relays_and_tells_of_it(lab: Gateway, daemon, version: int) -> None:
    running = daemon()
    with TcpService(lab.server, lab.server_address(version)) as service:
        with lab.client.tcp(service.address) as connection:
            connection.sendall(b"hello")
            assert connection.recv(10) == b"hello"
            source = connection.getsockname()[:2]
        (end,) = running.wait_flow_ends(1)
    assert service.peers == [source]
    assert (end["network"], end["bytes_up"], end["bytes_down"], end["cause"]) == ("tcp", 5, 5, "done")
    assert running.counters()["tcp_flows"] == 1
    assert len(running.worker_pids()) == 1


def test_daemon_relays_datagrams(lab: Gateway, daemon) -> None:
    daemon()
    with UdpService(lab.server, lab.server_address(4)) as service, lab.client.udp(service.address) as asking:
        asking.send(b"ping")
        assert asking.recv(10) == b"ping"
        assert service.peers == [asking.getsockname()]


def test_residue_sees_what_is_left_behind(lab: Gateway) -> None:
    before = Residue.of(lab.gateway)
    assert not before.difference(Residue.of(lab.gateway))
    lab.gateway.nft("add table inet left")
    lab.gateway.ip("rule add fwmark 9 lookup 99 priority 99\nroute add local default dev lo table 99")
    lab.gateway.run(["iptables-legacy", "-t", "mangle", "-N", "LEFT"])
    lab.gateway.run(["ipset", "create", "left", "hash:net"])
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 999))
        found = before.difference(Residue.of(lab.gateway))
    for part in ("table inet left", "fwmark 0x9", "table 99", ":LEFT", "create left", "udp 127.0.0.1 port 999"):
        assert part in found, found
    lab.gateway.nft("delete table inet left")
    lab.gateway.ip("rule del priority 99\nroute del local default dev lo table 99")
    lab.gateway.run(["iptables-legacy", "-t", "mangle", "-X", "LEFT"])
    lab.gateway.run(["ipset", "destroy", "left"])


@pytest.mark.one_armed
def test_one_armed_gateway_has_both_ends_behind_lan0(lab: Gateway) -> None:
    lab.forwarding(True)
    with TcpService(lab.server, lab.server_address(4)) as service, lab.client.tcp(service.address) as connection:
        connection.sendall(b"hello")
        assert connection.recv(10) == b"hello"
