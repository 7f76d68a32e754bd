"""The values a flow is made of; no sockets, no clock.

An address is a string in its canonical form (`ipaddress` compressed), a port a host-order integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class Endpoint(NamedTuple):
    """An address and a port, either family."""

    address: str
    port: int

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.version == 6 else f"{self.address}:{self.port}"


class Client(Endpoint):
    """Where a flow comes from."""


class OrigDst(Endpoint):
    """Where the client meant to go: the destination before any rule touched the packet."""


class FlowKey(NamedTuple):
    """A client endpoint and where it meant to go: one UDP flow."""

    client: Client
    orig_dst: OrigDst

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.client.version

    def __str__(self) -> str:
        return f"{self.client} to {self.orig_dst}"


class Network(StrEnum):
    """The transport of a flow."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class Flow:
    """What policy may know of a flow when it decides.

    `interface` is the one that the flow came in by, `lo` for the box's own; empty where nobody asked.
    """

    network: Network
    client: Client
    orig_dst: OrigDst
    listener: str
    interface: str = ""


class Action(StrEnum):
    """What can be done with a flow other than to give it to a backend of the configuration."""

    BYPASS = "bypass"
    REJECT = "reject"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Decision:
    """Policy's answer: which rule took the flow, and which backend carries it or what is done in place of that.

    Attributes:
        rule: name of the rule, `default` where none matched.
        backend: name of the backend, or of the action.
        action: None where a backend of the configuration carries the flow.
    """

    rule: str
    backend: str
    action: Action | None = None


class Layer(StrEnum):
    """Where the bytes of a flow run; lower is cheaper."""

    KERNEL = "kernel"
    LEARNED = "learned"
    SPLICE = "splice"
    COPY = "copy"


class Phase(StrEnum):
    """How far a flow had come when it ended: to a server (or a first proxy), to what proxies say, to its bytes."""

    ACCEPT = "accept"
    CONNECT = "connect"
    HANDSHAKE = "handshake"
    RELAY = "relay"


class Cause(StrEnum):
    """The first thing that ended a flow; a server refusing is not a client leaving, nor a proxy saying no.

    What a rule rejects is rejected at once (`Phase.ACCEPT`), what a proxy does later.
    """

    DONE = "done"
    CLIENT_RESET = "client-reset"
    SERVER_RESET = "server-reset"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    REJECTED = "rejected"
    PROTOCOL = "protocol"
    UNRESOLVED = "unresolved"
    TIMED_OUT = "timed-out"
    IDLE = "idle"
    LIMIT = "limit"
    LOOP = "loop"
    DROPPED = "dropped"
    RESOURCES = "resources"
    SHUTDOWN = "shutdown"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class FlowEnd:
    """Why and how a flow ended: first cause and phase, bytes each way, age.

    `source` is the address and port that the server (or the first proxy) saw, None where it never came to that.
    """

    flow: Flow
    decision: Decision | None
    layer: Layer
    cause: Cause
    phase: Phase
    source: Endpoint | None
    bytes_up: int
    bytes_down: int
    duration_s: float


LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}
