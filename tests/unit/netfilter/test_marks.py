from typing import Any

import pytest

from tests.unit.netfilter.test_iptables import RULESET
from tproxyd.config import Mark
from tproxyd.errors import RulesetError
from tproxyd.netfilter import marks
from tproxyd.netfilter.marks import Use, iptables_uses, nft_uses

MARK = {"meta": {"key": "mark"}}
ALL = 0xFFFFFFFF
CT_MARK = {"ct": {"key": "mark"}}
CONNECTION = "sets the connection's mark to"


def nft(*statements: dict[str, Any], table: str = "theirs") -> list[tuple[str, int, int]]:
    rule = {"family": "inet", "table": table, "chain": "pre", "handle": 7, "expr": list(statements)}
    return [(use.what, use.value, use.mask) for use in nft_uses([{"table": {"name": table}}, {"rule": rule}])]


def sets(value: Any) -> dict[str, Any]:
    return {"mangle": {"key": MARK, "value": value}}


def matches(right: Any, left: Any = MARK, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


@pytest.mark.parametrize(
    ("statement", "uses"),
    [
        (sets(0x10), [("sets", 0x10, ALL)]),
        (sets({"|": [MARK, 0x10]}), [("sets", 0x10, 0x10)]),
        (sets({"&": [MARK, 0xFFFFFFF0]}), [("sets", 0, 0xF)]),
        (sets({"|": [{"&": [MARK, 0xFFFFFFF0]}, 1]}), [("sets", 1, 0xF)]),
        (sets({"^": [MARK, 1]}), [("sets", 1, 1)]),
        (
            sets({"map": {"key": {"numgen": {}}, "data": {"set": [[0, 1], [1, 2]]}}}),
            [("sets", 1, ALL), ("sets", 2, ALL)],
        ),
        ({"mangle": {"key": CT_MARK, "value": {"|": [CT_MARK, 2]}}}, [(CONNECTION, 2, 2)]),
        ({"mangle": {"key": CT_MARK, "value": 1}}, [(CONNECTION, 1, ALL)]),
        (matches(1), [("matches", 1, ALL)]),
        (matches(2, {"&": [MARK, 0xFF]}), [("matches", 2, 0xFF)]),
        (matches({"set": [1, {"range": [4, 6]}]}), [("matches", value, ALL) for value in (1, 4, 5, 6)]),
        (matches(0, {"&": [MARK, 0x5]}, "!="), [("matches", 1, 1), ("matches", 4, 4)]),
        ({"vmap": {"key": MARK, "data": {"set": [[1, {"accept": None}]]}}}, [("matches", 1, ALL)]),
    ],
)
def test_nft_statements_that_deal_with_the_mark(statement: dict[str, Any], uses: list[tuple[str, int, int]]) -> None:
    assert nft({"counter": None}, statement) == uses


@pytest.mark.parametrize(
    "statement",
    [
        sets({"ct": {"key": "mark"}}),
        sets({"&": [{"ct": {"key": "mark"}}, 0xFF]}),
        sets({"map": {"key": {"payload": {}}, "data": "@named"}}),
        sets({"socket": {"key": "mark"}}),
        {"mangle": {"key": {"ct": {"key": "mark"}}, "value": MARK}},
        matches(1, op="!="),
        matches(0, op="!="),
        matches("@named"),
        matches(1, {"socket": {"key": "mark"}}),
        {"xt": {"type": "target", "name": "MARK"}},
        {"accept": None},
    ],
)
def test_what_can_not_be_known_or_is_no_packet_mark_is_passed_over(statement: dict[str, Any]) -> None:
    assert nft(statement) == []


def test_our_own_rules_do_not_count() -> None:
    assert nft(sets(1), table="tproxyd") == []
    assert list(iptables_uses("iptables", "*raw\n-A TPROXYD_CLIENT -j MARK --set-xmark 0x1/0x1\n")) == []


@pytest.mark.parametrize(
    ("rule", "uses"),
    [
        ("-j MARK --set-xmark 0x3/0xffffffff", [("sets", 3, ALL)]),
        ("-j MARK --set-xmark 0x3/0x3", [("sets", 3, 3)]),
        ("-j MARK --set-xmark 0x1/0x0", [("sets", 1, 1)]),
        ("-p tcp -j TPROXY --on-port 1 --on-ip 0.0.0.0 --tproxy-mark 0x1/0x1", [("sets", 1, 1)]),
        ("-m mark --mark 0x1 -j ACCEPT", [("matches", 1, ALL)]),
        ("-m mark ! --mark 0x0/0x6 -j ACCEPT", [("matches", 2, 2), ("matches", 4, 4)]),
        ("-m mark ! --mark 0x1 -j DROP", []),
        ("-m mark ! --mark 0x0 -j ACCEPT", []),
        ("-m connmark --mark 0x1 -j CONNMARK --set-xmark 0x1/0xffffffff", [(CONNECTION, 0x1, ALL)]),
        ("-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", []),
        ('-m comment --comment "-j MARK --set-xmark 0x1/0x1" -j ACCEPT', []),
    ],
)
def test_iptables_rules_that_deal_with_the_mark(rule: str, uses: list[tuple[str, int, int]]) -> None:
    found = list(
        iptables_uses("iptables-legacy", f"# comment\n*mangle\n:PREROUTING ACCEPT\n-A PREROUTING {rule}\nCOMMIT\n")
    )
    assert [(use.what, use.value, use.mask) for use in found] == uses
    assert {use.where for use in found} <= {f"iptables-legacy -t mangle -A PREROUTING {rule}"}


@pytest.mark.parametrize(
    ("value", "mask", "key"),
    [
        (0x1, ALL, "mark"),
        (0x3, 0x3, "mark"),
        (0xFF02, ALL, "client_mark"),
        (0x4, 0xC, "server_mark"),
        (0x10, ALL, None),  # leaves our bits at zero
        (0x0, 0x1, None),
        (0x100, 0x100, None),  # other bits
        (0x8, 0xF, None),
    ],
)
def test_only_a_mark_that_can_be_ours_is_refused(
    value: int, mask: int, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "_nftables_uses", lambda: [Use("sets", value, mask, "their rule")])
    monkeypatch.setattr(marks, "_iptables_uses", list)
    if key is None:
        marks.check_marks(RULESET)
    else:
        with pytest.raises(
            RulesetError, match=rf"their rule sets {value:#x}/{mask:#x}: set another interception.{key}$"
        ):
            marks.check_marks(RULESET)


def test_a_wider_mask_of_ours_tells_values_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(marks, "_nftables_uses", lambda: [Use("sets", 0x30, 0xF0, "their rule")])
    monkeypatch.setattr(marks, "_iptables_uses", list)
    marks.check_marks(replace(RULESET, mark=Mark(0x10, 0xF0)))
    with pytest.raises(RulesetError):
        marks.check_marks(replace(RULESET, mark=Mark(0x30, 0xF0)))


@pytest.mark.parametrize(
    ("what", "value", "mask", "key"),
    [
        ("matches", 0x1, 0x1, None),
        ("matches", 0x1, ALL, "mark"),
        ("matches", 0x3, 0x3, "mark"),
        ("sets", 0x1, 0x1, "mark"),
        ("matches", 0x2, 0x2, "client_mark"),
        ("matches", 0x4, 0x4, "server_mark"),
        (CONNECTION, 0x1, ALL, None),
        (CONNECTION, 0x2, ALL, "client_mark"),
        (CONNECTION, 0x4, ALL, None),
    ],
)
def test_only_a_match_of_just_our_mark_lets_intercepted_flows_in(
    what: str, value: int, mask: int, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall's input chain asks for it; whoever sets it, or asks for our sockets' marks, is in the way."""
    monkeypatch.setattr(marks, "_nftables_uses", list)
    monkeypatch.setattr(marks, "_iptables_uses", lambda: [Use(what, value, mask, "their rule")])
    if key is None:
        marks.check_marks(RULESET)
    else:
        with pytest.raises(RulesetError, match=rf"set another interception\.{key}$"):
            marks.check_marks(RULESET)
