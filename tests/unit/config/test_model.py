from __future__ import annotations

import json
import pickle
from ipaddress import ip_network

import pytest
from pydantic import ValidationError

from tproxyd.config import (
    Config,
    DirectBackend,
    Exclude,
    HttpConnectBackend,
    Interception,
    Limits,
    Logging,
    Mark,
    PortRange,
    Server,
    Socks5Backend,
    Timeouts,
    TproxyListener,
    parse_config,
)
from tproxyd.errors import ConfigError

INTERCEPTION = "interception: {interfaces: [lan0]}\n"


def config_of(text: str) -> Config:
    return parse_config(text.encode(), "x.yaml")


def interception_of(keys: str) -> Interception:
    return config_of("interception: {interfaces: [lan0], " + keys + "}").interception


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_of(text)
    return [line.removeprefix("x.yaml:") for line in caught.value.problems]


def interception_problems(keys: str) -> list[str]:
    """Say what is wrong with one-line keys of interception, without their places."""
    lines = problems_of("interception:\n  interfaces: [lan0]\n  " + keys.replace("; ", "\n  "))
    return [line.split(": ", 1)[1] for line in lines]


# Defaults


def test_interfaces_are_all_that_is_required():
    assert config_of(INTERCEPTION) == Config(
        interception=Interception(
            interfaces=("lan0",),
            ruleset="nftables",
            families=("ipv4", "ipv6"),
            tcp_ports=(PortRange(1, 65535),),
            udp_ports=(PortRange(1, 65535),),
            exclude=Exclude(destinations=(), sources=()),
            own_traffic=False,
            on_failure="closed",
            learned_flows=True,
            mark=Mark(1, 1),
            client_mark=Mark(2, 2),
            server_mark=Mark(4, 4),
            route_table=7440,
            rule_priority=7440,
        ),
        listeners=(TproxyListener(name="tproxy", type="tproxy", port=7440),),
        backends={"direct": DirectBackend(type="direct", source="four-tuple", nat="full-cone")},
        default="direct",
        timeouts=Timeouts(connect=5.0, tcp_idle=7200.0, udp_idle=60.0),
        limits=Limits(max_flows=65536, max_flows_per_client=4096),
        workers="auto",
        user="nobody",
        logging=Logging(level="info", format="text", flows=False),
    )


def test_every_key_can_be_written():
    config = config_of(
        """\
interception:
  interfaces: [lan0, "7", wlan0]
  ruleset: iptables
  families: [ipv6]
  tcp_ports: [443, "80", 8000-8010, 8005-8100]
  udp_ports: []
  exclude:
    destinations: [10.0.0.0/8, "::1", 10.0.0.0/8]
    sources: [192.0.2.1]
  own_traffic: true
  on_failure: open
  mark: 0x100/0x100
  client_mark: 0x200/0x200
  server_mark: 1024/1024
  route_table: 100
  rule_priority: 99
listeners:
  - {name: lan, type: tproxy, port: 1}
backends:
  plain: {type: direct, source: gateway, nat: symmetric}
default: plain
timeouts: {connect: 300ms, tcp_idle: 1d, udp_idle: 1m30s}
limits: {max_flows: 100, max_flows_per_client: 100}
workers: 4
user: _tproxyd
logging: {level: debug, format: json, flows: true}
"""
    )
    assert config == Config(
        interception=Interception(
            interfaces=("lan0", "7", "wlan0"),
            ruleset="iptables",
            families=("ipv6",),
            tcp_ports=(PortRange(80, 80), PortRange(443, 443), PortRange(8000, 8100)),
            udp_ports=(),
            exclude=Exclude(
                destinations=(ip_network("10.0.0.0/8"), ip_network("::1"), ip_network("10.0.0.0/8")),
                sources=(ip_network("192.0.2.1"),),
            ),
            own_traffic=True,
            on_failure="open",
            mark=Mark(0x100, 0x100),
            client_mark=Mark(0x200, 0x200),
            server_mark=Mark(0x400, 0x400),
            route_table=100,
            rule_priority=99,
        ),
        listeners=(TproxyListener(name="lan", port=1),),
        backends={"direct": DirectBackend(), "plain": DirectBackend(source="gateway", nat="symmetric")},
        default="plain",
        timeouts=Timeouts(connect=0.3, tcp_idle=86400.0, udp_idle=90.0),
        limits=Limits(max_flows=100, max_flows_per_client=100),
        workers=4,
        user="_tproxyd",
        logging=Logging(level="debug", format="json", flows=True),
    )
    assert config_of(config.model_dump_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_json_form_is_written_as_an_operator_would():
    dumped = json.loads(config_of(INTERCEPTION).model_dump_json())
    assert dumped["interception"]["mark"] == "0x1/0x1"
    assert dumped["interception"]["tcp_ports"] == ["1-65535"]
    assert dumped["timeouts"] == {"connect": "5s", "tcp_idle": "2h", "udp_idle": "1m"}


def test_a_config_can_not_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        config_of(INTERCEPTION).default = "other"


def test_code_may_give_seconds_where_a_file_must_give_units():
    assert Timeouts(connect=0.25).connect == 0.25
    with pytest.raises(ValidationError, match="out of range"):
        Timeouts(connect=0)


# Interception


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("ruleset: nft", 'ruleset: expected nftables or iptables, found "nft"'),
        ("ruleset:", "ruleset: expected nftables or iptables, found nothing; leave the key out for its default"),
        ("ruleset: [nftables]", "ruleset: expected nftables or iptables, found a list"),
        ("families: []", "families: the list is empty; write ipv4, ipv6 or both"),
        ("families: ipv4", 'families: expected a list, found "ipv4"; write [ipv4]'),
        ("families: [ipv4, ipv4]", 'families[1]: "ipv4" is there twice; remove one'),
        ("families: [4]", "families[0]: expected ipv4 or ipv6, found 4"),
        ("tcp_ports: 80", "tcp_ports: expected a list, found 80; write [80]"),
        ("tcp_ports: true", "tcp_ports: expected a list, found true"),
        ("tcp_ports: [0]", "tcp_ports[0]: 0 is no port; allowed is 1 to 65535"),
        ("tcp_ports: [1, -5]", "tcp_ports[1]: -5 is no port; allowed is 1 to 65535"),
        ("tcp_ports: [8.5]", "tcp_ports[0]: expected a port or a range, found 8.5"),
        ("tcp_ports: [true]", "tcp_ports[0]: expected a port or a range, found true"),
        (
            "udp_ports: [22:22]",
            'udp_ports[0]: "22:22" is no port or range of ports; write 22-22',
        ),
        ("udp_ports:", "udp_ports: expected a list, found nothing; leave the key out for its default"),
        (
            "tcp_ports: []; udp_ports: []",
            "udp_ports: tcp_ports and udp_ports are both empty; one of them must name ports",
        ),
        ("exclude: [10.0.0.0/8]", "exclude: expected a mapping, found a list"),
        (
            "exclude: {sources: [10.0.0.1/8]}",
            'exclude.sources[0]: "10.0.0.1/8" has bits set past its length; write 10.0.0.0/8',
        ),
        (
            "exclude:;  sources:;  - 2001:db8::;  - ::1",
            "exclude.sources[0]: expected a prefix, found a mapping; quote an address that ends with ':'",
        ),
        ("exclude: {destinations: [5]}", "exclude.destinations[0]: expected a prefix, found 5"),
        ("exclude: {destinations: [10.5]}", "exclude.destinations[0]: expected a prefix, found 10.5"),
        ("own_traffic: yes", 'own_traffic: expected true or false, found "yes"; write true'),
        ("own_traffic: off", 'own_traffic: expected true or false, found "off"; write false'),
        ("own_traffic: 1", "own_traffic: expected true or false, found 1"),
        ("on_failure: shut", 'on_failure: expected closed or open, found "shut"'),
        ("learned_flows: 1", "learned_flows: expected true or false, found 1"),
        (
            "ruleset: iptables; learned_flows: true",
            "learned_flows: needs ruleset: nftables (no ipset holds a client's port and its server); write false",
        ),
        ("mark: 0x8", "mark: mark 0x8 has no mask; write 0x8/0x8"),
        ("mark: -1", "mark: expected a mark, such as 0x1/0x1, found -1"),
        ("mark: true", "mark: expected a mark, such as 0x1/0x1, found true"),
        ("mark: 0x3/0x1", "mark: 0x3/0x1 has bits outside its mask; write 0x3/0x3"),
        ("route_table: 254", "route_table: table 254 is the kernel's own (main); take another number"),
        ("route_table: 253", "route_table: table 253 is the kernel's own (default); take another number"),
        ("route_table: 255", "route_table: table 255 is the kernel's own (local); take another number"),
        ("route_table: 0", "route_table: table 0 is the kernel's own (unspec); take another number"),
        ("route_table: 4294967296", "route_table: 4294967296 is too large; the most is 4294967295"),
        ("route_table: -1", "route_table: -1 is too small; the least is 0"),
        ("route_table: main", 'route_table: expected a whole number, found "main"'),
        ("rule_priority: 0", "rule_priority: 0 is too small; the least is 1"),
        ("rule_priority: 32766", "rule_priority: 32766 is too large; the most is 32765"),
        ('rule_priority: "7"', 'rule_priority: expected a whole number, found "7"; remove the quotes'),
        ("rule_priority: true", "rule_priority: expected a whole number, found true"),
        ("rule_priority: 7.0", "rule_priority: expected a whole number, found 7.0"),
    ],
)
def test_each_key_of_interception_refuses_what_it_can_not_hold(keys, problem):
    assert interception_problems(keys) == [f"interception.{problem}"]


@pytest.mark.parametrize(("keys", "learned"), [("ruleset: nftables", True), ("ruleset: iptables", False)])
def test_learned_flows_are_the_default_where_they_can_be_had(keys, learned):
    assert interception_of(keys).learned_flows == learned


@pytest.mark.parametrize("table", [1, 252, 256, 4294967295])
def test_route_tables_that_are_nobody_elses(table):
    assert interception_of(f"route_table: {table}").route_table == table


@pytest.mark.parametrize("priority", [1, 32765])
def test_rule_priorities_from_first_to_last(priority):
    assert interception_of(f"rule_priority: {priority}").rule_priority == priority


@pytest.mark.parametrize("protocol", ["tcp_ports", "udp_ports"])
def test_an_empty_list_of_ports_switches_a_protocol_off(protocol):
    assert getattr(interception_of(f"{protocol}: []"), protocol) == ()


@pytest.mark.parametrize(
    ("written", "problems"),
    [
        ("[]", ["interception.interfaces: the list is empty; name at least one client-side interface"]),
        ("lan0", ['interception.interfaces: expected a list, found "lan0"; write [lan0]']),
        ("{lan0: 1}", ["interception.interfaces: expected a list, found a mapping"]),
        ("", ["interception.interfaces: expected a list, found nothing; write interfaces: [lan0]"]),
        ("[7]", ["interception.interfaces[0]: expected an interface name, found 7; quote it"]),
        ("[~]", ["interception.interfaces[0]: expected an interface name, found nothing"]),
        (
            '[lan0, "br*", lan0]',
            [
                'interception.interfaces[1]: "br*" is a wildcard; name each interface',
                'interception.interfaces[2]: "lan0" is there twice; remove one',
            ],
        ),
    ],
)
def test_interfaces_refuse_what_is_none(written, problems):
    found = problems_of(f"interception: {{interfaces: {written}}}")
    assert [line.split(": ", 1)[1] for line in found] == problems


def test_marks_must_not_share_mask_bits():
    assert interception_problems("mark: 0x10/0x30; client_mark: 0x20/0x20") == [
        (
            "interception.client_mark: client_mark 0x20/0x20 and mark 0x10/0x30 share bits of their masks; "
            "give each mark bits of its own"
        )
    ]


def test_a_mark_that_meets_a_default_is_reported_where_it_is_written():
    lines = problems_of("interception:\n  interfaces: [lan0]\n  mark: 0x4/0x4\n")
    assert lines == [
        (
            "3:9: interception.server_mark: server_mark 0x4/0x4 and mark 0x4/0x4 share bits of their masks; "
            "give each mark bits of its own"
        )
    ]


def test_each_mark_that_collides_is_reported():
    assert len(interception_problems("mark: 0x1/0xf")) == 2


# Listeners


def test_a_second_tproxy_listener_is_refused():
    text = INTERCEPTION + "listeners:\n- {name: a, type: tproxy, port: 1}\n- {name: b, type: tproxy, port: 2}\n"
    assert problems_of(text) == [
        "4:3: listeners[1]: a second tproxy listener; this version has exactly one, remove this"
    ]


def test_listeners_need_names_of_their_own():
    text = INTERCEPTION + "listeners:\n- {name: a, type: tproxy, port: 1}\n- {name: a, type: tproxy, port: 2}\n"
    assert '4:10: listeners[1].name: "a" names another listener, too; give each its own name' in problems_of(text)


@pytest.mark.parametrize(
    ("listeners", "problem"),
    [
        ("[]", "2:12: listeners: the list is empty; leave the key out for a tproxy listener on port 7440"),
        ("{}", "2:12: listeners: expected a list, found a mapping"),
        ("[tproxy]", '2:13: listeners[0]: expected a mapping, found "tproxy"'),
        ("[{name: a, port: 1}]", "2:13: listeners[0].type: missing; write type: tproxy"),
        ("[{type: tproxy, port: 1}]", "2:13: listeners[0].name: missing; write name: lan"),
        ("[{type: tproxy, name: a}]", "2:13: listeners[0].port: missing; write port: 7440"),
        ("[{type: tproxy, name: a, port: 0}]", "2:43: listeners[0].port: 0 is too small; the least is 1"),
        (
            "[{type: tproxy, name: a, port: 65536}]",
            "2:43: listeners[0].port: 65536 is too large; the most is 65535",
        ),
        ("[{type: tproxy, name: 5, port: 1}]", "2:34: listeners[0].name: expected text, found 5; quote it"),
        (
            "[{type: socks5, name: a, port: 1, users_file: x}]",
            '2:20: listeners[0].type: type "socks5" is not in this version; write tproxy',
        ),
        ("[{type: tprox}]", '2:20: listeners[0].type: expected tproxy, found "tprox"'),
        (
            "[{type: tproxy, name: a, port: 1, address: x}]",
            "2:46: listeners[0].address: unknown key; known here: name, type, port",
        ),
    ],
)
def test_listeners_refuse_what_is_none(listeners, problem):
    assert problems_of(f"{INTERCEPTION}listeners: {listeners}") == [problem]


# Backends


def test_the_direct_backend_is_there_beside_others():
    config = config_of(INTERCEPTION + "backends: {nat: {type: direct, source: gateway}}")
    assert config.backends == {"direct": DirectBackend(), "nat": DirectBackend(source="gateway")}


def test_the_direct_backend_can_be_changed():
    config = config_of(INTERCEPTION + "backends: {direct: {type: direct, source: address}}")
    assert config.backends == {"direct": DirectBackend(source="address")}


@pytest.mark.parametrize(
    ("backends", "problem"),
    [
        ("[]", "2:11: backends: expected a mapping, found a list"),
        ("", "2:10: backends: expected a mapping, found nothing; leave the key out for its default"),
        ("{a: {}}", "2:15: backends.a.type: missing; write type: direct"),
        (
            "{a: {type: upstream, servers: [x]}}",
            '2:22: backends.a.type: type "upstream" is not in this version; write direct, socks5 or http_connect',
        ),
        (
            "{a: {type: direct, source: client}}",
            '2:38: backends.a.source: expected four-tuple, address or gateway, found "client"',
        ),
        (
            "{a: {type: direct, nat: full}}",
            '2:35: backends.a.nat: expected full-cone or symmetric, found "full"',
        ),
        (
            "{Web: {type: direct}}",
            '2:12: backends.Web: "Web" is no name; use 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit',
        ),
        ("{a: {type: direct, sourc: x}}", "2:30: backends.a.sourc: unknown key; did you mean source?"),
    ],
)
def test_backends_refuse_what_is_none(backends, problem):
    assert problems_of(f"{INTERCEPTION}backends: {backends}") == [problem]


def test_default_must_name_a_backend():
    text = INTERCEPTION + "backends: {web: {type: direct}}\ndefault: wep"
    assert problems_of(text) == ['3:10: default: there is no backend "wep"; write direct or web']


PROXY_KEYS = "type, server, via, resolve, username, password_file"
CORP = "type: socks5, server: '192.0.2.1:1080'"


def test_proxies_are_read_with_their_keys():
    config = config_of(
        INTERCEPTION + "backends:\n"
        "  corp: {type: socks5, server: '[2001:DB8::1]:1080', username: u, password_file: /s,\n"
        "         via: web, resolve: local}\n"
        "  web: {type: http_connect, server: 'proxy.example:3128'}\n"
    )
    assert config.backends["corp"] == Socks5Backend(
        server=Server("2001:db8::1", 1080), username="u", password_file="/s", via="web", resolve="local"
    )
    assert config.backends["web"] == HttpConnectBackend(server=Server("proxy.example", 3128))
    assert parse_config(config.model_dump_json().encode(), "again") == config


@pytest.mark.parametrize(
    ("backends", "problem"),
    [
        ("{a: {type: socks5}}", "2:15: backends.a.server: missing; write server: 192.0.2.1:1080"),
        (
            f"{{a: {{{CORP}, username: u}}}}",
            "2:66: backends.a.username: username and password_file belong together; add password_file",
        ),
        (
            f"{{a: {{{CORP}, password_file: /s}}}}",
            "2:71: backends.a.password_file: username and password_file belong together; add username",
        ),
        (f"{{a: {{{CORP}, tls: true}}}}", f"2:56: backends.a.tls: unknown key; known here: {PROXY_KEYS}"),
        (
            "{a: {type: http_connect, server: 'x:1', tls: true}}",
            "2:51: backends.a.tls: not in this version; remove it",
        ),
        (f"{{a: {{{CORP}, source: gateway}}}}", f"2:56: backends.a.source: unknown key; known here: {PROXY_KEYS}"),
        (f"{{a: {{{CORP}, via: a}}}}", "2:61: backends.a.via: a loop: a via a; remove one via"),
        (
            f"{{a: {{{CORP}, via: direct}}}}",
            '2:61: backends.a.via: "direct" is no backend of type socks5 or http_connect; remove it',
        ),
        (
            f"{{a: {{{CORP}, via: c}}, b: {{{CORP}}}}}",
            '2:61: backends.a.via: "c" is no backend of type socks5 or http_connect; write b',
        ),
        (
            "{a: {type: http_connect, server: 'x:1', username: 'a:b', password_file: /s}}",
            '2:61: backends.a.username: "a:b" contains a colon, which HTTP Basic has no way to say; remove it',
        ),
        (
            f"{{a: {{{CORP}, username: u, password_file: s}}}}",
            '2:84: backends.a.password_file: "s" is no absolute path; write such as /etc/tproxyd/proxy.secret',
        ),
    ],
)
def test_proxies_refuse_what_is_none(backends, problem):
    assert problems_of(f"{INTERCEPTION}backends: {backends}") == [problem]


def test_a_loop_of_vias_is_reported_at_each_of_them_and_what_leads_into_it_is_not():
    text = f"{INTERCEPTION}backends:\n" + "".join(
        f"  {name}: {{{CORP}, via: {via}}}\n" for name, via in (("a", "b"), ("b", "c"), ("c", "b"))
    )
    assert [line[1:] for line in problems_of(text)] == [
        ":52: backends.b.via: a loop: b via c via b; remove one via",
        ":52: backends.c.via: a loop: c via b via c; remove one via",
    ]


def test_default_is_not_blamed_for_backends_that_are_wrong():
    text = INTERCEPTION + "backends: {web: {type: tunnel}}\ndefault: web"
    assert [line[:5] for line in problems_of(text)] == ["2:24:"]


# The rest


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("timeouts: {connect: 5}", "2:21: timeouts.connect: 5 has no unit; write such as 5s"),
        ("timeouts: {connect: 1.5}", "2:21: timeouts.connect: 1.5 has no unit; write such as 5s"),
        ("timeouts: {connect: -3}", "2:21: timeouts.connect: -3 has no unit; write such as 5s"),
        ("timeouts: {connect: 0s}", '2:21: timeouts.connect: "0s" is out of range; allowed is 10ms to 7d'),
        ("timeouts: {tcp_idle: 8d}", '2:22: timeouts.tcp_idle: "8d" is out of range; allowed is 10ms to 7d'),
        ("timeouts: {sniff: 300ms}", "2:12: timeouts.sniff: not in this version; remove it"),
        ("limits: {max_flows: 0}", "2:21: limits.max_flows: 0 is too small; the least is 1"),
        ("limits: {max_flows: 16777217}", "2:21: limits.max_flows: 16777217 is too large; the most is 16777216"),
        (
            "limits: {max_flows: 10, max_flows_per_client: 11}",
            "2:47: limits.max_flows_per_client: 11 is more than max_flows (10); lower it or raise max_flows",
        ),
        (
            "limits: {max_flows_per_client: 65537}",
            "2:32: limits.max_flows_per_client: 65537 is more than max_flows (65536); lower it or raise max_flows",
        ),
        ("workers: 0", "2:10: workers: expected auto or a number from 1 to 256, found 0"),
        ("workers: 257", "2:10: workers: expected auto or a number from 1 to 256, found 257"),
        ("workers: true", "2:10: workers: expected auto or a number from 1 to 256, found true"),
        ("workers: many", '2:10: workers: expected auto or a number from 1 to 256, found "many"'),
        ("user: 65534", "2:7: user: expected the name of an account, found 65534"),
        ("user: a b", '2:7: user: "a b" is no user name; write an account\'s name, such as nobody'),
        ("logging: {level: trace}", '2:18: logging.level: expected debug, info, warning or error, found "trace"'),
        ("logging: {format: xml}", '2:19: logging.format: expected text or json, found "xml"'),
        ("logging: {flows: on}", '2:18: logging.flows: expected true or false, found "on"; write true'),
        ("logging: debug", '2:10: logging: expected a mapping, found "debug"'),
        ("control: {socket: /x}", "2:1: control: not in this version; remove it"),
        ("timeout: {connect: 5s}", "2:1: timeout: unknown key; did you mean timeouts?"),
        (
            "sniff: 5s",
            (
                "2:1: sniff: unknown key; known here: interception, listeners, backends, rules, default, timeouts, "
                "limits, workers, user, logging"
            ),
        ),
    ],
)
def test_each_other_key_refuses_what_it_can_not_hold(line, problem):
    assert problems_of(INTERCEPTION + line) == [problem]


@pytest.mark.parametrize(("most", "per_client"), [(10, 10), (4096, 4096), (5000, 4096)])
def test_the_default_per_client_follows_a_small_max_flows(most, per_client):
    assert config_of(f"{INTERCEPTION}limits: {{max_flows: {most}}}").limits.max_flows_per_client == per_client


@pytest.mark.parametrize("workers", [1, 256, "auto"])
def test_workers_are_a_number_or_auto(workers):
    assert config_of(f"{INTERCEPTION}workers: {workers}").workers == workers
