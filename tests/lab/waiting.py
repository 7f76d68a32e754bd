"""Waiting for what happens in other processes: bounded, and quick to notice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(probe: Callable[[], T], what: str, timeout_s: float = 5.0, every_s: float = 0.02) -> T:
    """Call `probe` until it returns something true, and return that.

    Raises:
        AssertionError: it has not within `timeout_s`; the message tells its last answer.
    """
    end = time.monotonic() + timeout_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what} (last: {found!r})")
        time.sleep(every_s)
