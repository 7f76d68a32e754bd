"""Flow limits against a naive count."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tproxyd.relay.limits import FlowLimits

steps = st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60)


@given(steps, st.integers(1, 6), st.integers(1, 4))
def test_limits_agree_with_a_naive_count(steps: list[tuple[bool, str]], total: int, each: int) -> None:
    limits, held = FlowLimits(total, each), Counter[str]()
    for take, client in steps:
        if take:
            allowed = held.total() < total and held[client] < each
            assert limits.take(client) == allowed
            held[client] += allowed
        elif held[client]:
            limits.give_back(client)
            held[client] -= 1
        assert limits.total == held.total()
