"""The nftables table in the kernel: read, replace in one transaction, verify, remove.

Two digests in the comment of an otherwise unused set tell a later run that nothing has to change: of the text
that was asked for, and of what the kernel showed right after. Comparing listings with our own text would break
with each new way nftables finds to print the same rule.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from typing import Final

from tproxyd.errors import RulesetError
from tproxyd.netfilter import libnftables, nft, nft_learned
from tproxyd.netfilter.plan import Ruleset

_DIGESTS: Final = "applied"
_FEW: Final = 20


class NftPart:
    """The table `inet tproxyd`."""

    name = "nftables"

    def __init__(self, ruleset: Ruleset | None) -> None:
        """Args: ruleset: the wanted state; None when the table is only to be read or removed."""
        self._ruleset = ruleset

    def check(self) -> None:
        """As `Part.check`: a table of our name must be ours."""
        if _exists() and not _is_ours(_listing()):
            raise RulesetError(f"nftables table {nft.TABLE} exists and is not tproxyd's: rename or delete it")

    def difference(self) -> str:
        """As `Part.difference`."""
        listing = _listing() if _exists() else ""
        if self._comment(listing) in listing:
            return ""
        held, wanted = _summary(_stable(listing)), _summary(_stable(nft.table(self._wanted())))
        lines = list(difflib.unified_diff(held, wanted, "nftables now", "nftables wanted", lineterm="", n=1))
        return "\n".join(lines) or "nftables: the table was changed by hand and is written again"

    def snapshot(self) -> str | None:
        """As `Part.snapshot`: the table as text; someone else's table of our name is none of our state.

        Learned flows are left out: brought back, they would be nobody's.
        """
        listing = _listing() if _exists() else ""
        return _without_learned(listing) if _is_ours(listing) else None

    def write(self) -> None:
        """As `Part.write`."""
        text = nft.render(self._wanted())
        libnftables.run(text)
        self._verify()
        libnftables.run(f"add set {nft.TABLE} {_DIGESTS} {{ type mark; {self._comment(_listing())}; }}")

    def restore(self, snapshot: str | None) -> None:
        """As `Part.restore`."""
        libnftables.run(f"add table {nft.TABLE}\ndelete table {nft.TABLE}\n{snapshot or ''}")

    def _wanted(self) -> Ruleset:
        if self._ruleset is None:
            raise ValueError("no ruleset to write")
        return self._ruleset

    def _comment(self, listing: str) -> str:
        """The digests of what is asked for and of what the kernel shows, but for sets whose elements come and go."""
        return f'comment "{_digest(nft.render(self._wanted()))} {_digest(_stable(listing))}"'

    def _verify(self) -> None:
        held = libnftables.run_json(f"list table {nft.TABLE}")
        ruleset = self._wanted()
        chains = nft.chains(ruleset)
        names = {prefix_set.name for prefix_set in ruleset.prefix_sets}
        wanted = {
            "chains": len(chains),
            "rules": sum(len([line for line in lines if not line.startswith("type ")]) for lines in chains.values()),
            "sets": len(names) + len(nft.changing_sets(ruleset)),
            "prefixes": sum(len(prefix_set.prefixes) for prefix_set in ruleset.prefix_sets),
        }
        sets = [item["set"] for item in held if "set" in item]
        seen = {
            "chains": sum("chain" in item for item in held),
            "rules": sum("rule" in item for item in held),
            "sets": len(sets),
            "prefixes": sum(len(item.get("elem", [])) for item in sets if item["name"] in names),
        }
        if seen != wanted:
            raise RulesetError(f"nftables took the ruleset, but shows {seen} in place of {wanted}")


def _exists() -> bool:
    tables = libnftables.run_json("list tables inet")
    return any(item.get("table", {}).get("name") == nft.TABLE.split()[1] for item in tables)


def _is_ours(listing: str) -> bool:
    return f'\tcomment "{nft.OWNER_COMMENT}"\n' in listing


def _listing() -> str:
    return libnftables.run(f"list table {nft.TABLE}", stateless=True)


def _stable(listing: str) -> str:
    for name in (_DIGESTS, nft.LEASE_SET, *nft.INBOUND_SETS.values(), *nft_learned.names((4, 6))):
        if text := _text_of_set(listing, name):
            listing = listing.replace(f"{text}\n", "")
    return listing


def _without_learned(listing: str) -> str:
    for name in nft_learned.names((4, 6)):
        text = _text_of_set(listing, name)
        head, elements, _ = text.partition("\t\telements = ")  # they come last
        if elements:
            listing = listing.replace(text, f"{head}\t}}\n")
    return listing


def _text_of_set(listing: str, name: str) -> str:
    """A set's definition in a listing; empty: there is none."""
    start = listing.find(f"\tset {name} {{\n")
    end = "\n\t}\n"
    return listing[start : listing.index(end, start) + len(end)] if start >= 0 else ""


def _summary(listing: str) -> list[str]:
    """The listing's lines for a human's diff: a set's elements one a line, or in a few words where they are many."""

    def elements(found: re.Match[str]) -> str:
        prefixes = sorted(found[1].replace(",", " ").split())
        if len(prefixes) > _FEW:
            prefixes = [f"({len(prefixes)} prefixes, digest {_digest(' '.join(prefixes))})"]
        return "\n".join(f"\t\telement {prefix}" for prefix in prefixes)

    shown = re.sub(r"\t\telements = \{([^}]*)\}", elements, listing)
    return [line for line in shown.splitlines() if line]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
