"""Whether someone else's firewall rules set or match the bits of our packet marks (meta mark, fwmark).

What can't be known (a mark that comes back from the connection, one looked up in a named map) is not refused, nor
is a negated match, unless it asks whether one of some bits is set: most boxes have some. `ip rule` is looked at by
`routing`.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tproxyd.errors import KernelUnsupported, RulesetError
from tproxyd.netfilter import libnftables
from tproxyd.netfilter.iptables import CHAIN_PREFIX
from tproxyd.netfilter.plan import Ruleset

_ALL_BITS: Final = 0xFFFFFFFF
_OUR_TABLES: Final = "tproxyd"
_META_MARK: Final = {"meta": {"key": "mark"}}
_CT_MARK: Final = {"ct": {"key": "mark"}}
_SETS_CONNECTION: Final = "sets the connection's mark to"
_WIDEST_RANGE: Final = 4096
_SAVE_WAIT_S: Final = 20

_LEGACY: Final = (
    ("iptables-legacy-save", "/proc/thread-self/net/ip_tables_names"),
    ("ip6tables-legacy-save", "/proc/thread-self/net/ip6_tables_names"),
)
_OVER_NFTABLES: Final = (("iptables-nft-save", "ip"), ("ip6tables-nft-save", "ip6"))
_OPTIONS: Final = {
    ("mark", "--mark"): "matches",
    ("MARK", "--set-xmark"): "sets",
    ("TPROXY", "--tproxy-mark"): "sets",
    ("CONNMARK", "--set-xmark"): _SETS_CONNECTION,
}
"""By match or target (connmark and CONNMARK have the same options), what the option does to the mark. iptables-save
writes all of --set-mark, --or-mark, --and-mark and --xor-mark as --set-xmark."""


@dataclass(frozen=True, slots=True)
class Use:
    """Someone's rule that deals with the packet mark: of the bits in `mask`, it sets or wants those in `value`."""

    what: str
    value: int
    mask: int
    where: str


def check_marks(ruleset: Ruleset) -> None:
    """Look through the rules of everyone else in this network namespace.

    Who asks for exactly our `mark` means the flows we intercept: a firewall's input chain has to let them in.

    Raises:
        RulesetError: a rule could put one of our marks on foreign packets, or would take ours for its own.
    """
    for use in (*_nftables_uses(), *_iptables_uses()):
        for key in _keys(ruleset, use):
            mark = getattr(ruleset, key)
            if key == "mark" and (use.what, use.value, use.mask) == ("matches", mark.value, mark.mask):
                continue
            shared = use.mask & mark.mask
            if use.value & shared and use.value & shared == mark.value & shared:
                raise RulesetError(
                    f"mark {mark} is in use: {use.where} {use.what} {use.value:#x}/{use.mask:#x}: "
                    f"set another interception.{key}"
                )


def _keys(ruleset: Ruleset, use: Use) -> tuple[str, ...]:
    """Our marks that this use could be mistaken for; of connections, those that we mark ourselves."""
    if use.what == _SETS_CONNECTION:
        return ("mark", "client_mark") if ruleset.own_traffic else ("client_mark",)
    return ("mark", "client_mark", "server_mark")


def nft_uses(listing: list[dict[str, Any]]) -> Iterator[Use]:
    """Find the uses of the mark in libnftables' JSON objects (libnftables-json(5)); pure."""
    for item in listing:
        rule = item.get("rule")
        if rule is None or rule["table"].startswith(_OUR_TABLES):
            continue
        where = f"nftables {rule['family']} {rule['table']}, chain {rule['chain']}, rule handle {rule['handle']}"
        for statement in rule["expr"]:
            for what, value, mask in _statement_uses(statement):
                yield Use(what, value, mask, where)


def iptables_uses(command: str, listing: str) -> Iterator[Use]:
    """Find the uses of the mark in what iptables-save prints; pure."""
    table = ""
    for line in listing.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A ") and not line.startswith(f"-A {CHAIN_PREFIX}") and "mark" in line:
            for what, value, mask in _option_uses(shlex.split(line)):
                yield Use(what, value, mask, f"{command} -t {table} {line}")


def _nftables_uses() -> Iterator[Use]:
    try:
        listing = libnftables.run_json("list ruleset", terse=True)
    except KernelUnsupported:  # no nftables on this box, so no rules of it either
        return
    yield from nft_uses(listing)
    tables = {item["table"]["family"] for item in listing if "table" in item}
    for command, family in _OVER_NFTABLES:
        if family in tables:
            yield from iptables_uses(command.removesuffix("-save"), _saved(command))


def _iptables_uses() -> Iterator[Use]:
    for command, names in _LEGACY:
        if Path(names).exists() and Path(names).read_text().strip():
            yield from iptables_uses(command.removesuffix("-save"), _saved(command))


def _saved(command: str) -> str:
    """Run one of the save commands; they read existing tables and make none. Not installed: nothing to say."""
    program = shutil.which(command)
    if program is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603  # a fixed name, no arguments
            [program], check=False, capture_output=True, text=True, errors="replace", timeout=_SAVE_WAIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise RulesetError(f"{command} has not ended after {_SAVE_WAIT_S} s") from error
    return done.stdout if done.returncode == 0 else ""


def _statement_uses(statement: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    if mangle := statement.get("mangle"):
        yield from _mangled(mangle)
    elif (match := statement.get("match")) and (mask := _matched_bits(match["left"])):
        if match["op"] == "==":
            for value in _values(match["right"]):
                yield "matches", value, mask
        elif match["op"] == "!=" and match["right"] == 0:
            yield from _any_of(mask)
    elif (vmap := statement.get("vmap")) and vmap["key"] == _META_MARK and isinstance(vmap["data"], dict):
        for wanted, _verdict in vmap["data"]["set"]:
            for value in _values(wanted):
                yield "matches", value, _ALL_BITS


def _mangled(mangle: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    for mark, what in ((_META_MARK, "sets"), (_CT_MARK, _SETS_CONNECTION)):
        if mangle["key"] == mark:
            yield from ((what, value, mask) for value, mask in _results(mangle["value"], mark))


def _any_of(mask: int) -> Iterator[tuple[str, int, int]]:
    """`mark & mask != 0`; a rule that wants any mark at all is too common to be a conflict."""
    if mask != _ALL_BITS:
        for bit in (1 << number for number in range(mask.bit_length())):
            if mask & bit:
                yield "matches", bit, bit


def _matched_bits(left: Any) -> int:
    """Return which bits of the packet mark a match compares: `meta mark & 0xff`."""
    if left == _META_MARK:
        return _ALL_BITS
    if isinstance(left, dict) and isinstance(bits := left.get("&"), list) and bits[0] == _META_MARK:
        return bits[1] if isinstance(bits[1], int) else 0
    return 0


def _results(value: Any, before: dict[str, dict[str, str]]) -> Iterator[tuple[int, int]]:
    """Return what a statement may make of a mark, as value and mask of the bits that it determines.

    Args:
        value: its right-hand side.
        before: the expression that stands for the mark as it was.
    """
    if isinstance(value, int):
        yield value, _ALL_BITS
    elif value == before:
        yield 0, 0
    elif isinstance(value, dict) and isinstance(value.get("map", {}).get("data"), dict):
        for _key, result in value["map"]["data"]["set"]:
            yield from _results(result, before)
    elif isinstance(value, dict) and (operator := next(iter(value))) in ("&", "|", "^"):
        left, right = value[operator][0], value[operator][1]
        if isinstance(right, int):
            for known, mask in _results(left, before):
                yield {
                    "&": (known & right, mask | (~right & _ALL_BITS)),
                    "|": (known | right, mask | right),
                    "^": (known ^ right, mask | right),
                }[operator]


def _values(right: Any) -> Iterator[int]:
    if isinstance(right, int):
        yield right
    elif isinstance(right, dict) and isinstance(right.get("set"), list):
        for each in right["set"]:
            yield from _values(each)
    elif isinstance(right, dict) and "range" in right:
        first, last = right["range"]
        if isinstance(first, int) and isinstance(last, int):
            yield from range(first, min(last, first + _WIDEST_RANGE) + 1)


def _option_uses(words: list[str]) -> Iterator[tuple[str, int, int]]:
    extension = ""
    for before, option, value in zip(["", *words], words, words[1:], strict=False):
        if option in ("-m", "-j"):
            extension = value
        elif what := _OPTIONS.get((extension, option)):
            number, _, mask = value.partition("/")
            bits, known = int(number, 0), int(mask or "0xffffffff", 0)
            if before != "!":
                yield what, bits, known | bits  # MARK flips the bits that are outside of its mask
            elif not bits:
                yield from _any_of(known)
