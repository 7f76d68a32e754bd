"""The ruleset as nftables text: what must hold whatever the configuration."""

import re
from dataclasses import replace
from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from tproxyd.config import Config, Interception, Mark, PortRange
from tproxyd.config.model import Exclude
from tproxyd.flow import Action, Network
from tproxyd.netfilter import nft
from tproxyd.netfilter.plan import Ruleset, plan
from tproxyd.netfilter.rules import KernelRule, RulePrefixes

PREFIXES = st.lists(
    st.one_of(st.ip_addresses(v=4).map(lambda a: f"{a}/24"), st.ip_addresses(v=6).map(lambda a: f"{a}/48")), max_size=6
).map(lambda texts: tuple(ip_network(text, strict=False) for text in texts))
PORTS = st.lists(st.integers(1, 65535), min_size=1, max_size=5, unique=True).map(
    lambda ports: tuple(PortRange(port, port) for port in sorted(ports))
)
INTERCEPTIONS = st.builds(
    Interception,
    interfaces=st.lists(st.sampled_from(["lan0", "lan1", "wlan0"]), min_size=1, unique=True).map(tuple),
    families=st.sampled_from([("ipv4",), ("ipv6",), ("ipv4", "ipv6")]),
    tcp_ports=PORTS,
    udp_ports=st.one_of(st.just(()), PORTS),
    exclude=st.builds(Exclude, destinations=PREFIXES, sources=PREFIXES),
    own_traffic=st.booleans(),
    on_failure=st.sampled_from(["closed", "open"]),
    learned_flows=st.booleans(),
    mark=st.sampled_from([Mark(0x1, 0x1), Mark(0x10, 0xF0), Mark(0x80000000, 0x80000000)]),
)
RULESETS = INTERCEPTIONS.map(lambda interception: plan(Config(interception=interception)))


def base() -> Ruleset:
    return plan(Config(interception=Interception(interfaces=("lan0",))))


def elements(text: str) -> dict[str, list[str]]:
    found = re.findall(r"set (\w+) \{[^}]*?elements = \{([^}]*)\}", text)
    return {name: listed.replace(",", " ").split() for name, listed in found}


def block(text: str, chain: str) -> str:
    found = re.search(rf"\tchain {chain} \{{\n(.*?)\n\t\}}", text, re.DOTALL)
    assert found is not None, chain
    return found[1]


@given(RULESETS)
def test_sets_hold_the_planned_prefixes(ruleset: Ruleset) -> None:
    held = elements(nft.render(ruleset))
    assert held == {prefix_set.name: list(prefix_set.prefixes) for prefix_set in ruleset.excluded}


@given(RULESETS)
def test_it_is_one_transaction_that_touches_one_table(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    assert text.startswith("add table inet tproxyd\ndelete table inet tproxyd\ntable inet tproxyd {\n")
    assert re.findall(r"(?m)^\S.*", text)[3:] == ["}"]
    assert text.count("{") == text.count("}")


@given(RULESETS)
def test_whatever_is_named_is_defined(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    assert set(re.findall(r"@(\w+)", text)) == set(re.findall(r"\tset (\w+)", text))
    assert set(re.findall(r"(?:goto|jump) (\w+)", text)) <= set(re.findall(r"\tchain (\w+)", text))


@given(RULESETS)
def test_each_family_is_guarded_by_its_protocol(ruleset: Ruleset) -> None:
    """tproxy in a table of family inet must never see a packet of the other family."""
    for line in nft.render(ruleset).splitlines():
        for version, keyword in ((4, "tproxy ip to"), (6, "tproxy ip6 to")):
            if keyword in line:
                assert f"meta nfproto ipv{version} " in line


@given(RULESETS)
def test_closed_has_a_last_word_and_open_a_lease(ruleset: Ruleset) -> None:
    lines = block(nft.render(ruleset), "to_listener").splitlines()
    drops = [number for number, line in enumerate(lines) if line.endswith(" drop") and "dport" in line]
    assert len(drops) == (0 if ruleset.lease else len(ruleset.intercepts))
    assert ("!= @lease return" in lines[0]) == ruleset.lease
    if not ruleset.lease:
        assert max(number for number, line in enumerate(lines) if " tproxy " in line) < drops[0]


@given(RULESETS)
def test_a_client_that_claims_an_address_of_the_box_is_dropped_first(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    assert block(text, "new_flow").splitlines()[0].strip() == "fib saddr type local drop"
    if ruleset.own_traffic:
        assert "fib saddr" not in block(text, "own_new_flow"), "the box itself may"


@given(RULESETS)
def test_only_a_closed_gateway_resets_connections_that_began_elsewhere(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    assert ("\tchain stray {" in text) == ("goto stray" in text) == (not ruleset.lease)
    if not ruleset.lease:
        stray = block(text, "stray")
        first, second = (line.strip() for line in stray.splitlines()[:2])
        assert (first, second) == ("fib saddr type local drop", "ct direction reply return")
        assert "udp" not in stray
        assert "notrack" not in stray, "it is tracked already"


@given(RULESETS)
def test_udp_flows_from_the_other_side_are_remembered_and_their_answers_let_be(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    for version in (4, 6):
        name = f"inbound_v{version}"
        wanted = any(each.network is Network.UDP and each.version == version for each in ruleset.intercepts)
        assert (f"\tset {name} {{" in text) == wanted
        if wanted:
            assert f"ct direction original update @{name} " in block(text, "inbound")
            new = block(text, "new_flow")
            known = new.index("socket transparent 1 socket mark")
            assert known < new.index(f"@{name} return") < new.rindex("goto to_listener")


@given(RULESETS)
def test_a_full_cone_takes_nothing_from_excluded_addresses_or_other_ports(ruleset: Ruleset) -> None:
    text = block(nft.render(ruleset), "divert")
    ours = text.index("socket transparent 1 meta mark set")
    for prefix_set in ruleset.excluded:
        guard = f"saddr @{prefix_set.name} return"
        assert (guard in text) == (prefix_set.field == "destination")
        assert guard not in text[ours:]
    intercepted = any(each.network is Network.UDP for each in ruleset.intercepts)
    assert ("udp sport != " in text[:ours]) == intercepted


@given(RULESETS)
def test_learned_flows_come_before_anything_that_would_take_them(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    assert ("learned" in text) == (ruleset.learned is not None)
    if ruleset.learned is None:
        return
    for chain, jump, taker in (
        ("intercept", "jump learned_raw", "goto new_flow"),
        ("divert", "jump learned_tracked", "socket transparent"),
    ):
        lines = block(text, chain)
        assert lines.index(jump) < lines.index(taker)
    for line in block(text, "learned_raw").splitlines():
        assert line.endswith("meta nfproto @learned_lease accept"), "not past the daemon's end"
    for line in block(text, "learned_forwarded").splitlines()[1:]:
        assert line.index("@left_") < line.index(" update @learned_"), "what is not learned is not made so"


@given(RULESETS)
def test_exclusions_come_before_interception(ruleset: Ruleset) -> None:
    text = block(nft.render(ruleset), "new_flow")
    assert text.splitlines()[-1].strip() == "goto to_listener"
    assert " tproxy " not in text
    assert "fib daddr type { local, broadcast, anycast, multicast } return" in text


@given(RULESETS)
def test_own_traffic_alone_hooks_the_output(ruleset: Ruleset) -> None:
    text = nft.render(ruleset)
    assert ("type route hook output" in text) == ruleset.own_traffic


@given(RULESETS)
def test_marks_are_always_set_and_matched_under_their_mask(ruleset: Ruleset) -> None:
    for statement in re.findall(r"(?:meta|socket|ct) mark (?:set (?:meta|ct) mark )?(.{1,14})", nft.render(ruleset)):
        assert re.match(r"[&|] 0x[0-9a-f]{8}", statement), "a mark without its mask"


def test_rendering_is_the_same_each_time_and_differs_with_the_ruleset() -> None:
    assert nft.render(base()) == nft.render(base())
    assert nft.render(base()) != nft.render(replace(base(), lease=True))
    assert nft.render(base()) != nft.render(replace(base(), interfaces=("lan1",)))


def test_a_mark_of_several_bits_leaves_the_others_alone() -> None:
    text = nft.render(replace(base(), mark=Mark(0x10, 0xF0)))
    assert "meta mark set meta mark & 0xffffff0f | 0x00000010" in text
    assert "meta mark & 0x000000f0 == 0x00000010" in text


RULES = (
    KernelRule("past", Action.BYPASS, 4, destinations=RulePrefixes(4, ("10.0.0.0/8",), "one")),
    KernelRule("hush", Action.DROP, 6, sources=RulePrefixes(6, ("fd00::/8", "fe00::/9"), "two")),
    KernelRule("web", None, networks=(Network.TCP,), ports=(PortRange(80, 80), PortRange(443, 443))),
    KernelRule("no", Action.REJECT, interfaces=("lan0", "lo"), source_ports=(PortRange(1, 9),)),
    KernelRule("tcp", Action.DROP, 4, networks=(Network.TCP,)),
)


def lines_of(text: str, chain: str) -> list[str]:
    return [line.strip() for line in block(text, chain).splitlines()]


def test_rules_are_asked_about_what_would_be_intercepted() -> None:
    text = nft.render(replace(base(), rules=RULES))
    new = block(text, "new_flow")
    assert new.index("@inbound_v6 return") < new.index("jump rules") < new.rindex("goto to_listener")
    assert lines_of(text, "rules") == [
        'ip daddr 10.0.0.0/8 counter accept comment "past"',
        'ip6 saddr @two counter drop comment "hush"',
        'tcp dport { 80, 443 } counter return comment "web"',
        'iifname "lan0" th sport 1-9 counter meta mark set meta mark | 0x00000007 accept comment "no"',
        'meta nfproto ipv4 meta l4proto tcp counter drop comment "tcp"',
    ]
    assert elements(text)["two"] == ["fd00::/8", "fe00::/9"]
    assert "one" not in elements(text)


def test_the_boxs_own_flows_come_in_nowhere_and_a_worker_refuses_some() -> None:
    ruleset = replace(base(), rules=RULES[3:4], own_traffic=True, lease=True)
    assert lines_of(nft.render(ruleset), "own_rules") == [
        'meta nfproto ipv4 udp sport 1-9 meta nfproto != @lease drop comment "no"',
        'meta nfproto ipv4 udp sport 1-9 counter return comment "no"',
        'th sport 1-9 counter meta mark set meta mark | 0x00000007 accept comment "no"',
    ]


def test_packets_are_refused_behind_whatever_marks_them() -> None:
    refusing = nft.render(replace(base(), rules=RULES))
    assert lines_of(refusing, "refuse")[0] == "type filter hook prerouting priority mangle + 6; policy accept;"
    assert "priority mangle + 5;" in block(refusing, "divert")
    assert "chain refuse" not in nft.render(replace(base(), rules=RULES[:3]))


def test_no_rules_no_chains_for_them() -> None:
    text = nft.render(replace(base(), own_traffic=True))
    assert "rules" not in text
    assert "reject" not in text
