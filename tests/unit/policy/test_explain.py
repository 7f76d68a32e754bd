"""What `tproxyd explain` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tproxyd.cli import main
from tproxyd.flow import Endpoint
from tproxyd.policy.explain import parse_end

CONFIG = """\
interception:
  interfaces: [lan0, guests]
  ruleset: nftables
  tcp_ports: [1-1023, 8080]
  own_traffic: true
  exclude: {destinations: [192.0.2.0/24]}
rules:
  - {name: past, match: {destination: 198.51.100.0/24}, action: bypass}
  - {name: quic, match: {network: udp, port: 443}, action: reject}
  - {name: dns, match: {network: udp, port: 53}, backend: direct}
  - {name: guest, match: {interface: guests, port: 80}, action: reject}
  - {name: low, match: {source_port: 1-1023, port: 25}, action: drop}
"""


@pytest.fixture
def explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(arguments: str, text: str = CONFIG) -> list[str]:
        path = tmp_path / "tproxyd.yaml"
        path.write_text(text)
        assert main(["explain", "-c", str(path), *arguments.split()]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_each_rule_says_why_it_does_not_take_the_flow(explained) -> None:
    assert explained("10.0.0.5:40000 203.0.113.7:80 --interface lan0") == [
        "flow: tcp 10.0.0.5:40000 to 203.0.113.7:80, in by lan0, listener tproxy",
        "rule past: no, not for destination 203.0.113.7",
        "rule quic: no, not for network tcp",
        "rule dns: no, not for network tcp",
        "rule guest: no, not for interface lan0",
        "rule low: no, not for source_port 40000",
        "no rule takes it: default",
        "outcome: backend direct",
        "layer: splice",
    ]


@pytest.mark.parametrize(
    ("arguments", "outcome", "layer"),
    [
        ("10.0.0.5 198.51.100.9:80", "bypass: routed by the kernel", "kernel"),
        ("[2001:db8::1] [2001:db8::2]:443 --network udp", "reject: ICMP port unreachable from the kernel", "kernel"),
        ("10.0.0.5 203.0.113.7:443 --network udp", "reject: ICMP port unreachable from the kernel", "kernel"),
        (
            "10.0.0.5 203.0.113.7:443 --network udp --interface lo",
            "reject: ICMP port unreachable from a worker",
            "copy",
        ),
        (
            "10.0.0.5 203.0.113.7:53 --network udp",
            "backend direct; the kernel forwards it after its first datagrams, if the box forwards",
            "learned",
        ),
        ("10.0.0.5 203.0.113.7:80 --interface guests", "reject: a TCP reset from the kernel", "kernel"),
        ("10.0.0.5:7 203.0.113.7:25", "drop: no answer", "kernel"),
    ],
)
def test_the_outcome_and_where_it_runs(explained, arguments: str, outcome: str, layer: str) -> None:
    assert explained(arguments)[-2:] == [f"outcome: {outcome}", f"layer: {layer}"]


def test_under_iptables_a_worker_refuses_udp_over_ipv4(explained) -> None:
    text = CONFIG.replace("nftables", "iptables")
    assert "from a worker" in explained("10.0.0.5 203.0.113.7:443 --network udp", text)[-2]
    assert "from the kernel" in explained("2001:db8::1 [2001:db8::2]:443 --network udp", text)[-2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("10.0.0.5 192.0.2.9:80", "its destination is in 192.0.2.0/24, which is excluded"),
        ("169.254.1.1 203.0.113.7:80", "its source is in 169.254.0.0/16, which is excluded"),
        ("10.0.0.5 203.0.113.7:2000", "tcp port 2000 over IPv4 is not among those intercepted"),
        ("10.0.0.5 203.0.113.7:80 --interface wan0", "wan0 is no client-side interface"),
        ("10.0.0.5 127.0.0.1:80", "127.0.0.1 is an address of this box"),
    ],
)
def test_what_is_not_intercepted_meets_no_rule(explained, arguments: str, why: str) -> None:
    lines = explained(arguments)
    assert lines[1:] == [f"not intercepted: {why}", "outcome: not intercepted", "layer: kernel"]


def test_json_has_it_all(explained) -> None:
    found = json.loads("".join(explained("10.0.0.5 203.0.113.7:443 --network udp --json")))
    assert found["rules"] == [
        {"name": "past", "takes": False, "failing": "destination"},
        {"name": "quic", "takes": True, "failing": None},
    ]
    assert (found["rule"], found["action"], found["backend"], found["layer"]) == ("quic", "reject", None, "kernel")
    assert (found["source"], found["destination"], found["interface"]) == ("10.0.0.5", "203.0.113.7:443", None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("10.0.0.5 203.0.113.7:80", "rule guest asks for the interface: say --interface NAME"),
        ("10.0.0.5 203.0.113.7:25 --interface lan0", "rule low asks for the source port: write SOURCE as ADDRESS:PORT"),
        ("10.0.0.5 203.0.113.7", "has no port"),
        ("10.0.0.5 [2001:db8::2]:80", "different address families"),
        ("10.0.0.5 203.0.113.7:80 --listener x", "there is no listener x: tproxy"),
        ("here 203.0.113.7:80", "does not appear to be an IPv4 or IPv6 address"),
        ("10.0.0.5:0 203.0.113.7:80", "has no port from 1 to 65535"),
    ],
)
def test_what_is_not_said_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, error: str
) -> None:
    path = tmp_path / "tproxyd.yaml"
    path.write_text(CONFIG)
    with pytest.raises(SystemExit) as caught:
        main(["explain", "-c", str(path), *arguments.split()])
    assert caught.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("10.0.0.1", Endpoint("10.0.0.1", 0)),
        ("10.0.0.1:80", Endpoint("10.0.0.1", 80)),
        ("2001:DB8::0:1", Endpoint("2001:db8::1", 0)),
        ("[2001:db8::1]", Endpoint("2001:db8::1", 0)),
        ("[2001:db8::1]:80", Endpoint("2001:db8::1", 80)),
    ],
)
def test_ends_are_written_as_in_a_url(text: str, end: Endpoint) -> None:
    assert parse_end(text) == end


def test_udp_that_the_kernel_can_not_learn_is_copied_and_some_ways_carry_none(explained) -> None:
    backends = (
        "backends:\n  corp: {type: socks5, server: 'x:1'}\n  web: {type: http_connect, server: 'x:1', via: corp}\n"
        "  own: {type: direct, source: gateway}\n"
    )
    flow = "10.0.0.5 203.0.113.7:99 --network udp"
    for backend, outcome in (
        ("corp", "backend corp"),
        ("own", "backend own"),
        ("web", "backend web, which carries no UDP: ICMP administratively prohibited from a worker"),
    ):
        text = f"interception: {{interfaces: [lan0]}}\n{backends}default: {backend}\n"
        assert explained(flow, text)[-2:] == [f"outcome: {outcome}", "layer: copy"]
