"""Policy routing: what a ruleset needs, in which order, and how foreign rules are judged."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from tproxyd.config import Config, Interception, Mark
from tproxyd.errors import RulesetError
from tproxyd.netfilter.plan import Ruleset, plan
from tproxyd.netfilter.routing import Route, Rule, _check_rule, _ordered, wanted


def ruleset(**interception: Any) -> Ruleset:
    return plan(Config(interception=Interception(interfaces=("lan0",), **interception)))


def test_each_family_has_a_rule_and_a_route() -> None:
    assert wanted(ruleset(route_table=99, rule_priority=50)) == {
        Rule(4, 50, 1, 1, 99),
        Rule(6, 50, 1, 1, 99),
        Route(4, 99),
        Route(6, 99),
    }
    assert wanted(ruleset(families=("ipv6",))) == {Rule(6, 7440, 1, 1, 7440), Route(6, 7440)}


def test_routes_stand_before_rules_and_fall_after_them() -> None:
    state = wanted(ruleset())
    assert [type(item) for item in _ordered(state, routes_first=True)] == [Route, Route, Rule, Rule]
    assert [type(item) for item in _ordered(state)] == [Rule, Rule, Route, Route]


class Message(dict):
    """A rule as pyroute2 gives it."""

    def __init__(self, *, flags: int = 0, **attributes: int) -> None:
        super().__init__(table=0, flags=flags, attrs=[(f"FRA_{k.upper()}", v) for k, v in attributes.items()])

    def get_attr(self, name: str) -> int | None:
        return dict(self["attrs"]).get(name)


def test_a_foreign_rule_far_from_ours_is_let_be() -> None:
    _check_rule(ruleset(), 4, Message(priority=32766, table=254))
    _check_rule(ruleset(), 4, Message(priority=100, table=100, fwmark=0x8, fwmask=0x8))


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"priority": 7440, "table": 1}, "rule priority 7440 is in use"),
        ({"priority": 1, "table": 7440}, "route table 7440 is in use"),
        ({"priority": 1, "table": 1, "fwmark": 1, "fwmask": 0xFFFFFFFF}, "another interception.mark"),
        ({"priority": 1, "table": 1, "fwmark": 2, "fwmask": 2}, "another interception.client_mark"),
        ({"priority": 1, "table": 1, "fwmark": 0xC, "fwmask": 0xC}, "another interception.server_mark"),
    ],
)
def test_what_is_in_use_is_named(attributes: dict[str, int], text: str) -> None:
    with pytest.raises(RulesetError, match=text):
        _check_rule(ruleset(), 4, Message(**attributes))


def test_a_mark_is_refused_where_a_packet_of_ours_could_match_the_rule() -> None:
    """By a naive model: packets carry our mark with any other bits beside it."""
    ours = replace(ruleset(), mark=Mark(0x2, 0x3), client_mark=Mark(0x100, 0x100), server_mark=Mark(0x200, 0x200))
    for fwmark, fwmask in product(range(8), range(1, 8)):
        if fwmark & ~fwmask:
            continue  # the kernel's rules never match
        shares = bool(fwmark & fwmask & 0x3)
        could_match = any((packet & fwmask) == fwmark for packet in range(8) if packet & 0x3 == 0x2)
        refused = False
        try:
            _check_rule(ours, 4, Message(priority=1, table=1, fwmark=fwmark, fwmask=fwmask))
        except RulesetError:
            refused = True
        assert refused == (shares and could_match), (fwmark, fwmask)


def test_an_inverted_rule_is_let_be() -> None:
    _check_rule(ruleset(), 4, Message(flags=0x2, priority=1, table=1, fwmark=1, fwmask=1))
