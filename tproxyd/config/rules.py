"""The rules of the configuration: what each may hold, what contradicts what, and what they are to `policy`. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, Field, StrictStr, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from tproxyd.config.fields import (
    AskedInterfaces,
    AskedNames,
    AskedNetworks,
    AskedPorts,
    AskedPrefixes,
    Name,
    problem,
)
from tproxyd.config.scalars import PortRange
from tproxyd.config.section import Sparse
from tproxyd.config.wording import one_of, shown
from tproxyd.flow import Action, Decision
from tproxyd.policy import DEFAULT, Match, Rule

ACTIONS: Final = tuple(str(action) for action in Action)
MAX_RULES: Final = 10_000
"""As many can be counted in one message from a worker."""


def _not_the_last_word(name: str) -> str:
    if name == DEFAULT:
        raise ValueError(f"{shown(name)} is what logs call flows that no rule takes; take another name")
    return name


class RuleMatch(Sparse):
    """What a rule asks of a flow: every key that is there, any one value of each."""

    not_yet: ClassVar[frozenset[str]] = frozenset({"domain"})

    network: AskedNetworks = ()
    source: AskedPrefixes = ()
    destination: AskedPrefixes = ()
    source_port: AskedPorts = ()
    port: AskedPorts = ()
    interface: AskedInterfaces = ()
    listener: AskedNames = ()

    @model_validator(mode="after")
    def _one_family(self) -> Self:
        families = [{prefix.version for prefix in prefixes} for prefixes in (self.source, self.destination)]
        if all(families) and not families[0] & families[1]:
            raise ValueError("no flow has a source and a destination of different families; mend one of them")
        return self

    @property
    def takes_everything(self) -> bool:
        """Whether it asks for nothing."""
        return not any(getattr(self, name) for name in type(self).model_fields)


class RuleSection(Sparse):
    """A rule: what it asks, and the backend or action for the flows that it takes."""

    name: Annotated[Name, AfterValidator(_not_the_last_word)] = Field(examples=["web"])
    match: RuleMatch = RuleMatch()
    backend: StrictStr | None = None
    action: Literal["bypass", "reject", "drop"] | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if self.backend is not None and self.action is not None:
            raise ValueError("a rule has a backend or an action, not both; remove one")
        if self.backend is None and self.action is None:
            raise ValueError(f"a rule needs a backend or an action; write backend: direct or action: {one_of(ACTIONS)}")
        return self


def check_rules(rules: tuple[RuleSection, ...], known: Mapping[str, Collection[str]]) -> tuple[RuleSection, ...]:
    """Return the same rules; `known` has the names of interfaces, listeners and backends, as far as they are valid.

    Raises:
        ValidationError: all that is wrong between them, and between them and the rest of the configuration.
    """
    wrong = [*_strangers(rules, known), *_twins(rules), *_never_asked(rules)]
    if len(rules) > MAX_RULES:
        error = ValueError(f"{len(rules)} rules; the most is {MAX_RULES}: put what they share into lists")
        wrong.append(problem(error, rules))
    if wrong:
        raise ValidationError.from_exception_data("rules", wrong)
    return rules


def policy_rules(rules: Iterable[RuleSection]) -> tuple[Rule, ...]:
    """Return the rules as the policy has them."""
    return tuple(Rule(_match(rule.match), _decision(rule)) for rule in rules)


def _strangers(rules: Iterable[RuleSection], known: Mapping[str, Collection[str]]) -> Iterator[InitErrorDetails]:
    """Find names of things that are not there."""
    for number, rule in enumerate(rules):
        backends = known.get("backend")
        if rule.backend is not None and backends is not None and rule.backend not in backends:
            hint = f"write action: {rule.backend}" if rule.backend in ACTIONS else f"write {one_of(backends)}"
            error = ValueError(f"there is no backend {shown(rule.backend)}; {hint}")
            yield problem(error, rule.backend, number, "backend")
        for key, what in (("interface", "client-side interface"), ("listener", "listener")):
            names = getattr(rule.match, key)
            for place, name in enumerate(names):
                if key in known and name not in known[key]:
                    error = ValueError(f"{shown(name)} is no {what} of this configuration; write {one_of(known[key])}")
                    yield problem(error, name, number, "match", key, *([place] if len(names) > 1 else []))


def _twins(rules: Iterable[RuleSection]) -> Iterator[InitErrorDetails]:
    names: set[str] = set()
    for number, rule in enumerate(rules):
        if rule.name in names:
            error = ValueError(f"{shown(rule.name)} names another rule, too; give each its own name")
            yield problem(error, rule.name, number, "name")
        names.add(rule.name)


def _never_asked(rules: tuple[RuleSection, ...]) -> Iterator[InitErrorDetails]:
    """A rule behind one that takes everything is a mistake, and if it was to refuse something, a dangerous one."""
    for number, rule in enumerate(rules[:-1]):
        if rule.match.takes_everything:
            error = ValueError(f"never asked: {shown(rule.name)} before it takes everything; put that one last")
            yield problem(error, rules[number + 1], number + 1)
            return


def _match(match: RuleMatch) -> Match:
    return Match(
        networks=match.network,
        interfaces=match.interface,
        listeners=match.listener,
        sources=match.source,
        destinations=match.destination,
        source_ports=_ports(match.source_port),
        ports=_ports(match.port),
    )


def _ports(ranges: Iterable[PortRange]) -> tuple[tuple[int, int], ...]:
    return tuple((ports.first, ports.last) for ports in ranges)


def _decision(rule: RuleSection) -> Decision:
    if rule.action is not None:
        return Decision(rule.name, rule.action, Action(rule.action))
    return Decision(rule.name, rule.backend or "")
