"""apply-rules and remove-rules: all or nothing, again and again the same, and nobody else's rules touched."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import Gateway, Residue, TcpService, cli, exact_listings, listings, write_config
from tests.lab.namespace import Namespace
from tproxyd.errors import RulesetError
from tproxyd.netfilter import iptables_part, nft_part, routing
from tproxyd.netfilter.nft_part import NftPart

FOREIGN_NFT = """
table inet foreign {
    set blocked {
        type ipv4_addr
        flags interval
        elements = { 192.0.2.0/24 }
    }
    chain before {
        type filter hook prerouting priority -301
        ip saddr @blocked counter drop
    }
    chain beside {
        type filter hook prerouting priority mangle
        iifname eth9 meta mark set meta mark | 0x00000100
    }
    chain out {
        type route hook output priority mangle
        tcp dport 9 counter accept
    }
}
table ip tproxyd {
    chain prerouting {
        type filter hook prerouting priority mangle
        udp dport 9 counter
    }
}
"""
FOREIGN_IPTABLES = """
*raw
:HELPERS - [0:0]
-A PREROUTING -p udp -m udp --dport 69 -j CT --helper tftp
-A PREROUTING -j HELPERS
-A OUTPUT -m statistic --mode random --probability 0.50000000000 -j HELPERS
-A HELPERS -m comment --comment "TPROXYD is not in charge here" -j RETURN
COMMIT
*mangle
:MYTPROXYD - [0:0]
-A PREROUTING -m connmark --mark 0x100/0x100 -j CONNMARK --restore-mark --nfmask 0x100 --ctmask 0x100
-A PREROUTING -i eth9 -m set --match-set foreign src -j MYTPROXYD
-A OUTPUT -o eth9 -m owner --uid-owner 12 -j MARK --set-xmark 0x100/0x100
-A POSTROUTING -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
COMMIT
*nat
-A POSTROUTING -o eth9 -j MASQUERADE
COMMIT
"""

BREAKAGES = {
    "nftables": {
        "rule": "ip rule del priority 7440",
        "rule of IPv6": "ip -6 rule del priority 7440",
        "route": "ip route flush table 7440",
        "routes and rules": "ip route flush table 7440; ip rule del priority 7440; ip -6 route flush table 7440",
        "table": "nft delete table inet tproxyd",
        "chain": "nft flush chain inet tproxyd divert",
        "added rule": "nft insert rule inet tproxyd divert accept",
        "element": "nft delete element inet tproxyd excluded_destination_v4 '{ 192.0.2.0/24 }'",
        "no digests": "nft delete set inet tproxyd applied",
    },
    "iptables": {
        "rule": "ip rule del priority 7440",
        "route of IPv6": "ip -6 route flush table 7440",
        "jump": "iptables-legacy -t mangle -D PREROUTING -j TPROXYD",
        "chain": "iptables-legacy -t mangle -F TPROXYD",
        "added rule": "ip6tables-legacy -t mangle -I TPROXYD -j ACCEPT",
        "table": "iptables-legacy -t raw -F; iptables-legacy -t raw -X",
        "all of a family": "for t in raw mangle; do ip6tables-legacy -t $t -F; ip6tables-legacy -t $t -X; done",
        "element": "ipset del tproxyd_excluded_destination_v4 192.0.2.0/24",
        "half-filled set": "ipset create tproxyd_new hash:net",
        "old set": "ipset create tproxyd_old hash:net family inet6",
    },
}
HALVES = [(ruleset, what) for ruleset, ways in BREAKAGES.items() for what in ways]


@pytest.fixture
def apply(lab: Gateway, tmp_path: Path) -> Callable[..., str]:
    """Apply a configuration, by default with an excluded prefix; returns what the command printed."""

    def applied(*options: str, **interception: object) -> str:
        excluded = {"destinations": ["192.0.2.0/24", "2001:db8::/32"]}
        wanted = {"interfaces": ["lan0"], "exclude": excluded} | interception
        done = cli(lab.gateway, "apply-rules", "-c", write_config(tmp_path, interception=wanted), *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return applied


def remove(namespace: Namespace) -> str:
    done = cli(namespace, "remove-rules")
    assert done.returncode == 0, done.stderr
    return done.stdout


def packets_counted(namespace: Namespace) -> list[int]:
    """By our legacy rules, where they are not zero."""
    saved = namespace.run(["iptables-legacy-save", "-c"]).stdout
    return [int(count) for count in re.findall(r"(?m)^\[(\d+):\d+\] -A .*TPROXYD", saved) if int(count)]


def place_foreign_rules(namespace: Namespace) -> None:
    namespace.nft(FOREIGN_NFT)
    namespace.run(["ipset", "create", "foreign", "hash:net"])
    namespace.run(["iptables-legacy-restore", "--noflush"], input=FOREIGN_IPTABLES)
    namespace.run(["ip6tables-legacy", "-t", "mangle", "-A", "PREROUTING", "-i", "eth9", "-j", "ACCEPT"])
    namespace.run(["ip6tables-legacy", "-t", "raw", "-A", "OUTPUT", "-o", "eth9", "-j", "ACCEPT"])
    namespace.run(
        ["iptables-nft", "-t", "mangle", "-A", "PREROUTING", "-i", "eth9", "-j", "MARK", "--or-mark", "0x100"]
    )
    namespace.run(["iptables-nft", "-t", "raw", "-A", "OUTPUT", "-p", "udp", "--dport", "9", "-j", "ACCEPT"])
    namespace.ip(
        "rule add fwmark 0x100/0x100 lookup 100 priority 100\n"
        "rule add fwmark 0x8/0x8 lookup 100 priority 7439\n"
        "route add local default dev lo table 100\n"
        "route add 198.51.100.0/24 dev wan0 table 7441\n"
    )


def take_foreign_rules_away(namespace: Namespace) -> None:
    namespace.nft("flush ruleset")
    for command in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("raw", "mangle", "nat"):
            namespace.run(["sh", "-c", f"{command} -t {table} -F; {command} -t {table} -X"])
    namespace.run(["ipset", "destroy", "foreign"])
    namespace.ip("rule del priority 100\nrule del priority 7439\nroute flush table 100\nroute flush table 7441\n")


def others(lines: list[str]) -> list[str]:
    """The listing without what is tproxyd's."""
    ours = ("TPROXYD_", ":TPROXYD ", "-A TPROXYD ", "-j TPROXYD", "tproxyd_", "7440")
    shown = "\n".join(line for line in lines if not any(part in line for part in ours))
    before, found, after = shown.partition("table inet tproxyd {\n")
    return (before + after.partition("\n}\n")[2] if found else shown).splitlines()


def test_applying_twice_changes_no_byte(lab: Gateway, apply, ruleset: str) -> None:
    assert apply(ruleset=ruleset) == "applied\n"
    with TcpService(lab.server, lab.server_address(4)) as service, pytest.raises(OSError, match="timed out"):
        lab.client.tcp(service.address, timeout_s=0.1)  # makes iptables count
    before, counted = exact_listings(lab.gateway), packets_counted(lab.gateway)
    assert bool(counted) == (ruleset == "iptables")
    assert apply(ruleset=ruleset) == "nothing to change\n"
    assert exact_listings(lab.gateway) == before
    assert all(count >= earlier for count, earlier in zip(packets_counted(lab.gateway), counted, strict=True))
    assert remove(lab.gateway) == "removed\n"
    assert remove(lab.gateway) == "nothing to remove\n"


def test_every_option_is_applied_and_read_back(lab: Gateway, apply, ruleset: str) -> None:
    before = Residue.of(lab.gateway)
    options = {
        "interfaces": ["lan0", "wan0", "not-there"],
        "tcp_ports": [22, "80-90", 443, "1000-1001", *range(2000, 2040, 2)],
        "udp_ports": [53],
        "on_failure": "open",
        "own_traffic": True,
        "mark": "0x10/0xf0",
        "client_mark": "0x300/0xf00",
        "server_mark": "0x400000/0xf00000",
        "exclude": {"destinations": ["0.0.0.0/1", "2001:db8::1"], "sources": ["10.1.0.9/32", "fd01::9", "::/0"]},
    }
    assert apply(ruleset=ruleset, **options) == "applied\n"
    assert apply(ruleset=ruleset, **options) == "nothing to change\n"
    remove(lab.gateway)
    assert not before.difference(Residue.of(lab.gateway))


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_one_family_leaves_the_other_alone(lab: Gateway, apply, ruleset: str, family: str) -> None:
    other = {"ipv4": "ip -6 rule", "ipv6": "ip rule"}[family]
    before = lab.gateway.run(other.split()).stdout
    apply(ruleset=ruleset, families=[family])
    assert lab.gateway.run(other.split()).stdout == before
    apply(ruleset=ruleset)
    apply(ruleset=ruleset, families=[family])
    assert lab.gateway.run(other.split()).stdout == before
    remove(lab.gateway)


@pytest.mark.parametrize(("ruleset", "what"), HALVES)
def test_half_a_ruleset_is_made_whole_or_removed(lab: Gateway, apply, ruleset: str, what: str) -> None:
    before = Residue.of(lab.gateway)
    apply(ruleset=ruleset)
    whole = listings(lab.gateway)
    lab.gateway.run(["sh", "-ec", BREAKAGES[ruleset][what]])
    assert listings(lab.gateway) != whole
    assert apply(ruleset=ruleset) == "applied\n"
    assert listings(lab.gateway) == whole
    lab.gateway.run(["sh", "-ec", BREAKAGES[ruleset][what]])
    assert remove(lab.gateway) == "removed\n"
    assert not before.difference(Residue.of(lab.gateway))


def test_others_rules_stay_as_they_are(lab: Gateway, apply, ruleset: str) -> None:
    place_foreign_rules(lab.gateway)
    before = listings(lab.gateway)
    apply(ruleset=ruleset)
    assert others(listings(lab.gateway)) == before
    apply(ruleset=ruleset, own_traffic=True, on_failure="open")
    assert others(listings(lab.gateway)) == before
    remove(lab.gateway)
    assert listings(lab.gateway) == before
    take_foreign_rules_away(lab.gateway)


def test_rules_that_others_add_later_survive_too(lab: Gateway, apply, ruleset: str) -> None:
    apply(ruleset=ruleset)
    place_foreign_rules(lab.gateway)
    lab.gateway.run(["iptables-legacy", "-t", "mangle", "-I", "PREROUTING", "-i", "eth8", "-j", "ACCEPT"])
    lab.gateway.run(["iptables-legacy", "-t", "raw", "-I", "OUTPUT", "-o", "eth8", "-j", "ACCEPT"])
    assert apply(ruleset=ruleset) == "nothing to change\n"
    foreign = others(listings(lab.gateway))
    assert sum("eth8" in line for line in foreign) == 2
    apply(ruleset=ruleset, exclude={})
    assert others(listings(lab.gateway)) == foreign
    remove(lab.gateway)
    assert listings(lab.gateway) == foreign
    take_foreign_rules_away(lab.gateway)


def test_switching_back_ends_leaves_only_the_new_one(lab: Gateway, apply) -> None:
    before = Residue.of(lab.gateway)
    apply(ruleset="nftables")
    first = Residue.of(lab.gateway)
    assert "inet tproxyd" in lab.gateway.run(["nft", "list", "tables"]).stdout
    apply(ruleset="iptables")
    assert "inet tproxyd" not in lab.gateway.run(["nft", "list", "tables"]).stdout
    assert "TPROXYD" in lab.gateway.run(["iptables-legacy-save"]).stdout
    apply(ruleset="nftables")
    assert not first.difference(Residue.of(lab.gateway))
    remove(lab.gateway)
    assert not before.difference(Residue.of(lab.gateway))


def test_a_change_of_marks_tables_and_priorities_leaves_nothing_of_the_old(lab: Gateway, apply, ruleset: str) -> None:
    apply(ruleset=ruleset, mark="0x10/0x10", route_table=99, rule_priority=99, families=["ipv6"])
    apply(ruleset=ruleset)
    whole = listings(lab.gateway)
    remove(lab.gateway)
    apply(ruleset=ruleset)
    assert listings(lab.gateway) == whole
    remove(lab.gateway)


# Failures half-way


def fail_after_writing_nftables() -> None:
    write = NftPart.write

    def failing(part: NftPart) -> None:
        write(part)
        raise RulesetError("provoked")

    nft_part.NftPart.write = failing  # type: ignore[method-assign]


def fail_in_the_second_family() -> None:
    write = iptables_part._write_family

    def failing(version: int, wanted: object) -> None:
        if version == 6 and wanted["mangle"].chains:  # type: ignore[index]
            raise RulesetError("provoked")
        write(version, wanted)  # type: ignore[arg-type]

    iptables_part._write_family = failing  # type: ignore[assignment]


def fail_in_routing() -> None:
    change = routing._change

    def failing(netlink: object, command: str, item: object) -> None:
        if command == "add" and isinstance(item, routing.Rule) and item.version == 6:
            routing._change = change
            raise RulesetError("provoked")
        change(netlink, command, item)  # type: ignore[arg-type]

    routing._change = failing  # type: ignore[assignment]


FAILURES = [
    ("nftables", fail_after_writing_nftables),
    ("nftables", fail_in_routing),
    ("iptables", fail_in_the_second_family),
    ("iptables", fail_in_routing),
]


def apply_with(patch: Callable[[], None], path: Path) -> str:
    """Runs in a child: patch the product, apply; returns the error."""
    from tproxyd.config import load_config
    from tproxyd.netfilter.apply import Application

    patch()
    try:
        Application(load_config(path)).apply()
    except RulesetError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("earlier", ["nothing", "nftables", "iptables"])
@pytest.mark.parametrize(("ruleset", "patch"), FAILURES)
def test_a_failure_half_way_leaves_the_box_as_it_was(
    lab: Gateway, apply, tmp_path: Path, ruleset: str, patch: Callable[[], None], earlier: str
) -> None:
    if earlier != "nothing":
        apply(ruleset=earlier, families=["ipv4"], exclude={"sources": ["198.51.100.0/24"]})
    before = Residue.of(lab.gateway)
    path = write_config(tmp_path, interception={"ruleset": ruleset, "on_failure": "open"})
    assert lab.gateway.call(apply_with, patch, path) == "provoked"
    assert not before.difference(Residue.of(lab.gateway))
    remove(lab.gateway)


def fail_to_remove_the_old() -> None:
    for part in (nft_part.NftPart, iptables_part.IptablesPart):
        restore = part.restore

        def failing(self: object, snapshot: object, restore: Callable[..., None] = restore) -> None:
            if snapshot is None and self._ruleset is None:  # type: ignore[attr-defined]
                raise RulesetError("provoked")
            restore(self, snapshot)

        part.restore = failing  # type: ignore[assignment, method-assign]


def test_an_old_back_end_that_stays_takes_the_new_one_back(lab: Gateway, apply, tmp_path: Path, ruleset: str) -> None:
    apply(ruleset={"nftables": "iptables", "iptables": "nftables"}[ruleset])
    before = Residue.of(lab.gateway)
    path = write_config(tmp_path, interception={"ruleset": ruleset})
    assert lab.gateway.call(apply_with, fail_to_remove_the_old, path) == "provoked"
    assert not before.difference(Residue.of(lab.gateway))
    remove(lab.gateway)


def die_before_netfilter() -> None:
    import os

    for part in (nft_part.NftPart, iptables_part.IptablesPart):
        part.write = lambda _: os._exit(9)  # type: ignore[method-assign, assignment]


def test_an_interrupted_run_converges_on_the_next(lab: Gateway, apply, tmp_path: Path, ruleset: str) -> None:
    path = write_config(tmp_path, interception={"ruleset": ruleset})
    with pytest.raises(EOFError):
        lab.gateway.call(apply_with, die_before_netfilter, path)
    assert "fwmark 0x1/0x1" in lab.gateway.run(["ip", "rule"]).stdout
    apply(ruleset=ruleset)
    whole = listings(lab.gateway)
    remove(lab.gateway)
    apply(ruleset=ruleset)
    assert listings(lab.gateway) == whole
    remove(lab.gateway)


# Dry runs


def test_dry_run_names_what_would_change_and_changes_nothing(lab: Gateway, apply, ruleset: str) -> None:
    before = exact_listings(lab.gateway)
    shown = apply("--dry-run", ruleset=ruleset)
    assert exact_listings(lab.gateway) == before
    named = {
        "nftables": ("+table inet tproxyd {", "tproxy ip to 127.0.0.1:7440", "192.0.2.0/24"),
        "iptables": ("+-A PREROUTING -i lan0 -j TPROXYD_RAW", "--on-port 7440", "192.0.2.0/24"),
    }[ruleset]
    for part in (*named, "+ip -4 rule 7440: fwmark 0x1/0x1 lookup 7440", "+ip -6 route: local default"):
        assert part in shown
    apply(ruleset=ruleset)
    before = exact_listings(lab.gateway)
    assert apply("--dry-run", ruleset=ruleset) == "nothing to change\n"
    shown = apply("--dry-run", ruleset=ruleset, route_table=99, exclude={"destinations": ["203.0.113.7/32"]})
    assert "-ip -4 rule 7440" in shown
    assert "203.0.113.7" in shown
    assert [line for line in shown.splitlines() if line.startswith("-") and "192.0.2.0/24" in line]
    assert exact_listings(lab.gateway) == before
    remove(lab.gateway)


def test_dry_run_tells_of_the_other_back_end(lab: Gateway, apply) -> None:
    apply(ruleset="iptables")
    before = exact_listings(lab.gateway)
    assert "-iptables: tproxyd's rules" in apply("--dry-run", ruleset="nftables")
    assert exact_listings(lab.gateway) == before
    remove(lab.gateway)
