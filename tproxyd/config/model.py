"""The configuration as frozen, validated values: which keys there are, what each may hold, its default.

Pure. Positions and files are unknown here (see `document`, `report`, `loader`); what a key may hold is in
`fields`. Sections can be built in code, too, from finished values: `Interception(interfaces=("lan0",))`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from tproxyd.config.fields import (
    WRITTEN,
    Account,
    Duration,
    Families,
    FilePath,
    FlowCount,
    Interfaces,
    MarkField,
    Name,
    Port,
    Ports,
    Prefixes,
    Priority,
    ServerField,
    Table,
    Username,
    Workers,
    problem,
    unexpected,
)
from tproxyd.config.rules import ACTIONS, RuleSection, check_rules
from tproxyd.config.scalars import Mark, PortRange
from tproxyd.config.section import Section
from tproxyd.config.wording import one_of, shown

ALL_PORTS: Final = (PortRange(1, 65535),)
DEFAULT_PER_CLIENT: Final = 4096


class Exclude(Section):
    """Prefixes that stay routed by the kernel, by either end of a packet."""

    destinations: Prefixes = ()
    sources: Prefixes = ()


class Interception(Section):
    """What the kernel diverts to tproxyd, and by which means."""

    interfaces: Interfaces = Field(examples=["[lan0]"])
    ruleset: Literal["nftables", "iptables"] = "nftables"
    families: Families = ("ipv4", "ipv6")
    tcp_ports: Ports = ALL_PORTS
    udp_ports: Ports = ALL_PORTS
    exclude: Exclude = Exclude()
    own_traffic: StrictBool = False
    on_failure: Literal["closed", "open"] = "closed"
    learned_flows: StrictBool = True
    mark: MarkField = Mark(0x1, 0x1)
    client_mark: MarkField = Field(default=Mark(0x2, 0x2), validate_default=True)
    server_mark: MarkField = Field(default=Mark(0x4, 0x4), validate_default=True)
    route_table: Table = 7440
    rule_priority: Priority = 7440

    @field_validator("udp_ports")
    @classmethod
    def _something_to_intercept(cls, ports: tuple[PortRange, ...], info: ValidationInfo) -> tuple[PortRange, ...]:
        if not ports and info.data.get("tcp_ports") == ():
            raise ValueError("tcp_ports and udp_ports are both empty; one of them must name ports")
        return ports

    @model_validator(mode="before")
    @classmethod
    def _default_of_iptables(cls, data: Any) -> Any:
        """A default must not contradict what the operator wrote."""
        if not isinstance(data, Mapping) or "learned_flows" in data or data.get("ruleset") != "iptables":
            return data
        return {**data, "learned_flows": False}

    @field_validator("learned_flows")
    @classmethod
    def _only_nftables_learns(cls, learned: bool, info: ValidationInfo) -> bool:
        if learned and info.data.get("ruleset") == "iptables":
            raise ValueError("needs ruleset: nftables (no ipset holds a client's port and its server); write false")
        return learned

    @field_validator("client_mark", "server_mark")
    @classmethod
    def _bits_of_its_own(cls, mark: Mark, info: ValidationInfo) -> Mark:
        for name in ("mark", "client_mark"):  # of these, `data` holds the ones that stand before this field
            other = info.data.get(name)
            if isinstance(other, Mark) and mark.overlaps(other):
                what = f"{info.field_name} {mark} and {name} {other} share bits of their masks"
                text = f"{what}; give each mark bits of its own"
                raise PydanticCustomError("overlap", text, {"beside": name})
        return mark


class Typed(Section):
    """A listener or backend: its `type` decides which other keys there are, so it is looked at first."""

    types: ClassVar[tuple[str, ...]] = ()
    types_not_yet: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping):
            return data
        if "type" not in data:
            if info.context == WRITTEN:
                missing = InitErrorDetails(type="missing", loc=("type",), input=data)
                raise ValidationError.from_exception_data(cls.__name__, [missing])
            return data
        kind = data["type"]
        if kind in cls.types:
            return data
        if kind in cls.types_not_yet:
            error = ValueError(f"type {shown(kind)} is not in this version; write {one_of(cls.types)}")
        else:
            error = unexpected(kind, one_of(cls.types))
        raise ValidationError.from_exception_data(cls.__name__, [problem(error, kind, "type")])


class TproxyListener(Typed):
    """The port that diverted flows arrive at."""

    types: ClassVar[tuple[str, ...]] = ("tproxy",)
    types_not_yet: ClassVar[tuple[str, ...]] = ("socks5", "forward")

    name: Name = Field(examples=["lan"])
    type: Literal["tproxy"] = Field(default="tproxy", examples=["tproxy"])
    port: Port = Field(examples=["7440"])


BACKEND_TYPES: Final = ("direct", "socks5", "http_connect")


class DirectBackend(Typed):
    """Reaches the original destination itself, from an address that `source` chooses."""

    types: ClassVar[tuple[str, ...]] = BACKEND_TYPES
    types_not_yet: ClassVar[tuple[str, ...]] = ("upstream", "tunnel")

    type: Literal["direct"] = Field(default="direct", examples=["direct"])
    source: Literal["four-tuple", "address", "gateway"] = "four-tuple"
    nat: Literal["full-cone", "symmetric"] = "full-cone"


class ProxyBackend(Typed):
    """Asks a proxy for the original destination."""

    types: ClassVar[tuple[str, ...]] = BACKEND_TYPES
    types_not_yet: ClassVar[tuple[str, ...]] = DirectBackend.types_not_yet

    type: Literal["socks5", "http_connect"]
    server: ServerField = Field(examples=["192.0.2.1:1080"])
    via: StrictStr | None = None
    resolve: Literal["remote", "local"] = "remote"
    username: Username | None = None
    password_file: FilePath | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.username is None) != (self.password_file is None):
            there, lacks = ("password_file", "username") if self.username is None else ("username", "password_file")
            error = ValueError(f"username and password_file belong together; add {lacks}")
            raise ValidationError.from_exception_data("backend", [problem(error, getattr(self, there), there)])
        return self


class Socks5Backend(ProxyBackend):
    """Asks a SOCKS5 proxy, for UDP as well."""

    type: Literal["socks5"] = Field(default="socks5", examples=["socks5"])


class HttpConnectBackend(ProxyBackend):
    """Asks an HTTP proxy by CONNECT."""

    not_yet: ClassVar[frozenset[str]] = frozenset({"tls", "ca_file", "server_name"})

    type: Literal["http_connect"] = Field(default="http_connect", examples=["http_connect"])

    @field_validator("username")
    @classmethod
    def _no_colon(cls, name: str | None) -> str | None:
        if name is not None and ":" in name:
            raise ValueError(f"{shown(name)} contains a colon, which HTTP Basic has no way to say; remove it")
        return name


Backend = DirectBackend | Socks5Backend | HttpConnectBackend
BACKENDS: Final[Mapping[Any, type[Backend]]] = {"socks5": Socks5Backend, "http_connect": HttpConnectBackend}


def _read_backend(value: object, _union: object, info: ValidationInfo) -> Backend:
    """Read a backend by its type; one without a type, or with a wrong one, gets told of that."""
    if isinstance(value, Backend):
        return value
    kind = value.get("type") if isinstance(value, Mapping) else None
    section = BACKENDS.get(kind, DirectBackend) if isinstance(kind, str) else DirectBackend
    return section.model_validate(value, context=info.context)


def _check_vias(backends: Mapping[str, Backend]) -> Mapping[str, Backend]:
    """Each `via` must name a proxy, and none may lead back to where it came from."""
    wrong: list[InitErrorDetails] = []
    for name, backend in backends.items():
        if isinstance(backend, ProxyBackend) and backend.via is not None and (text := _wrong_via(name, backends)):
            wrong.append(problem(ValueError(text), backend.via, name, "via"))
    if wrong:
        raise ValidationError.from_exception_data("backends", wrong)
    return backends


def _wrong_via(name: str, backends: Mapping[str, Backend]) -> str:
    """Return what is wrong with a backend's `via`, or nothing."""
    via = _via(backends[name])
    if not isinstance(backends.get(str(via)), ProxyBackend):
        proxies = [other for other, one in backends.items() if isinstance(one, ProxyBackend) and other != name]
        hint = f"write {one_of(proxies)}" if proxies else "remove it"
        return f"{shown(via)} is no backend of type socks5 or http_connect; {hint}"
    way = [name]
    while via is not None and via in backends and via not in way:
        way.append(via)
        via = _via(backends[via])
    return f"a loop: {' via '.join([*way, name])}; remove one via" if via == name else ""


def _via(backend: Backend) -> str | None:
    return backend.via if isinstance(backend, ProxyBackend) else None


class Timeouts(Section):
    """How long tproxyd waits, in seconds."""

    not_yet: ClassVar[frozenset[str]] = frozenset({"sniff"})

    connect: Duration = 5.0
    tcp_idle: Duration = 7200.0
    udp_idle: Duration = 60.0


class Limits(Section):
    """How many flows there may be at a time, over all workers."""

    max_flows: FlowCount = 65536
    max_flows_per_client: FlowCount = DEFAULT_PER_CLIENT

    @model_validator(mode="before")
    @classmethod
    def _follow_down(cls, data: Any) -> Any:
        """A default must not contradict what the operator wrote."""
        if not isinstance(data, Mapping) or "max_flows_per_client" in data:
            return data
        most = data.get("max_flows")
        if isinstance(most, int) and 1 <= most < DEFAULT_PER_CLIENT:
            return {**data, "max_flows_per_client": most}
        return data

    @field_validator("max_flows_per_client")
    @classmethod
    def _within_all(cls, per_client: int, info: ValidationInfo) -> int:
        most = info.data.get("max_flows", per_client)
        if per_client > most:
            raise ValueError(f"{per_client} is more than max_flows ({most}); lower it or raise max_flows")
        return per_client


class Logging(Section):
    """What tproxyd writes to its log, and in which shape."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    flows: StrictBool = False


def _only_one(listeners: tuple[TproxyListener, ...]) -> tuple[TproxyListener, ...]:
    if not listeners:
        raise ValueError("the list is empty; leave the key out for a tproxy listener on port 7440")
    names: set[str] = set()
    wrong: list[InitErrorDetails] = []
    for index, listener in enumerate(listeners):
        if listener.name in names:
            error = ValueError(f"{shown(listener.name)} names another listener, too; give each its own name")
            wrong.append(problem(error, listener.name, index, "name"))
        if index > 0:
            error = ValueError("a second tproxy listener; this version has exactly one, remove this")
            wrong.append(problem(error, listener, index))
        names.add(listener.name)
    if wrong:
        raise ValidationError.from_exception_data("listeners", wrong)
    return listeners


def _with_direct(backends: Mapping[str, Backend]) -> Mapping[str, Backend]:
    for name in ACTIONS:
        if name in backends:
            error = ValueError(f"{shown(name)} is what a rule's action is called; take another name")
            raise ValidationError.from_exception_data("backends", [problem(error, name, name, "[key]")])
    return {"direct": DirectBackend(), **backends}


class Config(Section):
    """The whole configuration."""

    not_yet: ClassVar[frozenset[str]] = frozenset({"control"})

    interception: Interception = Field(examples=["{interfaces: [lan0]}"])
    listeners: Annotated[tuple[TproxyListener, ...], AfterValidator(_only_one)] = (
        TproxyListener(name="tproxy", port=7440),
    )
    backends: Annotated[
        Mapping[Name, Annotated[Backend, WrapValidator(_read_backend)]],
        AfterValidator(_with_direct),
        AfterValidator(_check_vias),
    ] = Field(default_factory=lambda: {"direct": DirectBackend()})
    rules: tuple[RuleSection, ...] = ()
    default: StrictStr = "direct"
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    workers: Workers = "auto"
    user: Account = "nobody"
    logging: Logging = Logging()

    @field_validator("rules")
    @classmethod
    def _rules_speak_of_what_there_is(
        cls, rules: tuple[RuleSection, ...], info: ValidationInfo
    ) -> tuple[RuleSection, ...]:
        known: dict[str, Collection[str]] = {}  # what is wrong with itself is absent
        if (interception := info.data.get("interception")) is not None:
            known["interface"] = (*interception.interfaces, *(["lo"] if interception.own_traffic else []))
        if (listeners := info.data.get("listeners")) is not None:
            known["listener"] = [listener.name for listener in listeners]
        if (backends := info.data.get("backends")) is not None:
            known["backend"] = backends
        return check_rules(rules, known)

    @field_validator("default")
    @classmethod
    def _names_a_backend(cls, default: str, info: ValidationInfo) -> str:
        backends = info.data.get("backends")  # absent if something is wrong with the backends themselves
        if default in ACTIONS:
            last = f"write a last rule without a match: {{name: rest, action: {default}}}"
            raise ValueError(f"{shown(default)} is an action, the default is a backend; {last}")
        if backends is not None and default not in backends:
            raise ValueError(f"there is no backend {shown(default)}; write {one_of(backends)}")
        return default
