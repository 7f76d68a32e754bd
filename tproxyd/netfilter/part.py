"""What `apply` puts together: a part of the box's state that tproxyd owns and no one else writes."""

from __future__ import annotations

from typing import Any, Protocol


class Part(Protocol):
    """Policy routing, the nftables table, the iptables chains.

    A snapshot is opaque to `apply`; `restore` of a snapshot brings that state back, and `restore(None)` leaves
    nothing behind.
    """

    name: str

    def check(self) -> None:
        """Look for what would stand in the way, changing nothing.

        Raises:
            RulesetError: someone else holds a name, mark, table or priority that this part needs.
            KernelUnsupported: the kernel or a library lacks something.
        """

    def difference(self) -> str:
        """Say what applying would change, as unified-diff-like lines; empty when nothing would."""

    def snapshot(self) -> Any:
        """Return the state there is now; None when there is none."""

    def write(self) -> None:
        """Put the wanted state in place and verify it by reading it back."""

    def restore(self, snapshot: Any) -> None:
        """Bring a snapshot's state back."""
