"""What belongs to someone else is refused by name, and nothing is changed."""

from pathlib import Path

import pytest

from tests.lab import Gateway, ask, cli, exact_listings, service, write_config

MARKED = "table inet firewall {\n chain mangle {\n type filter hook prerouting priority -150\n %s\n }\n}\n"

CONFLICTS = {
    "a rule with our mark": (
        "ip rule add fwmark 0x1 lookup 100 priority 100",
        "ip rule del priority 100",
        "mark 0x1/0x1 is in use: ip -4 rule 100: fwmark 0x1/0xffffffff lookup 100",
    ),
    "a rule with our bit among its own": (
        "ip rule add fwmark 0x4/0xc lookup 100 priority 100",
        "ip rule del priority 100",
        "ip -4 rule 100: fwmark 0x4/0xc lookup 100: set another interception.server_mark",
    ),
    "an IPv6 rule with our priority": (
        "ip -6 rule add from 2001:db8::/32 lookup 100 priority 7440",
        "ip -6 rule del priority 7440",
        "rule priority 7440 is in use: ip -6 rule 7440: lookup 100",
    ),
    "a rule that leads to our table": (
        "ip rule add from 192.0.2.0/24 lookup 7440 priority 100",
        "ip rule del priority 100",
        "route table 7440 is in use: ip -4 rule 100: lookup 7440",
    ),
    "a route in our table": (
        "ip route add 192.0.2.0/24 dev wan0 table 7440",
        "ip route flush table 7440",
        "route table 7440 already holds the route 192.0.2.0/24",
    ),
    "a default route of IPv6 in our table": (
        "ip -6 route add default dev wan0 table 7440",
        "ip -6 route flush table 7440",
        "route table 7440 already holds a default route",
    ),
    "an nftables rule that sets our mark": (
        f"printf '{MARKED % 'meta mark set 0x1'}' | nft -f -",
        "nft delete table inet firewall",
        "mark 0x1/0x1 is in use: nftables inet firewall, chain mangle",
    ),
    "an nftables rule that matches our server mark": (
        f"printf '{MARKED % 'meta mark 0x4 drop'}' | nft -f -",
        "nft delete table inet firewall",
        "mark 0x4/0x4 is in use: nftables inet firewall, chain mangle",
    ),
    "an iptables rule that sets our mark": (
        "iptables-legacy -t mangle -A PREROUTING -i wan0 -j MARK --set-mark 0x1",
        "iptables-legacy -t mangle -F",
        "-t mangle -A PREROUTING -i wan0 -j MARK --set-xmark",
    ),
    "an ip6tables rule that sets our client mark": (
        "ip6tables-legacy -t mangle -A OUTPUT -j MARK --or-mark 0x2",
        "ip6tables-legacy -t mangle -F",
        "-t mangle -A OUTPUT -j MARK --set-xmark 0x2/0x2",
    ),
    "an iptables-nft rule that sets our mark": (
        "iptables-nft -t mangle -A PREROUTING -j MARK --set-mark 0x1/0x1",
        "iptables-nft -t mangle -F; nft flush ruleset",
        "mark 0x1/0x1 is in use: ",
    ),
    "reverse-path filtering that heeds marks": (
        "sysctl -qw net.ipv4.conf.lan0.rp_filter=1 net.ipv4.conf.lan0.src_valid_mark=1",
        "sysctl -qw net.ipv4.conf.lan0.rp_filter=0 net.ipv4.conf.lan0.src_valid_mark=0",
        "src_valid_mark=1",
    ),
}
OF_ONE_BACK_END = {
    "nftables": (
        "nft add table inet tproxyd",
        "nft delete table inet tproxyd",
        "nftables table inet tproxyd exists and is not tproxyd's",
    ),
    "iptables": (
        "ipset create tproxyd_mine hash:ip",
        "ipset destroy tproxyd_mine",
        "ipset tproxyd_mine exists and is not tproxyd's",
    ),
}
FIREWALL = """
table inet firewall {
    chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        meta mark & 0x1 == 0x1 accept
        meta l4proto ipv6-icmp accept
    }
}
"""
HARMLESS = {
    "a mark beside ours": "ip rule add fwmark 0x8/0x8 lookup 100 priority 100",
    "an inverted mark": "ip rule add not fwmark 0x100/0x100 lookup 100 priority 100",
    "a table of our name in another family": "nft add table ip tproxyd",
    "a connection mark": f"printf '{MARKED % 'ct mark set 0x1'}' | nft -f -",
}
UNDO = "ip rule del priority 100 2>/dev/null; nft flush ruleset"


def check_refused(lab: Gateway, tmp_path: Path, ruleset: str, conflict: tuple[str, str, str]) -> None:
    place, take_away, message = conflict
    lab.gateway.run(["sh", "-ec", place])
    before = exact_listings(lab.gateway)
    path = write_config(tmp_path, interception={"ruleset": ruleset})
    for option in ([], ["--dry-run"]):
        done = cli(lab.gateway, "apply-rules", "-c", path, *option)
        assert done.returncode == 1, done
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert exact_listings(lab.gateway) == before
    lab.gateway.run(["sh", "-ec", take_away])


@pytest.mark.parametrize("what", CONFLICTS)
def test_what_is_in_use_is_refused_with_its_holder(lab: Gateway, tmp_path: Path, ruleset: str, what: str) -> None:
    check_refused(lab, tmp_path, ruleset, CONFLICTS[what])


def test_our_name_held_by_someone_else_is_refused(lab: Gateway, tmp_path: Path, ruleset: str) -> None:
    check_refused(lab, tmp_path, ruleset, OF_ONE_BACK_END[ruleset])


def test_removal_leaves_a_foreign_table_of_our_name(lab: Gateway) -> None:
    lab.gateway.nft("add table inet tproxyd\nadd chain inet tproxyd mine\n")
    before = exact_listings(lab.gateway)
    cli(lab.gateway, "remove-rules")
    assert exact_listings(lab.gateway) == before
    lab.gateway.nft("delete table inet tproxyd")


@pytest.mark.parametrize("what", HARMLESS)
def test_what_only_looks_like_ours_is_no_conflict(lab: Gateway, tmp_path: Path, ruleset: str, what: str) -> None:
    lab.gateway.run(["sh", "-ec", HARMLESS[what]])
    before = exact_listings(lab.gateway)
    done = cli(lab.gateway, "apply-rules", "-c", write_config(tmp_path, interception={"ruleset": ruleset}))
    assert done.returncode == 0, done.stderr
    assert cli(lab.gateway, "remove-rules").returncode == 0
    if ruleset == "nftables":
        assert exact_listings(lab.gateway) == before
    lab.gateway.run(["sh", "-c", UNDO])


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_a_firewall_that_lets_our_mark_in_stands_before_the_daemon(
    lab: Gateway, daemon, ruleset: str, on_failure: str
) -> None:
    """The input chain that the README asks for."""
    lab.gateway.nft(FIREWALL)
    running = daemon(interception={"ruleset": ruleset, "on_failure": on_failure})
    for version in (4, 6):
        for network in ("tcp", "udp"):
            with service(lab.server, network, lab.server_address(version)) as far:
                assert ask(lab.client, network, far.address) in far.peers
    assert len(running.wait_flow_ends(4)) == 4
    with service(lab.gateway, "tcp", lab.gateway_address(4)) as own, pytest.raises(TimeoutError):
        ask(lab.client, "tcp", own.address, timeout_s=0.3)  # the firewall works
    lab.gateway.nft("delete table inet firewall")
