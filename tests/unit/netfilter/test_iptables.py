from dataclasses import replace

import pytest

from tproxyd.config import Mark, PortRange
from tproxyd.flow import Action, Network
from tproxyd.netfilter import iptables
from tproxyd.netfilter.plan import INBOUND_S, Intercept, PrefixSet, Ruleset
from tproxyd.netfilter.rules import KernelRule, RulePrefixes

ALL_PORTS = (PortRange(1, 65535),)
RULESET = Ruleset(
    interfaces=("lan0", "lan1"),
    versions=(4, 6),
    excluded=(
        PrefixSet("destination", 4, ("10.0.0.0/8",)),
        PrefixSet("source", 4, ("127.0.0.0/8",)),
        PrefixSet("destination", 6, ("ff00::/8",)),
    ),
    intercepts=(
        Intercept(Network.TCP, 4, ALL_PORTS, "127.0.0.1", 7440),
        Intercept(Network.UDP, 4, ALL_PORTS, "127.0.0.1", 7440),
        Intercept(Network.TCP, 6, ALL_PORTS, "::1", 7440),
    ),
    own_traffic=False,
    lease=False,
    learned=None,
    mark=Mark(0x1, 0x1),
    client_mark=Mark(0x2, 0x2),
    server_mark=Mark(0x4, 0x4),
    route_table=7440,
    rule_priority=7440,
)


def rules(ruleset: Ruleset, version: int, table: str, chain: str) -> list[str]:
    return [iptables.line(rule) for rule in iptables.tables(ruleset, version)[table].chains[chain]]


def with_ports(*ports: PortRange) -> Ruleset:
    return replace(RULESET, intercepts=(replace(RULESET.intercepts[0], ports=ports),))


def test_known_packets_and_candidates_are_told_apart_before_connection_tracking() -> None:
    assert rules(RULESET, 4, "raw", "TPROXYD_RAW") == [
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -g TPROXYD_NEW",
        "-m socket --transparent --restore-skmark -m mark --mark 0x4/0x4 -j RETURN",
        "-p udp -g TPROXYD_NEW",
        "-m socket --transparent -g TPROXYD_CLIENT",
    ]


def test_client_side_is_marked_and_not_tracked() -> None:
    assert rules(RULESET, 6, "raw", "TPROXYD_CLIENT") == ["-j CT --notrack", "-j MARK --set-xmark 0x1/0x1"]
    assert rules(RULESET, 6, "raw", "TPROXYD_OUT") == ["! -o lo -m mark --mark 0x2/0x2 -j CT --notrack"]


def test_a_jump_for_each_client_interface() -> None:
    jumps = iptables.tables(RULESET, 4)["raw"].jumps
    assert [iptables.line(rule) for rule in jumps["PREROUTING"]] == ["-i lan0 -j TPROXYD_RAW", "-i lan1 -j TPROXYD_RAW"]


def test_new_flows_are_marked_unless_they_stay_in_the_kernel() -> None:
    assert rules(RULESET, 4, "raw", "TPROXYD_NEW") == [
        "-m addrtype --src-type LOCAL -j DROP",
        "-m addrtype --dst-type LOCAL,BROADCAST,ANYCAST,MULTICAST -j RETURN",
        "-m set --match-set tproxyd_excluded_destination_v4 dst -j RETURN",
        "-m set --match-set tproxyd_excluded_source_v4 src -j RETURN",
        "-p udp -m socket --transparent --restore-skmark -m mark --mark 0x2/0x2 -g TPROXYD_PORTS",
        "-p udp -m set --match-set tproxyd_inbound_v4 dst,dst,src -j RETURN",
        "-g TPROXYD_PORTS",
    ]
    assert rules(RULESET, 4, "raw", "TPROXYD_PORTS") == [
        "-p tcp -m tcp --dport 1:65535 -g TPROXYD_CLIENT",
        "-p udp -m udp --dport 1:65535 -g TPROXYD_CLIENT",
    ]


def test_ipv6_has_no_broadcast_and_wants_one_rule_for_multicast() -> None:
    assert rules(RULESET, 6, "raw", "TPROXYD_NEW")[1:3] == [
        "-m addrtype --dst-type LOCAL,ANYCAST -j RETURN",
        "-m addrtype --dst-type MULTICAST -j RETURN",
    ]


def test_an_open_gateway_wants_a_lease() -> None:
    unleased = "-m set ! --match-set tproxyd_lease_v4 src -j RETURN"
    assert rules(replace(RULESET, lease=True), 4, "raw", "TPROXYD_PORTS")[0] == unleased
    own = replace(RULESET, lease=True, own_traffic=True)
    assert rules(own, 4, "mangle", "TPROXYD_OWN_NEW")[0] == unleased
    assert "-m set --match-set tproxyd_lease_v4 src -m connmark --mark 0x1/0x1 -g TPROXYD_OURS" in (
        rules(own, 4, "mangle", "TPROXYD_OWN")
    )


def test_only_a_closed_gateway_takes_connections_that_began_elsewhere() -> None:
    """They are reset by the listener; those that came from the other side are let be."""
    lead = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -g TPROXYD_STRAY"
    assert rules(RULESET, 4, "mangle", "TPROXYD")[-2:] == [f"-i lan0 {lead}", f"-i lan1 {lead}"]
    assert rules(RULESET, 4, "mangle", "TPROXYD_STRAY") == [
        "-m addrtype --src-type LOCAL -j DROP",
        "-m conntrack --ctdir REPLY -j RETURN",
        "-m addrtype --dst-type LOCAL,BROADCAST,ANYCAST,MULTICAST -j RETURN",
        "-m set --match-set tproxyd_excluded_destination_v4 dst -j RETURN",
        "-m set --match-set tproxyd_excluded_source_v4 src -j RETURN",
        "-p tcp -m tcp --dport 1:65535 -g TPROXYD_LISTEN",
    ]
    opened = iptables.tables(replace(RULESET, lease=True), 4)
    assert rules(RULESET, 4, "mangle", "TPROXYD")[:-2] == [iptables.line(r) for r in opened["mangle"].chains["TPROXYD"]]
    assert "STRAY" not in " ".join(text for name, table in opened.items() for text in iptables.lines(name, table))
    led = [rule for rule in rules(replace(RULESET, lease=True), 4, "raw", "TPROXYD_RAW") if "-g TPROXYD_NEW" in rule]
    assert led == ["-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -g TPROXYD_NEW", "-p udp -g TPROXYD_NEW"]


def test_udp_flows_from_the_other_side_are_remembered_where_udp_is_intercepted() -> None:
    tables = iptables.tables(RULESET, 4)
    assert [iptables.line(rule) for rule in tables["mangle"].jumps["FORWARD"]][:1] == ["-j TPROXYD_INBOUND"]
    assert rules(RULESET, 4, "mangle", "TPROXYD_INBOUND") == [
        f"-o {name} -p udp -m conntrack --ctdir ORIGINAL -j SET --add-set tproxyd_inbound_v4 src,src,dst --exist"
        for name in ("lan0", "lan1")
    ]
    (inbound,) = (each for each in iptables.ip_sets(RULESET) if "inbound" in each.name)
    assert (inbound.version, inbound.kind, inbound.timeout_s) == (4, "hash:ip,port,ip", INBOUND_S)
    six = iptables.tables(RULESET, 6)
    assert "INBOUND" not in " ".join(text for name, table in six.items() for text in iptables.lines(name, table))


def test_a_full_cone_takes_datagrams_from_intercepted_ports_and_not_from_excluded_addresses() -> None:
    ports = (PortRange(53, 53), PortRange(1000, 2000))
    intercepts = (RULESET.intercepts[0], replace(RULESET.intercepts[1], ports=ports))
    assert rules(replace(RULESET, intercepts=intercepts), 4, "mangle", "TPROXYD_ANSWER") == [
        "-m set --match-set tproxyd_excluded_destination_v4 src -j RETURN",
        "-p udp -m multiport --sports 53,1000:2000 -m socket --transparent -g TPROXYD_OURS",
    ]


def test_marked_packets_go_to_the_listener_unless_a_socket_has_them_already() -> None:
    syn = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m mark --mark 0x1/0x1 -g TPROXYD_LISTEN"
    udp = "-p udp -m mark --mark 0x1/0x1 -g TPROXYD_LISTEN"
    assert rules(replace(RULESET, lease=True), 4, "mangle", "TPROXYD") == [
        f"-i lan0 {syn}",
        f"-i lan0 {udp}",
        f"-i lan1 {syn}",
        f"-i lan1 {udp}",
        "-m connmark --mark 0x2/0x2 -j RETURN",
        "-p udp -g TPROXYD_ANSWER",
        "-m socket --transparent -g TPROXYD_OURS",
        "-i lan0 -m mark --mark 0x1/0x1 -g TPROXYD_LISTEN",
        "-i lan1 -m mark --mark 0x1/0x1 -g TPROXYD_LISTEN",
    ]
    assert rules(RULESET, 4, "mangle", "TPROXYD_OURS") == ["-j MARK --set-xmark 0x1/0x1", "-j ACCEPT"]
    assert rules(RULESET, 4, "mangle", "TPROXYD_LISTEN") == [
        "-p tcp -j TPROXY --on-port 7440 --on-ip 127.0.0.1 --tproxy-mark 0x1/0x1",
        "-p udp -j TPROXY --on-port 7440 --on-ip 127.0.0.1 --tproxy-mark 0x1/0x1",
    ]
    assert rules(RULESET, 6, "mangle", "TPROXYD_LISTEN") == [
        "-p tcp -j TPROXY --on-port 7440 --on-ip ::1 --tproxy-mark 0x1/0x1",
    ]


def test_connections_that_are_let_by_are_remembered_and_those_of_tproxyd_are_not() -> None:
    assert rules(RULESET, 4, "mangle", "TPROXYD_LET_BY") == [
        f"-i {name} -p {network} -m conntrack --ctdir ORIGINAL -j CONNMARK --set-xmark 0x2/0x2"
        for name in ("lan0", "lan1")
        for network in ("tcp", "udp")
    ]
    assert rules(RULESET, 4, "mangle", "TPROXYD_TAKEN") == ["-m mark --mark 0x4/0x4 -j CONNMARK --set-xmark 0x0/0x2"]


RULES = (
    KernelRule("past", Action.BYPASS, 4, destinations=RulePrefixes(4, ("10.0.0.0/8",), "one")),
    KernelRule("hush", Action.DROP, 4, sources=RulePrefixes(4, ("10.0.0.0/9", "11.0.0.0/8"), "two")),
    KernelRule("six", Action.DROP, 6, sources=RulePrefixes(6, ("fd00::/8",), "three")),
    KernelRule("web", None, networks=(Network.TCP,), ports=(PortRange(80, 80), PortRange(443, 443))),
    KernelRule("no", Action.REJECT, interfaces=("lan0", "lo"), source_ports=(PortRange(1, 9),)),
)


def test_rules_come_between_what_is_known_and_the_listener() -> None:
    ruleset = replace(RULESET, rules=RULES)
    assert rules(ruleset, 4, "raw", "TPROXYD_NEW")[-2:] == [
        "-p tcp -m tcp --dport 1:65535 -g TPROXYD_RULES",
        "-p udp -m udp --dport 1:65535 -g TPROXYD_RULES",
    ]
    assert rules(ruleset, 4, "raw", "TPROXYD_RULES") == [
        "-d 10.0.0.0/8 -m comment --comment past -j RETURN",
        "-m set --match-set tproxyd_two src -m comment --comment hush -j DROP",
        "-p tcp -m multiport --dports 80,443 -m comment --comment web -g TPROXYD_PORTS",
        "-i lan0 -p udp -m udp --sport 1:9 -m comment --comment no -g TPROXYD_PORTS",
        "-i lan0 -p tcp -m tcp --sport 1:9 -m comment --comment no -g TPROXYD_REJECT",
        "-i lan0 -p udp -m udp --sport 1:9 -m comment --comment no -g TPROXYD_REJECT",
        "-g TPROXYD_PORTS",
    ]
    assert rules(ruleset, 6, "raw", "TPROXYD_RULES")[0] == "-s fd00::/8 -m comment --comment six -j DROP"
    assert [each.name for each in iptables.ip_sets(ruleset) if "two" in each.name] == ["tproxyd_two"]
    assert not any("three" in each.name or "one" in each.name for each in iptables.ip_sets(ruleset))


def test_refused_packets_go_to_table_filter_which_is_not_touched_otherwise() -> None:
    ruleset = replace(RULESET, rules=RULES)
    assert rules(ruleset, 4, "raw", "TPROXYD_REJECT") == ["-j MARK --set-xmark 0x7/0x7"]
    assert rules(ruleset, 4, "mangle", "TPROXYD")[0] == "-m mark --mark 0x7/0x7 -j ACCEPT"
    tcp = "-p tcp -m mark --mark 0x7/0x7 -j REJECT --reject-with tcp-reset"
    udp = "-p udp -m mark --mark 0x7/0x7 -j REJECT --reject-with icmp6-port-unreachable"
    assert rules(ruleset, 4, "filter", "TPROXYD_REFUSE") == [tcp]
    assert rules(ruleset, 6, "filter", "TPROXYD_REFUSE") == [tcp, udp]
    for without in (RULESET, replace(RULESET, rules=RULES[:-1])):
        assert iptables.lines("filter", iptables.tables(without, 4)["filter"]) == []


def test_what_a_worker_is_to_refuse_does_not_go_by_without_one() -> None:
    ruleset = replace(RULESET, rules=RULES, lease=True)
    assert rules(ruleset, 4, "raw", "TPROXYD_WORKER") == [
        "-m set ! --match-set tproxyd_lease_v4 src -j DROP",
        "-g TPROXYD_PORTS",
    ]


def test_own_traffic_is_hooked_on_output_and_loopback_only_when_wanted() -> None:
    own = iptables.tables(replace(RULESET, own_traffic=True), 4)["mangle"]
    assert set(own.jumps) == {"PREROUTING", "FORWARD", "OUTPUT"}
    assert rules(replace(RULESET, own_traffic=True), 4, "mangle", "TPROXYD_OWN")[:7] == [
        "-m mark --mark 0x2/0x2 -j RETURN",
        "-m mark --mark 0x4/0x4 -j RETURN",
        "-m conntrack --ctdir REPLY -j RETURN",
        "-m connmark --mark 0x1/0x1 -g TPROXYD_OURS",
        "-m conntrack ! --ctstate NEW -j RETURN",
        "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN",
        "-m addrtype --dst-type LOCAL,BROADCAST,ANYCAST,MULTICAST -j RETURN",
    ]
    assert "-i lo" in " ".join(rules(replace(RULESET, own_traffic=True), 4, "mangle", "TPROXYD"))
    others = iptables.tables(RULESET, 4)["mangle"]
    assert "TPROXYD_OWN" not in " ".join(iptables.lines("mangle", others))
    assert "-i lo" not in " ".join(rules(RULESET, 4, "mangle", "TPROXYD"))


def test_a_family_that_is_left_out_has_no_rules() -> None:
    tables = iptables.tables(replace(RULESET, versions=(4,)), 6)
    assert [iptables.lines(name, table) for name, table in tables.items()] == [[]] * 3


@pytest.mark.parametrize(
    ("ports", "matches"),
    [
        ([PortRange(80, 80)], ["-m tcp --dport 80"]),
        ([PortRange(1, 65535)], ["-m tcp --dport 1:65535"]),
        ([PortRange(80, 80), PortRange(1000, 2000)], ["-m multiport --dports 80,1000:2000"]),
    ],
)
def test_ports(ports: list[PortRange], matches: list[str]) -> None:
    found = rules(with_ports(*ports), 4, "raw", "TPROXYD_PORTS")
    assert found == [f"-p tcp {match} -g TPROXYD_CLIENT" for match in matches]


def test_more_ports_than_one_multiport_holds_are_split_and_none_is_lost() -> None:
    ports = [PortRange(n, n) for n in range(1, 20, 2)] + [PortRange(n, n + 5) for n in range(100, 210, 10)]
    found = rules(with_ports(*ports), 4, "raw", "TPROXYD_PORTS")
    held = [rule.split("--dports ")[1].split()[0].split(",") for rule in found]
    assert [port for group in held for port in group] == [str(each).replace("-", ":") for each in ports]
    assert all(sum(2 if ":" in port else 1 for port in group) <= 15 for group in held)
    assert len(held) == 3


def test_a_mark_with_a_mask_of_all_bits_is_listed_without_it() -> None:
    ruleset = replace(RULESET, client_mark=Mark(0x2, 0xFFFFFFFF))
    assert rules(ruleset, 4, "raw", "TPROXYD_OUT") == ["! -o lo -m mark --mark 0x2 -j CT --notrack"]


def test_prefixes_of_length_zero_become_two_halves() -> None:
    everything = (PrefixSet("destination", 4, ("0.0.0.0/0",)), PrefixSet("source", 6, ("::/0",)))
    four, six, _inbound = iptables.ip_sets(replace(RULESET, excluded=everything))
    assert four.prefixes == ("0.0.0.0/1", "128.0.0.0/1")
    assert six.prefixes == ("::/1", "8000::/1")


def test_set_names_fit_the_kernel() -> None:
    fields = [(field, version) for field in ("destination", "source") for version in (4, 6)]
    ruleset = replace(RULESET, lease=True, excluded=tuple(PrefixSet(f, v, ()) for f, v in fields))  # type: ignore[arg-type]
    sets = iptables.ip_sets(ruleset)
    assert len(sets) == 7
    assert all(len(ip_set.name) <= 31 for ip_set in sets)


def test_rendered_text_has_a_section_for_each_command() -> None:
    text = iptables.render(replace(RULESET, lease=True))
    sections = [line for line in text.splitlines() if line.startswith("#")]
    assert sections == ["# ipset restore", "# iptables-restore --noflush", "# ip6tables-restore --noflush"]
    assert "create tproxyd_excluded_source_v4 hash:net family inet maxelem 1048576\n" in text
    assert "create tproxyd_lease_v4 hash:net family inet maxelem 65536 timeout 0\n" in text
    assert "create tproxyd_inbound_v4 hash:ip,port,ip family inet maxelem 65536 timeout 180\n" in text
    assert "add tproxyd_excluded_destination_v6 ff00::/8\n" in text
    assert text.count("COMMIT\n") == 4
    assert "-I PREROUTING 1 -i lan0 -j TPROXYD_RAW\n-I PREROUTING 2 -i lan1 -j TPROXYD_RAW\n" in text
    assert text.index("*mangle") < text.index("*raw")


def test_a_rule_of_others_is_shown_with_its_repeated_and_negated_parts() -> None:
    rule = {"src": "!10.0.0.0/8", "protocol": "tcp", "comment": [{"comment": "a"}, {"comment": "b"}], "target": "DROP"}
    assert iptables.line(rule) == "! -s 10.0.0.0/8 -p tcp -m comment --comment a -m comment --comment b -j DROP"
    assert iptables.line({"in-interface": "lan0"}) == "-i lan0"
