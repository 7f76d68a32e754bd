"""TCP flows of random sizes, stalls, half-closes and resets; both ends of each, on real sockets.

A flow begins with a head that tells the server its part; the server says one byte to it, so that both ends stand
before anything is reset. Each end takes the SHA-256 of what it got; it must be that of what the other end sent. Where
an end resets, the other must see a reset, not an end, and what it got must be the beginning of what was sent.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Final, Self

from benchmarks.soak.ledger import Ledger, checksum, content

_HEAD: Final = struct.Struct("!IBII")
_HELLO: Final = b"!"
_CHUNKS: Final = (1, 100, 1460, 16384, 65536, 262144)
_STALL_CHANCE: Final = 0.02  # before each piece that is sent or taken
_STALL_S: Final = (0.01, 0.4)
_LARGEST: Final = 24  # as a power of two; sizes are spread evenly over the powers
_PATIENCE_S: Final = 60.0
_RESET: Final = struct.pack("ii", 1, 0)


class Kind(enum.Enum):
    """Who stops how."""

    CLIENT_FIRST = 0  # it half-closes; only then the server answers
    SERVER_FIRST = 1
    AT_ONCE = 2  # both directions run side by side, each end half-closes when it has sent all
    CLIENT_RESETS = 3  # in the middle
    SERVER_RESETS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What both ends of a flow are to do.

    Attributes:
        number: of the flow; also the seed of what it carries.
        up: bytes from client to server.
        down: bytes from server to client.
    """

    number: int
    kind: Kind
    up: int
    down: int

    @classmethod
    def random(cls, number: int, chance: random.Random) -> Self:
        """Make one up."""
        return cls(number, chance.choice(list(Kind)), _size(chance), _size(chance))

    def pack(self) -> bytes:
        """Return the head that tells the server."""
        return _HEAD.pack(self.number, self.kind.value, self.up, self.down)

    @classmethod
    def unpack(cls, head: bytes) -> Self:
        """Read a head."""
        number, kind, up, down = _HEAD.unpack(head)
        return cls(number, Kind(kind), up, down)


class Wrong(Exception):
    """An end saw something that was not planned."""


class Server:
    """Plays the server's part of every flow that comes in.

    Attributes:
        address: where it listens.
    """

    def __init__(self, listener: socket.socket, chance: random.Random) -> None:
        """Take over a listening socket; run `serve`, then `close`."""
        listener.setblocking(False)
        self._listener = listener
        self._chance = chance
        self.address = listener.getsockname()
        self._outcomes: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def expect(self, number: int) -> asyncio.Future[None]:
        """Return a future for the server's part of a flow: it has Wrong or an OSError in it if that went wrong."""
        self._outcomes[number] = asyncio.get_running_loop().create_future()
        return self._outcomes[number]

    async def serve(self) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            connection.setblocking(False)
            task = asyncio.create_task(self._answer(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cut what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def _answer(self, connection: socket.socket) -> None:
        with connection:
            plan = Plan.unpack(await _exactly(connection, _HEAD.size))
            outcome = self._outcomes.pop(plan.number)
            try:
                await asyncio.get_running_loop().sock_sendall(connection, _HELLO)
                end = End(connection, self._chance, sends=(plan.number + 1, plan.down), gets=(plan.number, plan.up))
                await end.play(plan.kind, first=Kind.SERVER_FIRST, resets=Kind.SERVER_RESETS)
            except (Wrong, OSError) as error:
                _settle(outcome, error)
            else:
                _settle(outcome, None)


async def flow(client: socket.socket, server: Server, plan: Plan, chance: random.Random, ledger: Ledger) -> None:
    """Play a flow from the client's side, wait for the server's, and note how it went. Closes the socket."""
    outcome = server.expect(plan.number)
    with client:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await _client(client, server, plan, chance)
                await outcome
        except (Wrong, OSError) as error:  # TimeoutError is an OSError
            outcome.cancel()
            ledger.failed(
                plan.kind.name, plan.number, f"{type(error).__name__} {error} ({plan.up} up, {plan.down} down)"
            )
            return
    resets = plan.kind in (Kind.CLIENT_RESETS, Kind.SERVER_RESETS)
    ledger.ended(plan.kind.name, 0 if resets else plan.up + plan.down)


class End:
    """One end of a connection."""

    def __init__(
        self, connection: socket.socket, chance: random.Random, *, sends: tuple[int, int], gets: tuple[int, int]
    ) -> None:
        """Take part in a flow.

        Args:
            connection: stays the caller's.
            chance: for stalls and pieces.
            sends: seed and count of the bytes to send.
            gets: seed and count of the bytes that the other end sends.
        """
        self._connection, self._chance = connection, chance
        self._sends, self._gets = sends, gets
        self._loop = asyncio.get_running_loop()

    async def play(self, kind: Kind, *, first: Kind, resets: Kind) -> None:
        """Do this end's part.

        Args:
            kind: of the flow.
            first: the kind in which this end is the first to send.
            resets: the kind in which this end resets.

        Raises:
            Wrong: the other end's bytes did not arrive as they were sent.
            OSError: the connection broke.
        """
        if kind is resets:
            await self._send(self._sends[1] // 2)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)  # closed by the caller
        elif kind in (Kind.CLIENT_RESETS, Kind.SERVER_RESETS):
            await self._expect_reset()
        elif kind is Kind.AT_ONCE:
            await _side_by_side(self._send_all(), self._get_all())
        else:
            steps: list[Callable[[], Awaitable[None]]] = [self._send_all, self._get_all]
            for step in steps if kind is first else reversed(steps):
                await step()

    async def _send_all(self) -> None:
        await self._send(self._sends[1])
        self._connection.shutdown(socket.SHUT_WR)

    async def _send(self, count: int) -> None:
        position = 0
        while position < count:
            await self._perhaps_stall()
            piece = content(self._sends[0], position, min(count - position, self._chance.choice(_CHUNKS) * 4))
            await self._loop.sock_sendall(self._connection, piece)
            position += len(piece)

    async def _get_all(self) -> None:
        taken, (seed, count) = _Taken(), self._gets
        await self._take(taken)
        if taken.count != count:
            raise Wrong(f"{taken.count} bytes of {count} arrived")
        if taken.digest.hexdigest() != checksum(seed, count):
            raise Wrong(f"{count} bytes are not those that were sent")

    async def _expect_reset(self) -> None:
        taken = _Taken()
        try:
            await self._take(taken)
        except ConnectionResetError:
            if taken.digest.hexdigest() != checksum(self._gets[0], taken.count):
                raise Wrong("what came before the reset is not what was sent") from None
            return
        raise Wrong(f"an end after {taken.count} bytes in place of a reset")

    async def _take(self, taken: _Taken) -> None:
        while piece := await self._loop.sock_recv(self._connection, self._chance.choice(_CHUNKS[2:])):
            taken.digest.update(piece)
            taken.count += len(piece)
            await self._perhaps_stall()

    async def _perhaps_stall(self) -> None:
        if self._chance.random() < _STALL_CHANCE:
            await asyncio.sleep(self._chance.uniform(*_STALL_S))


class _Taken:
    """Bytes that came in."""

    def __init__(self) -> None:
        self.count = 0
        self.digest = hashlib.sha256()


async def _client(client: socket.socket, server: Server, plan: Plan, chance: random.Random) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, server.address)
    await loop.sock_sendall(client, plan.pack())
    if await _exactly(client, len(_HELLO)) != _HELLO:
        raise Wrong("something else than the server answered")
    end = End(client, chance, sends=(plan.number, plan.up), gets=(plan.number + 1, plan.down))
    await end.play(plan.kind, first=Kind.CLIENT_FIRST, resets=Kind.CLIENT_RESETS)
    if plan.kind is Kind.CLIENT_RESETS:
        client.close()  # now: the server waits for it


async def _side_by_side(*parts: Coroutine[None, None, None]) -> None:
    """Wait for all parts; if one fails, the others are cancelled before it raises."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _exactly(connection: socket.socket, count: int) -> bytes:
    loop, got = asyncio.get_running_loop(), b""
    while len(got) < count:
        piece = await loop.sock_recv(connection, count - len(got))
        if not piece:
            raise ConnectionError("ended before it began")
        got += piece
    return got


def _size(chance: random.Random) -> int:
    return chance.randrange(1 << chance.randrange(_LARGEST + 1))


def _settle(outcome: asyncio.Future[None], error: Exception | None) -> None:
    if outcome.done():
        return  # the client gave up first
    if error is None:
        outcome.set_result(None)
    else:
        outcome.set_exception(error)
