"""The policy's compiled forms, the worker's and the kernel's, agree with asking rule by rule."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tproxyd.config import parse_config
from tproxyd.flow import Action, Client, Decision, Flow, Network, OrigDst
from tproxyd.netfilter.iptables_rules import Targets, rule_chain
from tproxyd.netfilter.plan import Ruleset, plan, rules_of, surroundings
from tproxyd.netfilter.rules import KernelRule, RulePrefixes, with_refusals_left_to_workers
from tproxyd.policy import Match, Policy, Rule, Rules, decide_naively
from tproxyd.policy.address import number_of
from tproxyd.policy.explain import explain
from tproxyd.policy.table import IntervalTable

INTERFACES = ["lan0", "guests", "lo"]
# Few addresses and ports, close to each other, so that rules and flows meet.
V4 = [f"10.0.{high}.{low}" for high in (0, 1) for low in (0, 1, 2, 3, 255)]
V6 = [f"2001:db8::{high}:{low}" for high in (0, 1) for low in (0, 1, 2, 3, "ffff")]
ADDRESSES = {4: st.sampled_from(V4), 6: st.sampled_from([str(ip_address(text)) for text in V6])}
PORT = st.integers(1, 9)
RANGE = st.tuples(PORT, PORT).map(lambda two: (min(two), max(two)))
PREFIX = st.one_of(
    st.tuples(ADDRESSES[4], st.sampled_from([0, 8, 23, 24, 31, 32])),
    st.tuples(ADDRESSES[6], st.sampled_from([0, 32, 111, 112, 127, 128])),
).map(lambda two: ip_network(f"{two[0]}/{two[1]}", strict=False))


def some(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.just(()), st.lists(values, min_size=1, max_size=4).map(tuple))


def names(*known: str) -> st.SearchStrategy:
    return some(st.sampled_from(known)).map(lambda found: tuple(dict.fromkeys(found)))


MATCH = st.builds(
    Match,
    networks=names("tcp", "udp").map(lambda found: tuple(map(Network, found))),
    interfaces=names(*INTERFACES),
    listeners=names("tproxy"),
    sources=some(PREFIX),
    destinations=some(PREFIX),
    source_ports=some(RANGE),
    ports=some(RANGE),
)
OUTCOME = st.sampled_from([None, None, *Action])


@st.composite
def policies(draw: st.DrawFn) -> Rules:
    found = draw(st.lists(st.tuples(MATCH, OUTCOME), max_size=8))
    decisions = [Decision(f"r{n}", str(action or f"b{n % 3}"), action) for n, (_, action) in enumerate(found)]
    return Rules(tuple(Rule(match, each) for (match, _), each in zip(found, decisions, strict=True)), "direct")


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    version = draw(st.sampled_from([4, 6]))
    client, orig_dst = (draw(st.tuples(ADDRESSES[version], PORT)) for _ in range(2))
    interface = draw(st.sampled_from(INTERFACES))
    return Flow(draw(st.sampled_from(Network)), Client(*client), OrigDst(*orig_dst), "tproxy", interface)


FLOWS = st.lists(flows(), min_size=1, max_size=10)
UDP_ONLY = Rules(
    (Rule(Match(networks=(Network.TCP,)), Decision("tcp", "b")), Rule(Match(), Decision("rest", "drop", Action.DROP))),
    "direct",
)


@given(policies(), FLOWS)
@example(UDP_ONLY, [Flow(Network.UDP, Client("10.0.0.1", 1), OrigDst("10.0.0.2", 2), "tproxy")])
@settings(max_examples=300, deadline=None)
def test_a_worker_decides_as_rule_by_rule(rules: Rules, seen: list[Flow]) -> None:
    compiled = Policy.of(rules)
    for flow in seen:
        assert compiled.decide(flow) == decide_naively(rules, flow)


# The kernel's rules, walked through by a model of them


def written(rules: Rules, **interception: object) -> str:
    """The policy as a configuration."""

    def section(rule: Rule) -> dict[str, object]:
        match = rule.match
        asked = {
            "network": match.networks,
            "interface": match.interfaces,
            "listener": match.listeners,
            "source": [str(prefix) for prefix in match.sources],
            "destination": [str(prefix) for prefix in match.destinations],
            "source_port": [f"{first}-{last}" for first, last in match.source_ports],
            "port": [f"{first}-{last}" for first, last in match.ports],
        }
        outcome = {"action": rule.decision.action} if rule.decision.action else {"backend": rule.decision.backend}
        return {"name": rule.name, "match": {key: values for key, values in asked.items() if values}, **outcome}

    return json.dumps(
        {
            "interception": {"interfaces": INTERFACES[:2], "own_traffic": True, **interception},
            "backends": {f"b{number}": {"type": "direct"} for number in range(3)},
            "rules": [section(rule) for rule in rules.rules],
        }
    )


def never_matches(match: Match) -> bool:
    """What a configuration may not hold: a source and a destination of different families."""
    sides = [{prefix.version for prefix in prefixes} for prefixes in (match.sources, match.destinations)]
    return all(sides) and not sides[0] & sides[1]


def usable(rules: Rules) -> bool:
    return not any(rule.match == Match() for rule in rules.rules[:-1]) and not any(
        never_matches(rule.match) for rule in rules.rules
    )


def in_prefixes(asked: RulePrefixes | None, address: str) -> bool:
    return asked is None or any(ip_address(address) in ip_network(prefix) for prefix in asked.prefixes)


def asks_for(rule: KernelRule, flow: Flow) -> bool:
    return (
        rule.version in (None, flow.client.version)
        and (not rule.networks or flow.network in rule.networks)
        and (not rule.interfaces or flow.interface in rule.interfaces)
        and in_prefixes(rule.sources, flow.client.address)
        and in_prefixes(rule.destinations, flow.orig_dst.address)
        and (not rule.source_ports or any(r.first <= flow.client.port <= r.last for r in rule.source_ports))
        and (not rule.ports or any(r.first <= flow.orig_dst.port <= r.last for r in rule.ports))
    )


def by_layers(ruleset: Ruleset, kernel: list[KernelRule], policy: Policy, flow: Flow) -> tuple[str, str]:
    """What the kernel does, or else a worker, in the way that a packet takes."""
    for rule in kernel:
        if asks_for(rule, flow):
            if rule.action is not None and not rule.by_worker:
                return rule.name, rule.action
            break
    decision = policy.decide(flow)
    return decision.rule, decision.backend


@pytest.mark.parametrize("handed_over", [False, True], ids=["kernel refuses all", "some by workers"])
@given(rules=policies().filter(usable), seen=FLOWS)
@settings(max_examples=150, deadline=None)
def test_kernel_and_worker_together_decide_as_rule_by_rule(handed_over: bool, rules: Rules, seen: list[Flow]) -> None:
    config = parse_config(written(rules).encode(), "x.yaml")
    ruleset = plan(config)
    assert rules_of(config).names == rules.names
    kernel = list(with_refusals_left_to_workers(ruleset.rules) if handed_over else ruleset.rules)
    policy = Policy.of(rules_of(config))
    for flow in seen:
        naive = decide_naively(rules, flow)
        assert by_layers(ruleset, kernel, policy, flow) == (naive.rule, naive.backend)


@given(rules=policies().filter(usable), seen=FLOWS)
@settings(max_examples=100, deadline=None)
def test_everything_that_needs_no_backend_is_decided_in_the_kernel(rules: Rules, seen: list[Flow]) -> None:
    ruleset = plan(parse_config(written(rules).encode(), "x.yaml"))
    for flow in seen:
        naive = decide_naively(rules, flow)
        first = next((rule for rule in ruleset.rules if asks_for(rule, flow)), None)
        if naive.action is not None:
            assert first is not None
            assert (first.name, first.action) == (naive.rule, naive.action)


@given(rules=policies().filter(usable), seen=FLOWS)
@settings(max_examples=100, deadline=None)
def test_explain_comes_to_the_same(rules: Rules, seen: list[Flow]) -> None:
    config = parse_config(written(rules).encode(), "x.yaml")
    around = surroundings(plan(config), config)
    for flow in seen:
        found = explain(rules, around, flow, ())
        assert found.untouched is None
        assert found.decision == decide_naively(rules, flow)


# iptables spreads a rule over several; the way through them is the same


def iptables_match(rule: dict, sets: dict[str, tuple[str, ...]], flow: Flow) -> bool:
    ends = {"src": flow.client.address, "dst": flow.orig_dst.address}
    ports = {"sport": flow.client.port, "dport": flow.orig_dst.port}

    def held(prefixes: tuple[str, ...], end: str) -> bool:
        return any(ip_address(ends[end]) in ip_network(prefix) for prefix in prefixes)

    def several(asked: object) -> list:
        return asked if isinstance(asked, list) else [asked]

    def spans(text: str, port: int) -> bool:
        return any(
            int(first) <= port <= int(last or first) for first, _, last in (r.partition(":") for r in text.split(","))
        )

    return (
        rule.get("protocol", flow.network) == flow.network
        and rule.get("in-interface", flow.interface) == flow.interface
        and all(held((rule[end],), end) for end in ("src", "dst") if end in rule)
        and all(held(sets[name], end) for each in several(rule.get("set", [])) for name, end in [each["match-set"]])
        and all(spans(text, ports[which]) for which, text in rule.get(str(flow.network), {}).items())
        and all(spans(text, ports[w.rstrip("s")]) for m in several(rule.get("multiport", [])) for w, text in m.items())
    )


@given(rules=policies().filter(usable), seen=FLOWS)
@settings(max_examples=150, deadline=None)
def test_iptables_chains_say_the_same_as_the_plan(rules: Rules, seen: list[Flow]) -> None:
    ruleset = plan(parse_config(written(rules).encode(), "x.yaml"))
    sets = {f"tproxyd_{each.name}": each.prefixes for each in ruleset.rule_sets}
    targets = Targets(relay={"goto": "RELAY"}, refuse={"goto": "REFUSE"}, worker={"goto": "WORKER"})
    meaning = {Action.BYPASS: "RETURN", Action.DROP: "DROP", Action.REJECT: {"goto": "REFUSE"}, None: {"goto": "RELAY"}}
    for flow in seen:
        own = flow.interface == "lo"
        chain = rule_chain(ruleset.rules, flow.client.version, targets, own_traffic=own)
        went = next(rule["target"] for rule in chain if iptables_match(rule, sets, flow))
        first = next((rule.action for rule in ruleset.rules if asks_for(rule, flow)), None)
        if first is Action.REJECT and flow.network is Network.UDP and flow.client.version == 4:
            assert went == {"goto": "WORKER"}
        else:
            assert went == meaning[first]


# The parts


@given(st.ip_addresses())
def test_addresses_become_their_numbers(address: object) -> None:
    assert number_of(str(address)) == int(address)  # type: ignore[call-overload]


@given(st.lists(st.lists(st.tuples(PORT, PORT).map(sorted).map(tuple), min_size=1), max_size=6), st.integers(0, 10))
def test_a_table_tells_which_intervals_hold_a_number(intervals: list[list[tuple[int, int]]], number: int) -> None:
    found = IntervalTable(intervals, 0)[number]
    naive = [any(first <= number <= last for first, last in each) for each in intervals]
    assert [bool(found >> rule & 1) for rule in range(len(intervals))] == naive


def test_the_prefixes_of_both_families_never_meet() -> None:
    """::/96 and IPv4 have the same numbers."""
    rules = Rules((Rule(Match(sources=(IPv6Network("::/64"),)), Decision("six", "b")),), "direct")
    policy = Policy.of(rules)
    orig_dst = OrigDst("10.0.0.1", 1)
    assert policy.decide(Flow(Network.TCP, Client("0.0.0.1", 1), orig_dst, "tproxy")).rule == "default"
    rules = Rules((Rule(Match(sources=(IPv4Network("0.0.0.0/0"),)), Decision("four", "b")),), "direct")
    assert Policy.of(rules).decide(Flow(Network.TCP, Client("::1", 1), orig_dst, "tproxy")).rule == "default"
