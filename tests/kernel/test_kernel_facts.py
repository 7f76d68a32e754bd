"""What tproxyd relies on in the kernel, seen in this kernel (kernel-facts.md), and what it does about it."""

import os
import re
import socket
import threading

import pytest

from tests.lab import Gateway, TcpService, ask, service
from tproxyd.config import load_config
from tproxyd.netfilter import nft
from tproxyd.netfilter.plan import plan

SIZE = 8 << 20
INVALID = """
table inet watch {
    chain before {
        type filter hook prerouting priority filter
        ct state invalid counter drop
        iifname lan0 meta l4proto tcp ct state untracked counter
        iifname lan0 meta l4proto tcp ct state != untracked counter
    }
    chain in {
        type filter hook input priority filter
        ct state invalid counter drop
    }
    chain out {
        type filter hook output priority filter
        ct state invalid counter drop
    }
}
"""
FAMILIES = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def counters(lab: Gateway) -> list[int]:
    """Packets: invalid before routing, untracked and tracked from the client, invalid in, invalid out."""
    listing = lab.gateway.run(["nft", "list", "table", "inet", "watch"]).stdout
    return [int(count) for count in re.findall(r"counter packets (\d+)", listing)]


def transfer(lab: Gateway, version: int) -> None:
    """Echo 8 MiB."""
    data = os.urandom(1 << 16) * (SIZE >> 16)
    with TcpService(lab.server, lab.server_address(version)) as far, lab.client.tcp(far.address, timeout_s=20) as flow:
        sender = threading.Thread(target=flow.sendall, args=(data,))
        sender.start()
        got = bytearray()
        while len(got) < SIZE and (piece := flow.recv(1 << 18)):
            got += piece
        sender.join()
        assert got == data
        assert far.peers == [flow.getsockname()[:2]]


@FAMILIES
def test_one_four_tuple_twice_leaves_no_invalid_packet(lab: Gateway, daemon, ruleset: str, version: int) -> None:
    lab.gateway.nft(INVALID)
    daemon(interception={"ruleset": ruleset})
    transfer(lab, version)
    invalid_before, untracked, tracked, invalid_in, invalid_out = counters(lab)
    assert (invalid_before, invalid_in, invalid_out, tracked) == (0, 0, 0, 0)
    assert untracked > 100
    lab.gateway.nft("delete table inet watch")


def test_without_notrack_packets_become_invalid(lab: Gateway, daemon) -> None:
    """The test above can fail: the same rules without `notrack`."""
    lab.gateway.nft(INVALID.replace("invalid counter drop", "invalid counter"))
    running = daemon()
    lab.gateway.nft(nft.render(plan(load_config(running.path))).replace("notrack", ""))
    invalid = 0
    for _ in range(20):  # which packets conntrack takes for invalid depends on how the two connections interleave
        transfer(lab, 4)
        invalid_before, untracked, tracked, invalid_in, invalid_out = counters(lab)
        assert untracked == 0
        assert tracked > 100
        if invalid := invalid_before + invalid_in + invalid_out:
            break
    lab.gateway.nft("delete table inet watch")
    assert invalid


TPROXY = """
table inet fact {{
    chain before {{
        type filter hook prerouting priority mangle
        {first}
        iifname lan0 meta nfproto ipv4 tcp dport 80 tproxy ip to 127.0.0.1:7000 meta mark set 1 accept
        iifname lan0 meta nfproto ipv6 tcp dport 80 tproxy ip6 to [::1]:7000 meta mark set 1 accept
    }}
}}
"""
ROUTING = """
rule add fwmark 1 lookup 77 priority 77
route add local default dev lo table 77
"""


@FAMILIES
def test_tproxy_without_a_listener_falls_through(lab: Gateway, version: int) -> None:
    """Why `on_failure: closed` needs a drop after it."""
    lab.forwarding(True)
    lab.gateway.nft(TPROXY.format(first=""))
    with service(lab.server, "tcp", lab.server_address(version), 80) as far:
        assert ask(lab.client, "tcp", far.address) in far.peers
    lab.gateway.nft("delete table inet fact")


@pytest.fixture
def listener(lab: Gateway):
    """A transparent listener on all addresses, and rules that lead port 80 to it."""
    lab.gateway.ip(ROUTING)
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
        made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
        made.bind(("0.0.0.0", 7000))
        made.listen()
        yield made
    lab.gateway.nft("delete table inet fact")
    lab.gateway.ip(ROUTING.replace("add", "del"))


def test_the_original_destination_is_the_name_of_the_socket(lab: Gateway, listener: socket.socket) -> None:
    lab.gateway.nft(TPROXY.format(first=""))
    with lab.client.tcp(("10.2.0.77", 80)), listener.accept()[0] as accepted:
        assert accepted.getsockname() == ("10.2.0.77", 80)


def test_socket_transparent_matches_the_listener_unless_wildcards_are_left_out(
    lab: Gateway, listener: socket.socket
) -> None:
    """Why the rules pass over `socket wildcard 1`: a new flow must not be taken for a running one."""
    first = (
        "tcp dport 7000 socket transparent 1 counter\n tcp dport 7000 socket transparent 1 socket wildcard 0 counter"
    )
    lab.gateway.nft(TPROXY.format(first=first))
    with lab.client.tcp(("10.1.0.1", 7000)), listener.accept()[0]:
        listing = lab.gateway.run(["nft", "list", "table", "inet", "fact"]).stdout
    loose, strict = re.findall(r"counter packets (\d+)", listing)
    assert int(loose) > int(strict)  # the SYN is counted by the first alone
