"""The chains, jumps and ipsets of the iptables ruleset in the kernel: read, replace, verify, remove.

python-iptables writes the legacy tables. A table is changed in memory, read back there (the library passes over
what it doesn't understand), committed at one stroke, and read back from the kernel. Each family is worked on in a
child of its own. Our chains never stand without a set of ours: sets come first and go last, so their names alone
tell whether this ruleset was ever written.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from tproxyd.errors import KernelUnsupported, PermissionDenied, RulesetError, TryAgain
from tproxyd.netfilter import ipset, iptables
from tproxyd.netfilter.child import in_child
from tproxyd.netfilter.iptables import CHAIN_PREFIX, IpSet, Table, Tables
from tproxyd.netfilter.iptables_match import Rule
from tproxyd.netfilter.plan import Ruleset

if TYPE_CHECKING:
    import iptc

_P = ParamSpec("_P")
_T = TypeVar("_T")

_VERSIONS: Final = (4, 6)
_NAMES_FILE: Final = {4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}
_LOCK_FILE: Final = "/run/xtables.lock"
_LOCK_WAIT_S: Final = 5.0
_LOCK_RETRY_S: Final = 0.05
_EXTENSIONS: Final = (
    *("addrtype", "comment", "conntrack", "connmark", "mark", "multiport", "set", "socket"),
    *("CONNMARK", "CT", "MARK", "REJECT", "SET", "TPROXY"),
)
_SHOWN_PREFIXES: Final = 20
_NO_TABLES: Final[Tables] = {name: Table({}, {}) for name in iptables.TABLES}
_ALWAYS: Final = ("mangle", "raw")


@dataclass(frozen=True, slots=True)
class State:
    """All that is ours: the sets, and each family's tables."""

    sets: tuple[IpSet, ...]
    tables: dict[int, Tables]


_NOTHING: Final = State((), dict.fromkeys(_VERSIONS, _NO_TABLES))


class IptablesPart:
    """The chains TPROXYD* in raw, mangle and filter, what leads to them, and the ipsets tproxyd_*."""

    name = "iptables"

    def __init__(self, ruleset: Ruleset | None) -> None:
        """Args: ruleset: the wanted state; None when ours is only to be read or removed."""
        self._ruleset = ruleset

    def check(self) -> None:
        """As `Part.check`."""
        _library()
        ipset.read()

    def difference(self) -> str:
        """As `Part.difference`: in the syntax of iptables-save and ipset save."""
        wanted = self._wanted()
        found = in_child(_set_difference, wanted.sets)
        for version in _VERSIONS:
            held = _in_family(_read_family, version)
            found += _table_difference(version, held, wanted.tables[version])
        return "\n".join(found)

    def snapshot(self) -> State | None:
        """As `Part.snapshot`."""
        state = State(ipset.read(), {version: _in_family(_read_family, version) for version in _VERSIONS})
        return None if state == _NOTHING else state

    def write(self) -> None:
        """As `Part.write`."""
        _replace(self._wanted())

    def restore(self, snapshot: State | None) -> None:
        """As `Part.restore`; a lease is not brought back, only the set that it stands in."""
        _replace(snapshot or _NOTHING)

    def _wanted(self) -> State:
        if self._ruleset is None:
            raise ValueError("no ruleset to write")
        ruleset = self._ruleset
        return State(iptables.ip_sets(ruleset), {version: iptables.tables(ruleset, version) for version in _VERSIONS})


def tables_in_use() -> bool:
    """Tell whether something of this ruleset may be in the kernel, without creating tables.

    Needs python-iptables neither to say yes nor to say no; where it is installed, it may look closer.
    """
    try:
        if ipset.names():
            return True
    except (KernelUnsupported, PermissionDenied):
        pass
    exist = any({*_ALWAYS} & _existing(version) for version in _VERSIONS)
    return exist and find_spec("iptc") is not None


def _replace(state: State) -> None:
    """Put a state in place of whatever is ours, such that no rule ever leads to something that is missing."""
    in_child(ipset.put, state.sets)
    with _xtables_lock():
        for version in _VERSIONS:
            _in_family(_write_family, version, state.tables[version])
    ipset.keep_only(state.sets)
    if found := in_child(_set_difference, state.sets):
        raise RulesetError(f"ipsets differ after writing them: {found[-1]}")


def _set_difference(wanted: tuple[IpSet, ...]) -> list[str]:
    """Compare the kernel's sets with what is wanted; in a child, lest 100,000 prefixes leave their memory behind."""
    now, then = ({ip_set.name: ip_set for ip_set in sets} for sets in (ipset.read(), wanted))
    found = []
    for name in sorted(now.keys() | then.keys()):
        if name in now and name in then and ipset.same(now[name], then[name]):
            continue
        old, new = (iptables.set_text(s[name]).splitlines() if name in s else [] for s in (now, then))
        changed = [f"-{line}" for line in _without(old, new)] + [f"+{line}" for line in _without(new, old)]
        found += changed[:_SHOWN_PREFIXES]
        if more := changed[_SHOWN_PREFIXES:]:
            found.append(f" and {len(more)} more in {name}")
    return found


def _without(lines: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [line for line in lines if line not in known]


def _table_difference(version: int, held: Tables, wanted: Tables) -> list[str]:
    old, new = ([text for name in tables for text in iptables.lines(name, tables[name])] for tables in (held, wanted))
    command = iptables.command(version)
    return list(difflib.unified_diff(old, new, f"{command} now", f"{command} wanted", lineterm="", n=1))


def _existing(version: int) -> set[str]:
    try:
        return set(Path(_NAMES_FILE[version]).read_text().split())
    except FileNotFoundError:
        return set()
    except PermissionError as error:
        raise PermissionDenied("iptables: not permitted: run as root or with CAP_NET_ADMIN") from error


@contextmanager
def _xtables_lock() -> Iterator[None]:
    """Keep iptables(8) and its kin out, as `iptables -w` does."""
    path = os.environ.get("XTABLES_LOCKFILE", _LOCK_FILE)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RulesetError(f"{path} can't be opened, and iptables is not safe without: {error.strerror}") from error
    try:
        end = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    text = f"another program has held {_LOCK_FILE} for {_LOCK_WAIT_S:.0f} s: try again when it is done"
                    raise TryAgain(text) from error
            time.sleep(_LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _in_family(function: Callable[Concatenate[int, _P], _T], version: int, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Work on a family in a child of its own; the library is imported before, once for all of them."""
    if _existing(version) & _NO_TABLES.keys():
        _library()
    return in_child(function, version, *args, **kwargs)


def _library(*more: str) -> Any:
    """Import python-iptables; it must not create the tables that we don't need while it looks for chains.

    It looks for them in the tables that every ruleset has something in, and in those named here.
    """
    try:
        with _short_cuts():
            import iptc
    except ImportError as error:
        raise KernelUnsupported(
            "python-iptables is not installed: pip install tproxyd[iptables], or set interception.ruleset: nftables"
        ) from error
    iptc.Table.ALL = iptc.Table6.ALL = list(dict.fromkeys((*_ALWAYS, *more)))
    return iptc


@contextmanager
def _short_cuts() -> Iterator[None]:
    """Spare python-iptables' import what would take four fifths of its time.

    It wants one path of distutils, in whose place setuptools puts all of itself, but does without; and it has ld and
    gcc look for the library that lies beside it, unless it is told where.
    """
    found = find_spec("iptc")
    if found is not None and found.origin is not None:
        os.environ.setdefault("IPTABLES_LIBDIR", str(Path(found.origin).parents[1]))
    halted = "distutils.sysconfig" not in sys.modules
    if halted:
        sys.modules["distutils.sysconfig"] = None  # type: ignore[assignment]  # to import it fails now
    try:
        yield
    finally:
        if halted:
            del sys.modules["distutils.sysconfig"]


# What follows runs in a child: one address family each.


def _read_family(version: int) -> Tables:
    """Read our share of a family's tables; tables that don't exist are not made."""
    found = dict(_NO_TABLES)
    for name in _existing(version) & found.keys():
        with _naming(f"{iptables.command(version)} table {name}"):
            found[name] = _read(_open(version, name))
    return found


def _write_family(version: int, wanted: Tables) -> None:
    """Replace our share of both tables; nothing is written where it is right already."""
    adding = any(table.chains for table in wanted.values())
    for name in wanted if adding else reversed(wanted):
        if wanted[name].chains or name in _existing(version):
            _write(version, name, wanted[name])


def _write(version: int, name: str, wanted: Table) -> None:
    where = f"{iptables.command(version)} table {name}"
    _library()
    with _naming(where):
        kernel = _open(version, name)
        if iptables.lines(name, _read(kernel)) == iptables.lines(name, wanted):
            return
        _remove_ours(kernel)
        _add_ours(kernel, wanted, ipv6=version == 6)
        _compare(f"{where}: python-iptables can't express", _read(kernel), wanted)
        kernel.commit()
        kernel.refresh()
        _compare(f"{where}: the kernel doesn't hold what was written:", _read(kernel), wanted)


def _read(kernel: iptc.Table) -> Table:
    jumps: dict[str, list[Rule]] = {}
    chains: dict[str, list[Rule]] = {}
    for chain in kernel.chains:
        if chain.name.startswith(CHAIN_PREFIX):
            chains[chain.name] = [_decoded(rule) for rule in chain.rules]
        elif found := list(_rules_to_ours(kernel, chain)):
            jumps[chain.name] = [_decoded(rule) for rule in found]
    return Table(jumps, chains)


def _decoded(rule: iptc.Rule) -> Rule:
    import iptc

    decoded: Rule = iptc.easy.decode_iptc_rule(rule, ipv6=isinstance(rule, iptc.Rule6))
    decoded.pop("counters", None)
    return decoded


def _rules_to_ours(kernel: iptc.Table, chain: iptc.Chain) -> Iterator[iptc.Rule]:
    """Find rules of others' chains that lead to ours; the rest is not decoded, whatever extensions it uses."""
    entry = kernel.first_rule(chain.name)
    while entry:
        if (kernel.get_target(entry) or b"").startswith(CHAIN_PREFIX.encode()):
            yield kernel.create_rule(entry, chain)
        entry = kernel.next_rule(entry)


def _remove_ours(kernel: iptc.Table) -> None:
    ours = [chain for chain in kernel.chains if chain.name.startswith(CHAIN_PREFIX)]
    for chain in kernel.chains:
        if chain not in ours:
            for rule in list(_rules_to_ours(kernel, chain)):
                chain.delete_rule(rule)
    for chain in ours:
        chain.flush()
    for chain in ours:
        chain.delete()


def _add_ours(kernel: iptc.Table, wanted: Table, *, ipv6: bool) -> None:
    import iptc

    for name in wanted.chains:
        kernel.create_chain(name)
    for name, rules in wanted.chains.items():
        for rule in rules:
            iptc.Chain(kernel, name).append_rule(_encoded(rule, ipv6=ipv6))
    for name, rules in wanted.jumps.items():
        for place, rule in enumerate(rules):
            iptc.Chain(kernel, name).insert_rule(_encoded(rule, ipv6=ipv6), place)


def _encoded(rule: Rule, *, ipv6: bool) -> iptc.Rule:
    """Make the library's rule of ours, and make good what it gets wrong for IPv6 (1.2.0).

    Its interface masks compare the lowest bit of each letter: `-i lan0` would take lan2, and lan0 counts as lo.
    """
    import iptc

    encoded = iptc.easy.encode_iptc_rule(dict(rule), ipv6)
    if ipv6:
        for mask in ("iniface_mask", "outiface_mask"):
            setattr(encoded.entry.ipv6, mask, b"\xff" * len(getattr(encoded.entry.ipv6, mask)))
    return encoded


def _compare(what: str, held: Table, wanted: Table) -> None:
    now, then = iptables.lines("", held), iptables.lines("", wanted)
    if now != then:
        lost = _without(then, now) or _without(now, then) or ["the order of the rules"]
        raise RulesetError(f"{what} {lost[0]}")


def _open(version: int, name: str) -> iptc.Table:
    iptc = _library(name)
    return (iptc.Table if version == 4 else iptc.Table6)(name, autocommit=False)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn libiptc's errors into ours."""
    import iptc

    try:
        yield
    except (iptc.IPTCError, iptc.XTablesError) as error:
        text = re.sub(r"b'(.*)'", r"\1", str(error))  # the library formats bytes
        if "Permission denied" in text:
            raise PermissionDenied(f"{where}: not permitted: run as root or with CAP_NET_ADMIN") from error
        if "Table does not exist" in text:
            raise KernelUnsupported(
                f"{where}: the kernel has no legacy iptables tables: set interception.ruleset: nftables"
            ) from error
        if "No chain/target/match" in text:
            raise KernelUnsupported(
                f"{where}: the kernel lacks a match or target (one of: {', '.join(_EXTENSIONS)})"
            ) from error
        raise RulesetError(f"{where}: {text}") from error
