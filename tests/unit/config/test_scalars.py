from __future__ import annotations

from ipaddress import ip_network

import pytest

from tproxyd.config.scalars import (
    Mark,
    PortRange,
    check_account,
    check_interface,
    check_name,
    check_username,
    checked_duration,
    format_duration,
    merge_ports,
    parse_duration,
    parse_mark,
    parse_ports,
    parse_prefix,
    parse_server,
)


def reason(parse, text: str) -> str:
    """Return why the parser refuses the text."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("0x1/0x1", Mark(1, 1)),
        ("0x10/0xF0", Mark(0x10, 0xF0)),
        ("16/0xf0", Mark(0x10, 0xF0)),
        ("0xffffffff/0xffffffff", Mark(2**32 - 1, 2**32 - 1)),
    ],
)
def test_a_mark_is_read_with_its_mask(text, mark):
    assert parse_mark(text) == mark


def test_a_mark_is_printed_as_hexadecimal_value_and_mask():
    assert str(Mark(1, 0xFF)) == "0x1/0xff"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0x1", "mark 0x1 has no mask; write 0x1/0x1"),
        ("16", "mark 16 has no mask; write 0x10/0x10"),
        ("0", "mark value 0x0 is out of range; allowed is 0x1 to 0xffffffff"),
        ("0x0/0x1", "mark value 0x0 is out of range; allowed is 0x1 to 0xffffffff"),
        ("0x1/0x0", "mark mask 0x0 is out of range; allowed is 0x1 to 0xffffffff"),
        ("0x1/0x100000000", "mark mask 0x100000000 is out of range; allowed is 0x1 to 0xffffffff"),
        ("0x100000000/0x1", "mark value 0x100000000 is out of range; allowed is 0x1 to 0xffffffff"),
        ("0x3/0x1", "0x3/0x1 has bits outside its mask; write 0x3/0x3"),
        ("", '"" is no mark; write VALUE/MASK, such as 0x1/0x1'),
        ("1/01", '"1/01" is no mark; write VALUE/MASK, such as 0x1/0x1'),
        ("-1/1", '"-1/1" is no mark; write VALUE/MASK, such as 0x1/0x1'),
        ("0x1/0x1 ", '"0x1/0x1 " is no mark; write VALUE/MASK, such as 0x1/0x1'),
        ("0x1/0x1/0x1", '"0x1/0x1/0x1" is no mark; write VALUE/MASK, such as 0x1/0x1'),
        ("\u0663/\u0663", '"\u0663/\u0663" is no mark; write VALUE/MASK, such as 0x1/0x1'),
        ("1_0/16", '"1_0/16" is no mark; write VALUE/MASK, such as 0x1/0x1'),
    ],
)
def test_what_is_no_mark_is_refused_with_a_hint(text, problem):
    assert reason(parse_mark, text) == problem


def test_marks_overlap_when_their_masks_share_a_bit():
    assert Mark(1, 3).overlaps(Mark(2, 2))
    assert not Mark(1, 1).overlaps(Mark(2, 2))


@pytest.mark.parametrize(
    ("text", "ports"),
    [("80", PortRange(80, 80)), ("1-65535", PortRange(1, 65535)), ("443-443", PortRange(443, 443))],
)
def test_ports_are_read_alone_and_as_a_range(text, ports):
    assert parse_ports(text) == ports


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0", "0 is no port; allowed is 1 to 65535"),
        ("1-65536", "65536 is no port; allowed is 1 to 65535"),
        ("90-80", "90-80 runs backwards; write 80-90"),
        ("1:1023", '"1:1023" is no port or range of ports; write 1-1023'),
        ("http", '"http" is no port or range of ports; write a port or a range, such as 1-1023'),
        ("1 - 5", '"1 - 5" is no port or range of ports; write a port or a range, such as 1-1023'),
        ("-5", '"-5" is no port or range of ports; write a port or a range, such as 1-1023'),
        ("", '"" is no port or range of ports; write a port or a range, such as 1-1023'),
    ],
)
def test_what_is_no_port_is_refused_with_a_hint(text, problem):
    assert reason(parse_ports, text) == problem


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([], []),
        ([(80, 80), (80, 80)], [(80, 80)]),
        ([(443, 443), (80, 80)], [(80, 80), (443, 443)]),
        ([(1, 100), (50, 60)], [(1, 100)]),
        ([(1, 50), (50, 100)], [(1, 100)]),
        ([(1, 5), (6, 9)], [(1, 9)]),
        ([(1, 5), (7, 9)], [(1, 5), (7, 9)]),
    ],
)
def test_port_ranges_are_sorted_and_merged(ranges, merged):
    assert merge_ports(PortRange(*one) for one in ranges) == tuple(PortRange(*one) for one in merged)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300ms", 0.3),
        ("5s", 5.0),
        ("2h", 7200.0),
        ("1m30s", 90.0),
        ("1d", 86400.0),
        ("1d2h3m4s5ms", 93784.005),
        ("90m", 5400.0),
        ("10ms", 0.01),
        ("7d", 604800.0),
    ],
)
def test_durations_are_read_as_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "1.5s", "-5s", "5S", "30s1m", "1m1m", "5sec", "\u0665s"])
def test_what_is_no_duration_is_refused_with_a_hint(text):
    hint = "write numbers with d, h, m, s or ms, such as 1m30s"
    assert reason(parse_duration, text) == f'"{text}" is no duration; {hint}'


@pytest.mark.parametrize("text", ["0s", "9ms", "7d1ms", "999999999999d"])
def test_durations_out_of_bounds_are_refused(text):
    assert reason(parse_duration, text) == f'"{text}" is out of range; allowed is 10ms to 7d'


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_out_of_bounds_are_refused_in_code_too(seconds):
    with pytest.raises(ValueError, match="out of range"):
        checked_duration(seconds)


def test_a_duration_is_printed_with_the_largest_units():
    assert format_duration(5400.0) == "1h30m"
    assert format_duration(0.25) == "250ms"


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
        ("::/0", "::/0"),
        ("64:ff9b::192.0.2.0/120", "64:ff9b::c000:200/120"),
    ],
)
def test_prefixes_are_read_and_a_bare_address_stands_for_itself(text, prefix):
    assert parse_prefix(text) == ip_network(prefix)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10.0.0.1/24", '"10.0.0.1/24" has bits set past its length; write 10.0.0.0/24'),
        ("2001:db8::1/32", '"2001:db8::1/32" has bits set past its length; write 2001:db8::/32'),
        ("::ffff:10.0.0.0/104", '"::ffff:10.0.0.0/104" is an IPv4 prefix mapped into IPv6; write 10.0.0.0/8'),
        ("::ffff:10.0.0.1/104", '"::ffff:10.0.0.1/104" is an IPv4 prefix mapped into IPv6; write 10.0.0.0/8'),
        ("::ffff:1.2.3.4", '"::ffff:1.2.3.4" is an IPv4 prefix mapped into IPv6; write 1.2.3.4/32'),
        ("10.0.0.0/255.0.0.0", '"10.0.0.0/255.0.0.0" is not ADDRESS/LENGTH; write 10.0.0.0/8'),
        ("10.0.0.0/0.255.255.255", '"10.0.0.0/0.255.255.255" is not ADDRESS/LENGTH; write 10.0.0.0/8'),
        ("10.0.0.0/08", '"10.0.0.0/08" is not ADDRESS/LENGTH; write 10.0.0.0/8'),
    ],
)
def test_a_prefix_gone_wrong_is_refused_with_the_right_one(text, problem):
    assert reason(parse_prefix, text) == problem


@pytest.mark.parametrize("text", ["fe80::1%eth0", "fe80::%1/64", "fe80::/64%lan0"])
def test_a_zone_id_in_a_prefix_is_refused(text):
    with pytest.raises(ValueError, match="has a zone id"):
        parse_prefix(text)


@pytest.mark.parametrize(
    "text",
    ["", "lan", "10.0.0", "10.0.0.0/33", "10.0.0.0/", "010.0.0.1", "1.2.3.4/8/8", " 10.0.0.0/8", "::/129", "1" * 99],
)
def test_what_is_no_prefix_is_refused(text):
    with pytest.raises(ValueError, match="is no address or prefix; write such as"):
        parse_prefix(text)


@pytest.mark.parametrize("name", ["lan0", "eth0.100", "wg-home", "br_x", "fünf", "123456789012345", "a+b", "@x"])
def test_names_that_the_kernel_gives_interfaces_are_taken(name):
    assert check_interface(name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lo", '"lo" is not client-side; to intercept the box\'s own traffic set own_traffic: true'),
        ("eth*", '"eth*" is a wildcard; name each interface'),
        ("eth+", '"eth+" is a wildcard; name each interface'),
        ("1234567890123456", '"1234567890123456" is too long for an interface name; at most 15 bytes'),
        ("äöüäöüäö", '"äöüäöüäö" is too long for an interface name; at most 15 bytes'),
        ("", '"" is no interface name; `ip link` lists them'),
        (".", '"." is no interface name; `ip link` lists them'),
        ("..", '".." is no interface name; `ip link` lists them'),
        ("a/b", '"a/b" is no interface name: it contains "/"; `ip link` lists them'),
        ("a:1", '"a:1" is no interface name: it contains ":"; `ip link` lists them'),
        ("a b", '"a b" is no interface name: it contains " "; `ip link` lists them'),
        ("a\n", '"a\\n" is no interface name: it contains "\\n"; `ip link` lists them'),
        ("a\u200b", '"a\\u200b" is no interface name: it contains "\\u200b"; `ip link` lists them'),
        ('a"', '"a"" is no interface name: it contains """; `ip link` lists them'),
    ],
)
def test_what_is_no_interface_is_refused_with_a_hint(name, problem):
    assert reason(check_interface, name) == problem


@pytest.mark.parametrize("name", ["a", "0", "lan-1_x", "a" * 63])
def test_names_of_listeners_and_backends(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "_a", "LAN", "a b", "a.b", "a" * 64, "ä", "a\n"])
def test_what_can_not_name_a_listener_or_backend(name):
    with pytest.raises(ValueError, match=r"is no name; use 1 to 63 of a-z, 0-9, _ and -"):
        check_name(name)


@pytest.mark.parametrize("name", ["nobody", "_tproxyd", "systemd-network", "a.b", "T1"])
def test_names_of_accounts(name):
    assert check_account(name) == name


@pytest.mark.parametrize("name", ["", "1000", "-x", "a b", "a:b", "a" * 33, "root\n"])
def test_what_can_not_name_an_account(name):
    with pytest.raises(ValueError, match="is no user name"):
        check_account(name)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.1:1080", "192.0.2.1", 1080),
        ("[2001:DB8:0::1]:1", "2001:db8::1", 1),
        ("proxy.example:65535", "proxy.example", 65535),
        ("xn--prxy-5qa_1:80", "xn--prxy-5qa_1", 80),
        ("localhost:080", "localhost", 80),
    ],
)
def test_servers_are_read_and_written_back(text, host, port):
    server = parse_server(text)
    assert (server.host, server.port) == (host, port)
    assert parse_server(str(server)) == server


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("192.0.2.1", "is not HOST:PORT"),
        ("2001:db8::1:1080", "is not HOST:PORT"),
        ("http://proxy:80", "is not HOST:PORT"),
        ("", "is not HOST:PORT"),
        ("proxy:0", "0 is no port"),
        ("proxy:65536", "65536 is no port"),
        ("127.1:80", "neither an address nor a host name"),
        ("0x7f000001:80", "neither an address nor a host name"),
        ("pröxy:80", "neither an address nor a host name"),
        ("-x:80", "neither an address nor a host name"),
        ("a..b:80", "neither an address nor a host name"),
        ("[proxy]:80", "is not HOST:PORT"),
        ("[192.0.2.1]:80", ""),
        ("0.0.0.0:80", "no address that a server has"),
        ("[ff02::1]:80", "no address that a server has"),
        ("[::ffff:192.0.2.1]:80", "write a plain one"),
    ],
)
def test_what_is_no_server_is_refused(text, reason):
    if not reason:
        assert str(parse_server(text)) == "192.0.2.1:80"
        return
    with pytest.raises(ValueError, match=reason):
        parse_server(text)


@pytest.mark.parametrize("name", ["", "x" * 256, "ü" * 128, "a\nb", "a\x7f"])
def test_user_names_that_no_proxy_can_be_told_are_refused(name):
    with pytest.raises(ValueError, match="; "):
        check_username(name)
