"""The rules of the configuration."""

from __future__ import annotations

import pytest

from tproxyd.config import Config, parse_config, policy_rules
from tproxyd.errors import ConfigError
from tproxyd.flow import Action, Decision, Network
from tproxyd.policy import Match

HEAD = """\
interception: {interfaces: [lan0, guests]}
backends: {box: {type: direct, source: gateway}}
rules:
"""


def config_of(rules: str) -> Config:
    return parse_config((HEAD + rules).encode(), "x")


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text.encode(), "x")
    return [line.removeprefix("x:") for line in caught.value.problems]


def test_one_value_needs_no_list() -> None:
    one = config_of("  - {name: a, match: {network: udp, port: 53, source: 10.0.0.1, interface: lan0}, backend: box}\n")
    listed = config_of(
        "  - {name: a, match: {network: [udp], port: [53], source: [10.0.0.1], interface: [lan0]}, backend: box}\n"
    )
    assert one == listed


def test_rules_become_the_policys() -> None:
    config = config_of(
        "  - name: a\n"
        "    match: {network: [tcp, udp], source_port: 1-9, port: [80-90, 81], listener: tproxy,\n"
        "            destination: 192.0.2.0/24}\n"
        "    backend: box\n"
        "  - {name: b, action: reject}\n"
    )
    first, second = policy_rules(config.rules)
    assert first.decision == Decision("a", "box")
    assert (first.match.networks, first.match.listeners) == ((Network.TCP, Network.UDP), ("tproxy",))
    assert (first.match.source_ports, first.match.ports) == (((1, 9),), ((80, 90),))
    assert [str(prefix) for prefix in first.match.destinations] == ["192.0.2.0/24"]
    assert (second.match, second.decision) == (Match(), Decision("b", "reject", Action.REJECT))


def test_what_is_written_out_is_read_back() -> None:
    config = config_of(
        "  - {name: a, match: {network: tcp, source: [10.0.0.0/8, fd00::/8], port: 1-9}, action: bypass}\n"
        "  - {name: b, backend: box}\n"
    )
    assert parse_config(config.model_dump_json().encode(), "x") == config


def test_the_boxs_own_traffic_comes_in_by_lo_where_it_is_intercepted() -> None:
    rule = "rules: [{name: a, match: {interface: lo}, action: drop}]\n"
    assert problems_of(f"interception: {{interfaces: [lan0]}}\n{rule}") == [
        '2:38: rules[0].match.interface: "lo" is no client-side interface of this configuration; write lan0'
    ]
    assert parse_config(f"interception: {{interfaces: [lan0], own_traffic: true}}\n{rule}".encode(), "x").rules


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ("  - {action: drop}", "4:5: rules[0].name: missing; write name: web"),
        (
            "  - {name: a}",
            (
                "4:5: rules[0]: a rule needs a backend or an action; "
                "write backend: direct or action: bypass, reject or drop"
            ),
        ),
        (
            "  - {name: a, backend: box, action: drop}",
            "4:5: rules[0]: a rule has a backend or an action, not both; remove one",
        ),
        ("  - {name: a, backend: nope}", '4:24: rules[0].backend: there is no backend "nope"; write direct or box'),
        ("  - {name: a, backend: drop}", '4:24: rules[0].backend: there is no backend "drop"; write action: drop'),
        ("  - {name: a, action: deny}", '4:23: rules[0].action: expected bypass, reject or drop, found "deny"'),
        (
            "  - {name: default, action: drop}",
            '4:12: rules[0].name: "default" is what logs call flows that no rule takes; take another name',
        ),
        (
            "  - {name: a, match: {port: 1}, action: drop}\n  - {name: a, action: drop}",
            '5:12: rules[1].name: "a" names another rule, too; give each its own name',
        ),
        (
            "  - {name: a, match: {}, action: drop}\n  - {name: b, match: {port: 1}, backend: box}",
            '5:5: rules[1]: never asked: "a" before it takes everything; put that one last',
        ),
        (
            "  - {name: a, match: {port: []}, action: drop}",
            "4:29: rules[0].match.port: the list is empty; leave the key out to take any",
        ),
        (
            "  - {name: a, match: {port: [80, 0]}, action: drop}",
            "4:34: rules[0].match.port[1]: 0 is no port; allowed is 1 to 65535",
        ),
        (
            "  - {name: a, match: {port: 80:90}, action: drop}",
            '4:29: rules[0].match.port: "80:90" is no port or range of ports; write 80-90',
        ),
        (
            "  - {name: a, match: {source: 10.0.0.1/8}, action: drop}",
            '4:31: rules[0].match.source: "10.0.0.1/8" has bits set past its length; write 10.0.0.0/8',
        ),
        (
            "  - {name: a, match: {source: 10.0.0.0/8, destination: fd00::/8}, action: drop}",
            "4:22: rules[0].match: no flow has a source and a destination of different families; mend one of them",
        ),
        (
            "  - {name: a, match: {interface: [lan0, wan0]}, action: drop}",
            (
                '4:41: rules[0].match.interface[1]: "wan0" is no client-side interface of this configuration; '
                "write lan0 or guests"
            ),
        ),
        (
            "  - {name: a, match: {listener: web}, action: drop}",
            '4:33: rules[0].match.listener: "web" is no listener of this configuration; write tproxy',
        ),
        (
            "  - {name: a, match: {network: icmp}, action: drop}",
            '4:32: rules[0].match.network: expected tcp or udp, found "icmp"',
        ),
        (
            "  - {name: a, match: {ports: 80}, action: drop}",
            "4:23: rules[0].match.ports: unknown key; did you mean port?",
        ),
        (
            "  - {name: a, match: {domain: x.org}, action: drop}",
            "4:23: rules[0].match.domain: not in this version; remove it",
        ),
    ],
)
def test_each_key_refuses_what_it_can_not_hold(rules: str, problem: str) -> None:
    assert problems_of(HEAD + rules) == [problem]


def test_the_names_of_actions_are_no_backends() -> None:
    head = "interception: {interfaces: [lan0]}\n"
    assert problems_of(head + "backends: {drop: {type: direct}}") == [
        '2:12: backends.drop: "drop" is what a rule\'s action is called; take another name'
    ]
    (problem,) = problems_of(head + "default: reject")
    assert "write a last rule without a match: {name: rest, action: reject}" in problem


def test_more_rules_than_can_be_counted_are_refused() -> None:
    rules = "".join(f"  - {{name: r{number}, match: {{port: 1}}, action: drop}}\n" for number in range(10_001))
    (problem,) = problems_of(HEAD + rules)
    assert "10001 rules; the most is 10000" in problem
