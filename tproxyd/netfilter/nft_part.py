"""The nftables table in the kernel: read, replace in one transaction, verify, remove.

Two digests in the comment of an otherwise unused set tell a later run that nothing has to change: of the text
that was asked for, and of what the kernel showed right after. Comparing listings with our own text would break
with each new way nftables finds to print the same rule.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Any, Final

from tproxyd.errors import RulesetError
from tproxyd.netfilter import libnftables, nft
from tproxyd.netfilter.plan import Ruleset

_DIGESTS: Final = "applied"


class NftPart:
    """The table `inet tproxyd`."""

    name = "nftables"

    def __init__(self, ruleset: Ruleset | None) -> None:
        """Args: ruleset: the wanted state; None when the table is only to be read or removed."""
        self._ruleset = ruleset

    def check(self) -> None:
        """As `Part.check`: a table of our name must be ours."""
        for item in _list_table():
            if "table" in item and item["table"].get("comment") != nft.OWNER_COMMENT:
                raise RulesetError(f"nftables table {nft.TABLE} exists and is not tproxyd's: rename or delete it")

    def difference(self) -> str:
        """As `Part.difference`."""
        if self._is_applied():
            return ""
        held = _without_digests(_listing()).splitlines() if _exists() else []
        wanted = nft.table(self._wanted()).splitlines()
        lines = list(difflib.unified_diff(held, wanted, "nftables now", "nftables wanted", lineterm="", n=1))
        return "\n".join(lines) or "nftables: the table was changed by hand and is written again"

    def snapshot(self) -> str | None:
        """As `Part.snapshot`: the table as text."""
        return _listing() if _exists() else None

    def write(self) -> None:
        """As `Part.write`."""
        text = nft.render(self._wanted())
        libnftables.run(text)
        held = _list_table()
        self._verify(held)
        comment = f"{_digest(text)} {_listing_digest(held)}"
        libnftables.run(f'add set {nft.TABLE} {_DIGESTS} {{ type mark; comment "{comment}"; }}')

    def restore(self, snapshot: str | None) -> None:
        """As `Part.restore`."""
        libnftables.run(f"add table {nft.TABLE}\ndelete table {nft.TABLE}\n{snapshot or ''}")

    def _wanted(self) -> Ruleset:
        if self._ruleset is None:
            raise ValueError("no ruleset to write")
        return self._ruleset

    def _is_applied(self) -> bool:
        held = _list_table()
        comment = next((i["set"].get("comment", "") for i in held if i.get("set", {}).get("name") == _DIGESTS), "")
        return bool(comment == f"{_digest(nft.render(self._wanted()))} {_listing_digest(held)}")

    def _verify(self, held: list[dict[str, Any]]) -> None:
        ruleset = self._wanted()
        chains = nft.chains(ruleset)
        wanted = {
            "chains": len(chains),
            "rules": sum(len([line for line in lines if not line.startswith("type ")]) for lines in chains.values()),
            "sets": len(ruleset.excluded) + ruleset.lease,
            "prefixes": sum(len(prefix_set.prefixes) for prefix_set in ruleset.excluded),
        }
        sets = [item["set"] for item in held if "set" in item]
        seen = {
            "chains": sum("chain" in item for item in held),
            "rules": sum("rule" in item for item in held),
            "sets": len(sets),
            "prefixes": sum(len(item.get("elem", [])) for item in sets if item["name"] != nft.LEASE_SET),
        }
        if seen != wanted:
            raise RulesetError(f"nftables took the ruleset, but shows {seen} in place of {wanted}")


def renew_lease(ruleset: Ruleset, lease_s: int) -> None:
    """Let an open gateway go on intercepting for `lease_s` seconds; 0: stop at once.

    Raises:
        RulesetError: the table is gone.
    """
    libnftables.run(nft.renew_lease(ruleset, lease_s))


def _exists() -> bool:
    tables = libnftables.run_json("list tables inet")
    return any(item.get("table", {}).get("name") == nft.TABLE.split()[1] for item in tables)


def _list_table() -> list[dict[str, Any]]:
    return libnftables.run_json(f"list table {nft.TABLE}") if _exists() else []


def _listing() -> str:
    return libnftables.run(f"list table {nft.TABLE}", stateless=True)


def _without_digests(listing: str) -> str:
    lines = listing.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(f"\tset {_DIGESTS} ")), None)
    if start is None:
        return listing
    end = lines.index("\t}\n", start)
    return "".join(lines[:start] + lines[end + 2 :])


def _listing_digest(held: list[dict[str, Any]]) -> str:
    """Digest of what the kernel shows, but for handles, the lease's elements and the digests themselves."""
    shown = []
    for item in held:
        ((kind, body),) = item.items()
        if kind == "set" and body["name"] == _DIGESTS:
            continue
        dropped = {"handle", "elem"} if kind == "set" and body["name"] == nft.LEASE_SET else {"handle"}
        shown.append({kind: {key: value for key, value in body.items() if key not in dropped}})
    return _digest(json.dumps(shown, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
