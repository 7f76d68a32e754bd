"""The configuration: YAML -> frozen, validated `Config`; every problem with file, line and column.

    document   bytes -> tree with positions         (knows YAML, no key)
    scalars    text -> one value                    (knows how a mark, a duration, a prefix is written)
    fields     what a key may hold                  (knows lists, bounds, units)
    model      tree -> Config                       (knows every key, its default, what contradicts what)
    section    what all mappings of the file share
    rules      the rules, and what they are to policy
    report     what is wrong -> where, and in which words
    wording    how a found value stands in a message
    loader     the file

Nothing here touches the system but `load_config`, which opens the file.
"""

from tproxyd.config.loader import load_config, parse_config
from tproxyd.config.model import (
    Config,
    DirectBackend,
    Exclude,
    HttpConnectBackend,
    Interception,
    Limits,
    Logging,
    Socks5Backend,
    Timeouts,
    TproxyListener,
)
from tproxyd.config.rules import RuleMatch, RuleSection, policy_rules
from tproxyd.config.scalars import Mark, PortRange, Prefix, Server

__all__ = [
    "Config",
    "DirectBackend",
    "Exclude",
    "HttpConnectBackend",
    "Interception",
    "Limits",
    "Logging",
    "Mark",
    "PortRange",
    "Prefix",
    "RuleMatch",
    "RuleSection",
    "Server",
    "Socks5Backend",
    "Timeouts",
    "TproxyListener",
    "load_config",
    "parse_config",
    "policy_rules",
]
