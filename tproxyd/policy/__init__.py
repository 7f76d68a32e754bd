"""Which backend takes a flow, and by which rule: pure, no sockets, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from tproxyd.flow import Decision, Flow


@dataclass(frozen=True, slots=True)
class Policy:
    """First match wins; the last word is `default`.

    Attributes:
        default: name of the backend for flows that no rule takes.
    """

    default: str

    def decide(self, flow: Flow) -> Decision:  # noqa: ARG002  # rules come with the other backends
        """Return the decision for a flow; the same flow always gets the same one."""
        return Decision(rule="default", backend=self.default)
