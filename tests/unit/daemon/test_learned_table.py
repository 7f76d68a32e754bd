"""Learned flows as the supervisor keeps them: room, readings, and noticing that nothing gets through."""

from __future__ import annotations

import pytest

from tproxyd.daemon.learned_table import STUCK, UNPROVEN, LearnedTable
from tproxyd.flow import Client, FlowKey, OrigDst
from tproxyd.netfilter.learned import Traffic, Way


def key(number: int, version: int = 4) -> FlowKey:
    client, server = {4: ("10.1.0.2", "10.2.0.2"), 6: ("fd01::2", "fd02::2")}[version]
    return FlowKey(Client(client, number), OrigDst(server, 53))


def traffic(up: tuple[int, int] = (0, 0), down: tuple[int, int] = (0, 0), *, alive: bool = True) -> Traffic:
    return Traffic(alive, Way(*up), Way(*down))


def table_with(*keys: FlowKey) -> LearnedTable:
    table = LearnedTable(1000)
    for each in keys:
        table.put(each, 0)
    return table


def test_a_family_must_prove_that_forwarding_works_before_many_flows_rely_on_it() -> None:
    table = table_with(key(1))
    assert (table.room(4), table.room(6)) == (UNPROVEN - 1, UNPROVEN)
    table.update(4, {key(1): traffic(up=(STUCK, STUCK))})
    assert (table.room(4), table.room(6)) == (999, UNPROVEN)


def test_there_is_no_more_room_than_asked_for() -> None:
    table = LearnedTable(2)
    for number in (1, 2, 3):
        table.put(key(number), 0)
    assert table.room(4) == 0


def test_ended_flows_stay_until_they_are_removed() -> None:
    table = table_with(key(1), key(2))
    reading = table.update(4, {key(1): traffic(alive=False), key(2): traffic()})
    assert [flow.key for flow in reading.ended] == [key(1)]
    assert len(table) == 2
    table.remove(reading.ended)
    table.remove(reading.ended)
    assert [flow.key for flow in table.flows()] == [key(2)]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_direction_in_which_nothing_goes_on_is_stuck(direction: str) -> None:
    table = table_with(key(1))
    other = {"up": "down", "down": "up"}[direction]
    assert table.update(4, {key(1): traffic(**{direction: (STUCK - 1, 0), other: (90, 90)})}).stuck is None
    stuck = table.update(4, {key(1): traffic(**{direction: (STUCK, 0), other: (95, 95)})}).stuck
    assert stuck is not None
    assert stuck.key == key(1)


def test_what_passed_once_is_stuck_when_it_passes_no_more() -> None:
    table = table_with(key(1))
    assert table.update(4, {key(1): traffic(up=(100, 100))}).stuck is None
    assert table.update(4, {key(1): traffic(up=(100 + STUCK - 1, 100))}).stuck is None
    assert table.update(4, {key(1): traffic(up=(100 + STUCK, 100))}).stuck is not None


def test_now_and_then_a_packet_lost_is_no_alarm() -> None:
    """Too large for the next link, say: the sender is told and sends smaller ones."""
    table = table_with(key(1))
    for step in range(1, 50):
        assert table.update(4, {key(1): traffic(up=(3 * step, 2 * step))}).stuck is None


def test_families_do_not_mix() -> None:
    table = table_with(key(1), key(1, 6))
    reading = table.update(6, {key(1): traffic(alive=False), key(1, 6): traffic(alive=False)})
    assert [flow.key for flow in reading.ended] == [key(1, 6)]
