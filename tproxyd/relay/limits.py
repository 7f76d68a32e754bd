"""How many flows there may be, in all and for each client address."""

from __future__ import annotations


class FlowLimits:
    """Counts TCP and UDP flows together."""

    def __init__(self, max_flows: int, max_flows_per_client: int) -> None:
        """Args: the two limits, both at least 1."""
        self._max_flows = max_flows
        self._max_per_client = max_flows_per_client
        self._by_client: dict[str, int] = {}
        self.total = 0

    def has_room(self, client: str) -> bool:
        """Tell whether `take` would count a flow of this client in."""
        return self.total < self._max_flows and self._by_client.get(client, 0) < self._max_per_client

    def take(self, client: str) -> bool:
        """Count a new flow of this client address; False, and nothing counted, when it would be one too many."""
        if not self.has_room(client):
            return False
        self._by_client[client] = self._by_client.get(client, 0) + 1
        self.total += 1
        return True

    def give_back(self, client: str) -> None:
        """Count a flow out that `take` counted in."""
        held = self._by_client[client]
        if held == 1:
            del self._by_client[client]
        else:
            self._by_client[client] = held - 1
        self.total -= 1
