"""The exception tree. A class of its own only where a caller branches on it.

Every message is one line that says what is wrong, where, and what to do; `cli.py` alone turns a class into an
exit code.
"""

from __future__ import annotations


class TproxydError(Exception):
    """Anything tproxyd reports to its operator without a traceback."""


class ConfigError(TproxydError):
    """The configuration can't be used.

    Args:
        problems: one line each, in the order of the file, `FILE:LINE:COLUMN: what (hint)`.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        """Pickle by the problems: errors cross process borders."""
        return type(self), (self.problems,)


class PermissionDenied(TproxydError):
    """The process lacks a right (root, CAP_NET_ADMIN, CAP_NET_RAW)."""


class KernelUnsupported(TproxydError):
    """The kernel or the system lacks something that tproxyd needs; the message names it."""


class RulesetError(TproxydError):
    """Rules, sets or policy routing could not be applied, verified or removed."""


class TryAgain(TproxydError):
    """Something is busy or not there yet; the same command may succeed later."""


class ProtocolError(TproxydError):
    """A dialogue with a proxy or a client of ours can't go on."""


class LocalProtocolError(ProtocolError):
    """We asked a codec for what its protocol can't say, or at the wrong time."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what its protocol doesn't allow, or left too early."""
