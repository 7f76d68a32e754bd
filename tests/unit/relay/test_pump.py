"""A direction of a TCP flow, over real socket pairs."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tproxyd.relay.pipes import PipePool
from tproxyd.relay.pump import READ_BYTES, TURN_BYTES, Direction, SinkReset, SourceReset

RESET = struct.pack("ii", 1, 0)


class Line:
    """client - source | direction | sink - server, all TCP on loopback."""

    def __init__(self) -> None:
        self.client, self.source = tcp_pair()
        self.sink, self.server = tcp_pair()
        self.pipes = PipePool()
        self.source.setblocking(False)
        self.sink.setblocking(False)
        self.direction = Direction(self.source, self.sink, self.pipes)

    def close(self) -> None:
        self.direction.release()
        self.pipes.close()
        for each in (self.client, self.source, self.sink, self.server):
            each.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for each in (near, far):
        each.settimeout(5)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


def received(server: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += server.recv(count - len(found))
    return found


def test_a_short_read_is_delivered_and_ends_the_turn(line: Line) -> None:
    line.client.sendall(b"request")
    assert line.direction.run()
    assert received(line.server, 7) == b"request"
    assert line.direction.total == 7
    assert not line.direction.eof


def test_bulk_is_spliced_and_nothing_is_lost(line: Line) -> None:
    data = os.urandom(20 * READ_BYTES)
    line.client.sendall(data)
    while not (line.direction.run() and line.direction.total == len(data)):
        pass
    assert received(line.server, len(data)) == data


def test_eof_is_passed_on_after_the_data(line: Line) -> None:
    line.client.sendall(b"last")
    line.client.shutdown(socket.SHUT_WR)
    line.direction.hangup = True
    assert line.direction.run()
    assert line.direction.eof
    assert received(line.server, 4) == b"last"
    assert line.server.recv(1) == b""


def test_a_full_sink_blocks_and_what_is_held_comes_first(line: Line) -> None:
    sent = 0
    line.client.setblocking(False)
    piece = os.urandom(1 << 16)
    expected = b""
    while not line.direction.blocked:
        try:
            count = line.client.send(piece)
            expected += piece[:count]
            sent += count
        except BlockingIOError:
            pass
        line.direction.run()
    assert not line.direction.empty
    line.client.settimeout(5)
    line.client.shutdown(socket.SHUT_WR)
    line.direction.hangup = True
    got = b""
    while len(got) < sent:
        got += line.server.recv(1 << 20)
        line.direction.run()
    assert got == expected
    assert line.direction.empty


def test_a_turn_is_bounded(line: Line) -> None:
    data = bytes(3 * TURN_BYTES)
    sender = threading.Thread(target=line.client.sendall, args=(data,))
    reader = threading.Thread(target=received, args=(line.server, len(data)))
    sender.start()
    reader.start()
    moved = []
    while line.direction.total < len(data):
        before = line.direction.total
        line.direction.run()
        moved.append(line.direction.total - before)
    sender.join()
    reader.join()
    assert max(moved) <= 2 * TURN_BYTES


def test_reset_of_the_source_comes_after_what_it_sent(line: Line) -> None:
    line.client.sendall(b"before")
    line.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    line.client.close()
    line.direction.hangup = True
    with pytest.raises(SourceReset):
        line.direction.run()
    assert line.direction.total == 6


def test_reset_of_the_sink_is_told(line: Line) -> None:
    line.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    line.server.close()
    line.client.sendall(b"x")
    with pytest.raises(SinkReset):
        line.direction.run()


def test_what_looks_like_eof_after_the_error_was_spent_is_a_reset(line: Line) -> None:
    line.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    line.client.close()
    assert line.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    line.direction.source_lost = True
    with pytest.raises(SourceReset):
        line.direction.run()


def test_an_idle_direction_gives_its_pipe_back(line: Line) -> None:
    line.client.sendall(bytes(4 * READ_BYTES))
    line.direction.run()
    line.client.sendall(b"x")
    while line.direction.total < 4 * READ_BYTES + 1:
        line.direction.run()
    line.direction.run()
    assert line.pipes.take() is not None
    line.client.sendall(b"y")
    line.direction.run()
    assert received(line.server, 4 * READ_BYTES + 2)[-2:] == b"xy"


def test_without_pipes_bulk_is_copied(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipePool, "take", lambda _: None)
    data = os.urandom(10 * READ_BYTES)
    line.client.sendall(data)
    while line.direction.total < len(data):
        line.direction.run()
    assert received(line.server, len(data)) == data


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 60_000), max_size=12))
def test_any_chunking_gives_the_same_bytes(sizes: list[int]) -> None:
    line = Line()
    try:
        data = b"".join(os.urandom(size) for size in sizes)
        at = 0
        got = b""
        for size in sizes:
            line.client.sendall(data[at : at + size])
            at += size
            while line.direction.total < at:
                line.direction.run()
            got += received(line.server, at - len(got))
        assert got == data
    finally:
        line.close()
