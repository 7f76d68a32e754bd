"""Apply, compare and remove everything that tproxyd keeps in the kernel, all or nothing.

The order is what makes an interruption harmless: routing stands before the rules that need it and falls after
them, so packets are never marked for a table that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tproxyd.errors import RulesetError, TproxydError
from tproxyd.lock import only_one
from tproxyd.netfilter.marks import check_marks
from tproxyd.netfilter.part import Part
from tproxyd.netfilter.plan import Ruleset, plan
from tproxyd.netfilter.preflight import check_box

if TYPE_CHECKING:
    from tproxyd.config import Config


class Application:
    """The wanted state of the box for one configuration, over all its parts."""

    def __init__(self, config: Config, ruleset: Ruleset | None = None) -> None:
        """Plan, unless `ruleset` is the configuration's plan already; nothing in the kernel is touched."""
        self.ruleset = ruleset or plan(config)
        self._backend = config.interception.ruleset
        self._parts = parts(self.ruleset, self._backend)
        self._others = [part for part in parts(None, None) if type(part) not in {type(p) for p in self._parts}]

    def check(self) -> list[str]:
        """Look for what stands in the way, changing nothing; return warnings.

        Raises:
            RulesetError: a name, mark, table or priority is someone else's, or a setting of the box
                would swallow the flows.
            KernelUnsupported: the kernel or a library lacks something.
        """
        warnings = check_box(self.ruleset)
        for part in self._parts:
            part.check()
        check_marks(self.ruleset)
        return warnings

    def difference(self) -> str:
        """Say what `apply` would change; empty when nothing would."""
        texts = [part.difference() for part in self._parts]
        texts += [f"-{part.name}: tproxyd's rules" for part in self._others if part.snapshot() is not None]
        return "\n".join(text for text in texts if text)

    def apply(self, *, checked: bool = False) -> bool:
        """Bring the box to the wanted state; return False if it was there already.

        Args:
            checked: `check` has been called just now.

        Raises:
            TproxydError: nothing has changed; where even going back failed, the message says so.
        """
        done: list[tuple[Part, object]] = []
        with _alone():
            if not checked:
                self.check()
            try:
                for part in self._parts:
                    if part.difference():
                        done.append((part, part.snapshot()))
                        part.write()
                for part in self._others:
                    if (snapshot := part.snapshot()) is not None:
                        done.append((part, snapshot))
                        part.restore(None)
            except BaseException as error:
                _go_back(done, error)
                raise
        return bool(done)

    def snapshot(self) -> list[object]:
        """The state of all parts now, for `restore`."""
        return [part.snapshot() for part in (*self._parts, *self._others)]

    def restore(self, snapshots: list[object]) -> None:
        """Bring back a state that `snapshot` returned."""
        pairs = list(zip((*self._parts, *self._others), snapshots, strict=True))
        with _alone():
            for part, snapshot in reversed(pairs):
                part.restore(snapshot)


def remove() -> bool:
    """Take everything of tproxyd's out of the kernel, whatever configuration made it; False: there was nothing.

    Raises:
        TproxydError: something could not be removed; the rest has been.
    """
    removed, errors = False, []
    with _alone():
        for part in reversed(parts(None, None)):
            try:
                if part.snapshot() is not None:
                    part.restore(None)
                    removed = True
            except (TproxydError, OSError) as error:
                errors.append(f"{part.name}: {error}")
    if errors:
        raise RulesetError("; ".join(errors))
    return removed


def parts(ruleset: Ruleset | None, backend: str | None) -> Sequence[Part]:
    """The parts in the order in which they are applied; both back ends where none is named.

    iptables is left out where it was never used: looking would need python-iptables, and would create its
    legacy tables.
    """
    from tproxyd.netfilter.iptables_part import IptablesPart, tables_in_use
    from tproxyd.netfilter.nft_part import NftPart
    from tproxyd.netfilter.routing import RoutingPart

    found: list[Part] = [RoutingPart(ruleset)]
    if backend != "iptables":
        found.append(NftPart(ruleset))
    if backend == "iptables" or (backend is None and tables_in_use()):
        found.append(IptablesPart(ruleset))
    return found


def _alone() -> AbstractContextManager[None]:
    return only_one("rules", "another tproxyd is changing the rules")


def _go_back(done: list[tuple[Part, object]], error: BaseException) -> None:
    """Bring every part back that was written, whatever happens to another."""
    failed = []
    for part, snapshot in reversed(done):
        try:
            part.restore(snapshot)
        except (TproxydError, OSError) as second:
            failed.append(f"{part.name} could not be brought back ({second})")
    if failed:
        raise RulesetError(f"{error}; and {', '.join(failed)}: run tproxyd remove-rules") from error
