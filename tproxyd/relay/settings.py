"""What a worker needs to know, small enough to travel as one JSON message from the supervisor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, Self

Source = Literal["four-tuple", "address", "gateway"]
Nat = Literal["full-cone", "symmetric"]
Resolve = Literal["remote", "local"]

MESSAGE_BYTES: Final = 1 << 18
"""The longest message between supervisor and worker, either way."""


@dataclass(frozen=True, slots=True)
class DirectSettings:
    """How the `direct` backend opens its server side."""

    source: Source
    nat: Nat
    type: Literal["direct"] = "direct"


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How a proxy is reached and what it is told; the password shows in no repr.

    Attributes:
        host: an address or a name.
        via: the backend that leads to it; None: straight from this box.
        resolve: whether it is told names, or addresses alone.
        username: None: it wants no credentials.
    """

    type: Literal["socks5", "http_connect"]
    host: str
    port: int
    via: str | None = None
    resolve: Resolve = "remote"
    username: str | None = None
    password: str = field(default="", repr=False)


BackendSettings = DirectSettings | ProxySettings


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """Times in seconds; limits are this worker's share; marks are SO_MARK values.

    Attributes:
        listener: name of the tproxy listener, for policy and logs.
    """

    listener: str
    backends: dict[str, BackendSettings]
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
        fields["backends"] = {name: _backend(backend) for name, backend in fields["backends"].items()}
        return cls(**fields)


def _backend(fields: dict[str, Any]) -> BackendSettings:
    return DirectSettings(**fields) if fields["type"] == "direct" else ProxySettings(**fields)
