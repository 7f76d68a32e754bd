"""Which rule takes a flow, and what becomes of it: pure, no sockets, no clock.

rule       a rule as values; the naive evaluator
table      number -> which rules take it
address    address -> number
compiled   rules -> the form in which a worker asks them
explain    why a flow is decided as it is, for people
"""

from tproxyd.policy.compiled import Policy, pack
from tproxyd.policy.rule import DEFAULT, Field, Match, Rule, Rules, decide_naively, refusal

__all__ = ["DEFAULT", "Field", "Match", "Policy", "Rule", "Rules", "decide_naively", "pack", "refusal"]
