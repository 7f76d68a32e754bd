from __future__ import annotations

import json
import string
from ipaddress import IPv4Network, IPv6Network
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tproxyd.config import Config, Mark, PortRange, parse_config
from tproxyd.config.document import plain, read_document
from tproxyd.config.scalars import (
    format_duration,
    merge_ports,
    parse_duration,
    parse_mark,
    parse_ports,
    parse_prefix,
)
from tproxyd.errors import ConfigError

MOST_MS = 7 * 86_400_000
PORT = st.integers(1, 65535)
RANGES = st.tuples(PORT, PORT).map(lambda two: PortRange(min(two), max(two)))
NEAR = st.integers(1, 40)
NEAR_RANGES = st.tuples(NEAR, NEAR).map(lambda two: PortRange(min(two), max(two)))
BITS = st.integers(1, 2**32 - 1)
MARKS = st.tuples(BITS, BITS).map(lambda two: Mark(two[0], two[0] | two[1]))
FEW_BITS = st.integers(0, 31).map(lambda bit: Mark(1 << bit, 1 << bit))
V4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda two: IPv4Network(two, strict=False))
V6 = st.tuples(st.integers(2**64, 2**128 - 1), st.integers(0, 128)).map(lambda two: IPv6Network(two, strict=False))


@given(st.integers(10, MOST_MS))
def test_durations_are_read_back_as_printed(milliseconds):
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@given(MARKS)
def test_marks_are_read_back_as_printed(mark):
    assert parse_mark(str(mark)) == mark


@given(RANGES)
def test_port_ranges_are_read_back_as_printed(ports):
    assert parse_ports(str(ports)) == ports


@given(V4 | V6)
def test_prefixes_are_read_back_as_printed(prefix):
    assert parse_prefix(str(prefix)) == prefix


@settings(deadline=None)  # the naive sets are large
@given(st.lists(NEAR_RANGES | RANGES, max_size=12))
def test_merged_ranges_are_the_same_ports_and_as_few_as_can_be(ranges):
    merged = merge_ports(ranges)
    naive = {port for ports in ranges for port in range(ports.first, ports.last + 1)}
    assert {port for ports in merged for port in range(ports.first, ports.last + 1)} == naive
    assert all(one.last + 1 < following.first for one, following in pairwise(merged))


@given(st.sampled_from([parse_duration, parse_mark, parse_ports, parse_prefix]), st.text(max_size=30))
def test_scalars_are_read_or_refused_with_a_reason(parse, text):
    reason = why_refused(parse, text)
    assert reason is None or (reason.isprintable() and "; " in reason)


def why_refused(parse, text: str) -> str | None:
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return None


# Whole files


def words(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(text.split())


KEYS = words(
    "interception interfaces ruleset families tcp_ports exclude destinations mark server_mark route_table "
    "listeners name type port backends direct source default timeouts connect limits max_flows workers user "
    "server via username password_file resolve "
    "logging rules"
)
SCALARS = words(
    "lan0 lo eth* ipv4 80 1-65535 1:2 0x1/0x1 0x1 5s 5 auto nobody direct tproxy socks5 http_connect "
    "192.0.2.1:1080 true off ~ .nan 1e99 "
    "* & ! 10.0.0.0/8 10.0.0.1/8 ::1/128 fe80::1%1 '' [] {}"
)
NODES = st.recursive(
    SCALARS | KEYS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)
FILES = st.lists(st.tuples(KEYS, NODES), max_size=8).map(
    lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs).encode()
)
YAMLISH = st.text(alphabet=string.printable + "äÿ\u2028\ufeff\x85", max_size=200).map(lambda text: text.encode("utf-8"))


def problems_of(data: bytes) -> list[str]:
    """Return what is wrong; anything but a config or a ConfigError fails the test."""
    try:
        config = parse_config(data, "x.yaml")
    except ConfigError as error:
        return error.problems or ["refused without a problem"]
    assert isinstance(config, Config)
    return []


def assert_loads_or_says_why(data: bytes) -> None:
    for line in problems_of(data):
        assert line.startswith("x.yaml:")
        assert line.isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_give_a_config_or_a_config_error(data):
    assert_loads_or_says_why(data)


@given(YAMLISH)
def test_any_text_gives_a_config_or_a_config_error(data):
    assert_loads_or_says_why(data)


@given(FILES)
def test_anything_that_looks_like_a_config_gives_one_or_a_config_error(data):
    assert_loads_or_says_why(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1, max_size=20), inner),
    max_leaves=20,
)


@given(JSON | st.text())
def test_json_is_read_as_json(value):
    text = json.dumps(value)  # all beyond ASCII escaped, so that no character is refused
    read = read_document(text.encode())
    assert read.problems == () or "\\ud" in text or "<<" in text
    if not read.problems and read.root is not None:
        assert plain(read.root) == value


@given(
    st.permutations(range(32)).map(lambda bits: [str(Mark(1 << bit, 1 << bit)) for bit in bits[:3]]),
    st.lists(RANGES, min_size=1),
    st.lists(V4 | V6),
    st.lists(st.integers(10, MOST_MS), min_size=3, max_size=3),
)
def test_a_config_is_read_back_as_dumped(marks, ports, prefixes, times):
    written = {
        "interception": {
            "interfaces": ["lan0"],
            "tcp_ports": [str(port) for port in ports],
            "exclude": {"destinations": [str(prefix) for prefix in prefixes]},
            "mark": marks[0],
            "client_mark": marks[1],
            "server_mark": marks[2],
        },
        "timeouts": dict(
            zip(("connect", "tcp_idle", "udp_idle"), (format_duration(ms / 1000) for ms in times), strict=True)
        ),
    }
    config = parse_config(json.dumps(written).encode(), "x")
    assert config.interception.exclude.destinations == tuple(prefixes)
    assert parse_config(config.model_dump_json().encode(), "x") == config


@given(st.lists(FEW_BITS | MARKS, min_size=3, max_size=3))
def test_three_marks_are_taken_exactly_when_no_two_masks_meet(marks):
    one, two, three = marks
    text = f"interception: {{interfaces: [a], mark: {one}, client_mark: {two}, server_mark: {three}}}"
    meet = one.mask & two.mask or one.mask & three.mask or two.mask & three.mask
    assert bool(problems_of(text.encode())) == bool(meet)
