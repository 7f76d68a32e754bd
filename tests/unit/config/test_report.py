from __future__ import annotations

import pytest

from tproxyd.config import parse_config
from tproxyd.errors import ConfigError


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text.encode(), "x")
    return caught.value.problems


def test_everything_wrong_is_reported_in_one_go_in_the_order_of_the_file():
    text = """\
interception:
  interfaces: [lo, eth0]
  ruleset: nft
  exclude:
    destination: [10.0.0.0/8]
    sources: [10.0.0.1/8, fe80::1%eth0]
  mark: 0x4
  mark: 0x8/0x8
  server_mark: 0x2/0x2
listeners:
  - {name: LAN, type: tproxy, port: 70000}
backends:
  corp: {type: tunnel, node: office}
control: {}
timeouts: {connect: 5, udp_idle: &x 1h}
limits: {max_flows: 5, max_flows_per_client: 6}
workers: none
"""
    assert problems_of(text) == [
        (
            'x:2:16: interception.interfaces[0]: "lo" is not client-side; '
            "to intercept the box's own traffic set own_traffic: true"
        ),
        'x:3:12: interception.ruleset: expected nftables or iptables, found "nft"',
        "x:5:5: interception.exclude.destination: unknown key; did you mean destinations?",
        'x:6:15: interception.exclude.sources[0]: "10.0.0.1/8" has bits set past its length; write 10.0.0.0/8',
        (
            'x:6:27: interception.exclude.sources[1]: "fe80::1%eth0" has a zone id, which a prefix can\'t have; '
            "leave out the % and what follows it"
        ),
        "x:7:9: interception.mark: mark 0x4 has no mask; write 0x4/0x4",
        'x:8:3: key "mark" is there twice, first at 7:3; remove one',
        (
            "x:9:16: interception.server_mark: server_mark 0x2/0x2 and client_mark 0x2/0x2 share bits of their masks; "
            "give each mark bits of its own"
        ),
        (
            'x:11:12: listeners[0].name: "LAN" is no name; use 1 to 63 of a-z, 0-9, _ and -, '
            "beginning with a letter or digit"
        ),
        "x:11:37: listeners[0].port: 70000 is too large; the most is 65535",
        'x:13:16: backends.corp.type: type "tunnel" is not in this version; write direct, socks5 or http_connect',
        "x:14:1: control: not in this version; remove it",
        "x:15:21: timeouts.connect: 5 has no unit; write such as 5s",
        "x:15:34: anchors (&name) are not used here; remove it",
        "x:16:46: limits.max_flows_per_client: 6 is more than max_flows (5); lower it or raise max_flows",
        'x:17:10: workers: expected auto or a number from 1 to 256, found "none"',
    ]


def test_a_missing_key_points_at_the_mapping_that_lacks_it():
    assert problems_of("# x\nworkers: 1\n") == [
        "x:2:1: interception: missing; write interception: {interfaces: [lan0]}"
    ]
    assert problems_of("interception:\n  ruleset: nftables\n") == [
        "x:2:3: interception.interfaces: missing; write interfaces: [lan0]"
    ]


def test_a_required_key_without_a_value_is_told_what_to_hold():
    assert problems_of("interception:\n") == [
        "x:1:14: interception: expected a mapping, found nothing; write interception: {interfaces: [lan0]}"
    ]


@pytest.mark.parametrize(("text", "found"), [("foo", '"foo"'), ("[a]", "a list"), ("5", "5")])
def test_a_file_that_is_no_mapping_is_one_problem(text, found):
    assert problems_of(text) == [f"x:1:1: expected a mapping, found {found}"]


def test_odd_keys_are_quoted_and_kept_on_one_line():
    lines = problems_of('interception: {interfaces: [a], "x\\ny z": 1, "": 2}')
    assert [line.split(": unknown")[0] for line in lines] == [
        'x:1:33: interception."x\\ny z"',
        'x:1:46: interception.""',
    ]


def test_a_backend_may_have_the_name_that_pydantic_gives_to_keys():
    lines = problems_of('interception: {interfaces: [a]}\nbackends: {"[key]": {type: direct, "[key]": 1}}')
    assert [line.split(": ")[0] for line in lines] == ["x:2:12", "x:2:36"]


def test_a_refused_value_is_not_reported_a_second_time():
    assert problems_of("interception: {interfaces: *x}") == [
        "x:1:28: aliases (*name) are not used here; write the value out"
    ]


def test_yaml_that_is_not_used_here_is_refused_even_if_the_values_are_right():
    assert problems_of("interception: {interfaces: [lan0], mark: &x 0x1/0x1}") == [
        "x:1:42: anchors (&name) are not used here; remove it"
    ]


def test_long_reports_are_cut():
    wrong = ", ".join(["5"] * 1500)
    lines = problems_of(f"interception: {{interfaces: [a], exclude: {{sources: [{wrong}]}}}}")
    assert len(lines) == 1001
    assert lines[-1] == "x: more problems than these 1000; correct them first"


def test_long_reports_begin_where_the_file_does():
    wrong = ", ".join(["5"] * 1500)
    lines = problems_of(f"interception: {{interfaces: [a], exclude: {{sources: [x], destinations: [{wrong}]}}}}")
    assert lines[0].startswith("x:1:53: interception.exclude.sources[0]")


def test_as_many_problems_as_are_shown_are_not_called_more():
    wrong = ", ".join(["5"] * 1000)
    assert len(problems_of(f"interception: {{interfaces: [a], exclude: {{sources: [{wrong}]}}}}")) == 1000
