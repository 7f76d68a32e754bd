"""What a worker needs to know, small enough to travel as one JSON message from the supervisor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final, Literal, Self

Source = Literal["four-tuple", "address", "gateway"]
Nat = Literal["full-cone", "symmetric"]

MESSAGE_BYTES: Final = 1 << 18
"""The longest message between supervisor and worker, either way."""


@dataclass(frozen=True, slots=True)
class DirectSettings:
    """How the `direct` backend opens its server side."""

    source: Source
    nat: Nat


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """Times in seconds; limits are this worker's share; marks are SO_MARK values.

    Attributes:
        listener: name of the tproxy listener, for policy and logs.
    """

    listener: str
    backends: dict[str, DirectSettings]
    connect_s: float
    tcp_idle_s: float
    udp_idle_s: float
    max_flows: int
    max_flows_per_client: int
    client_mark: int
    server_mark: int
    log_level: str
    log_format: str
    log_flows: bool
    user: str

    def to_json(self) -> bytes:
        """Serialise for the channel to a worker."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read what `to_json` wrote."""
        fields = json.loads(data)
        fields["backends"] = {name: DirectSettings(**backend) for name, backend in fields["backends"].items()}
        return cls(**fields)
