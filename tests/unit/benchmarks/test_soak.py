"""The soak's bookkeeping: it must see a byte that changed, and a worker that grew."""

import hashlib
import random

import pytest

from benchmarks.soak import udp
from benchmarks.soak.__main__ import Held, grown
from benchmarks.soak.ledger import checksum, content
from benchmarks.soak.tcp import Kind, Plan


def test_a_checksum_is_that_of_the_content_whatever_its_pieces() -> None:
    whole, position = hashlib.sha256(), 0
    while position < 3_000_000:
        piece = content(1_048_000, position, min(70_001, 3_000_000 - position))
        whole.update(piece)
        position += len(piece)
    assert checksum(1_048_000, 3_000_000) == whole.hexdigest()
    assert checksum(1_048_001, 3_000_000) != whole.hexdigest()


def test_a_plan_reaches_the_server_as_it_was_made() -> None:
    plan = Plan(7, Kind.SERVER_RESETS, 1 << 24, 0)
    assert Plan.unpack(plan.pack()) == plan


def test_plans_differ_in_everything() -> None:
    chance = random.Random(1)
    plans = [Plan.random(number, chance) for number in range(200)]
    assert {plan.kind for plan in plans} == set(Kind)
    assert any(plan.up == 0 for plan in plans)
    assert any(plan.down > 1 << 22 for plan in plans)


@pytest.mark.parametrize("size", [16, 17, 1472, 60000])
def test_a_datagram_is_recognised_only_whole(size: int) -> None:
    datagram = udp.pack(5, 6, size)
    assert len(datagram) == size
    assert udp.unpack(datagram) == (5, 6)
    assert udp.unpack(datagram[:-1]) is None
    assert udp.unpack(datagram + b"x") is None
    for place in (0, 5, 15, size - 1):
        spoilt = bytearray(datagram)
        spoilt[place] ^= 1
        assert udp.unpack(bytes(spoilt)) is None


def test_flat_workers_pass_and_the_first_lap_does_not_count() -> None:
    assert grown([Held(10, 0, 5000), Held(34, 64, 26000), Held(34, 128, 27000)], workers=2) == []


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (Held(35, 64, 26000), "descriptors grew"),
        (Held(34, 130, 26000), "pipes"),
        (Held(34, 64, 28100), "memory grew"),
    ],
)
def test_workers_that_grow_are_seen(last: Held, what: str) -> None:
    (line,) = grown([Held(34, 64, 26000), Held(34, 64, 26000), last], workers=2)
    assert what in line


def test_two_laps_are_too_few() -> None:
    assert grown([Held(1, 1, 1)] * 2, workers=1)
