"""UDP flows of random sizes, windows and stalls, to an echo server that checks and returns every datagram.

A datagram carries its flow, its number, its length and a CRC-32 over all of it; both ends check that. A flow
begins with one datagram, and then has no more on its way than its socket buffers hold, so one that does not come back
was lost by the gateway.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import zlib
from typing import Final

from benchmarks.soak.ledger import Ledger, content

_HEAD: Final = struct.Struct("!IIII")  # flow, number, length, CRC-32 of the rest with zero in this place
_SIZES: Final = ((16, 64), (16, 1472), (16, 1472), (1473, 9000), (9001, 60000))
_WINDOW_BYTES: Final = 64000  # on the way at a time: receive buffers hold 208 KiB, overheads included
_WINDOW: Final = 16
_LONGEST: Final = (2, 2, 20, 200)  # bursts, one more than the most: many flows are one question and one answer
_STALL_CHANCE: Final = 0.02
_STALL_S: Final = (0.01, 0.4)
_PATIENCE_S: Final = 5.0
_DATAGRAM: Final = 65535
_SO_RCVBUFFORCE: Final = 33
_SERVER_BYTES: Final = 64 << 20  # all flows meet in the server's socket
KIND: Final = "UDP"


class Server:
    """Returns what arrives whole.

    Attributes:
        address: where it is bound.
        spoilt: datagrams that were not what their CRC says.
    """

    def __init__(self, bound: socket.socket) -> None:
        """Take over a bound socket; `close` it."""
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SERVER_BYTES)
        self._socket = bound
        self.address = bound.getsockname()
        self.spoilt = 0
        asyncio.get_running_loop().add_reader(bound, self._readable)

    def close(self) -> None:
        """Stop answering."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _readable(self) -> None:
        while True:
            try:
                datagram, peer = self._socket.recvfrom(_DATAGRAM)
                if unpack(datagram) is None:
                    self.spoilt += 1
                else:
                    self._socket.sendto(datagram, peer)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of a client that is gone


async def flow(client: socket.socket, server: Server, number: int, chance: random.Random, ledger: Ledger) -> None:
    """Send datagrams in bursts, wait for all of each burst to come back, and note how it went. Closes the socket."""
    moved = sent = 0
    with client:
        try:
            client.connect(server.address)
            async with asyncio.timeout(None) as patience:
                for _ in range(chance.randrange(1, chance.choice(_LONGEST))):
                    patience.reschedule(asyncio.get_running_loop().time() + _PATIENCE_S)
                    burst = _burst(number, sent, chance) if sent else [pack(number, 0, _HEAD.size)]
                    await _there_and_back(client, burst)
                    sent += len(burst)
                    moved += 2 * sum(map(len, burst))
                    if chance.random() < _STALL_CHANCE:
                        await asyncio.sleep(chance.uniform(*_STALL_S))
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            ledger.failed(KIND, number, f"{type(error).__name__} {error} after {sent} datagrams")
            return
    ledger.ended(KIND, moved)


def pack(flow: int, number: int, size: int) -> bytes:
    """Return a datagram of `size` bytes, 16 or more."""
    rest = bytes(content(flow + number, 0, size - _HEAD.size))
    head = _HEAD.pack(flow, number, size, 0)
    return _HEAD.pack(flow, number, size, zlib.crc32(rest, zlib.crc32(head))) + rest


def unpack(datagram: bytes) -> tuple[int, int] | None:
    """Return a datagram's flow and number; None if it is not whole."""
    if len(datagram) < _HEAD.size:
        return None
    flow, number, size, crc = _HEAD.unpack_from(datagram)
    head = _HEAD.pack(flow, number, size, 0)
    whole = size == len(datagram) and crc == zlib.crc32(memoryview(datagram)[_HEAD.size :], zlib.crc32(head))
    return (flow, number) if whole else None


def _burst(flow: int, first: int, chance: random.Random) -> list[bytes]:
    made: list[bytes] = []
    size = chance.randint(*chance.choice(_SIZES))
    while len(made) < chance.randint(1, _WINDOW) and sum(map(len, made)) + size <= _WINDOW_BYTES:
        made.append(pack(flow, first + len(made), size))
    return made


async def _there_and_back(client: socket.socket, burst: list[bytes]) -> None:
    """Raise ValueError for what was never sent, or came twice."""
    loop = asyncio.get_running_loop()
    for datagram in burst:
        await loop.sock_sendall(client, datagram)
    missing = set(burst)
    while missing:
        datagram = await loop.sock_recv(client, _DATAGRAM)
        if datagram not in missing:
            raise ValueError(f"{len(datagram)} bytes came that are not on their way")
        missing.discard(datagram)
