"""A user name and a password, on their way to a proxy or from a client."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Credentials:
    """User name and password; the password shows in no repr.

    Bytes of a peer that are no UTF-8 are kept as lone surrogates (PEP 383): encode with `surrogateescape` before
    comparing.
    """

    username: str
    password: str = field(repr=False)
