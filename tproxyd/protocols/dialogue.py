"""What all dialogues share: bytes in, events out, bytes to send, and what follows once the dialogue is over.

A driver on any kind of socket is this, with time limits added:

    send(dialogue.data_to_send())
    while (event := dialogue.next_event()) is None:
        dialogue.receive_data(recv(4096))
        send(dialogue.data_to_send())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from tproxyd.errors import LocalProtocolError, RemoteProtocolError

Event = TypeVar("Event")


class Dialogue(ABC, Generic[Event]):
    """One end of a dialogue; the events are the same however the bytes are cut into pieces."""

    def __init__(self, peer: str) -> None:
        """Args: peer: what the messages of errors call the other end."""
        self._peer = peer
        self._received = bytearray()
        self._to_send = bytearray()
        self._over = False

    @property
    def over(self) -> bool:
        """Whether no more events will come: it succeeded, was refused, or failed."""
        return self._over

    @property
    def trailing(self) -> bytes:
        """What came after the last message: the first bytes of the flow itself; nothing if there is to be no flow.

        Raises:
            LocalProtocolError: the dialogue is not over, so nobody can tell.
        """
        if not self._over:
            raise LocalProtocolError("the dialogue is not over yet")
        return bytes(self._received)

    def receive_data(self, data: bytes) -> None:
        """Take what the peer sent, b"" for its EOF; call `next_event` until it gives None before the next piece.

        Raises:
            RemoteProtocolError: the peer left in the middle.
            LocalProtocolError: the dialogue is over; these bytes are not its own.
        """
        if self._over:
            raise LocalProtocolError("the dialogue is over: what comes now belongs to the flow")
        if not data:
            self._end_in_vain()
            raise RemoteProtocolError(f"{self._peer} closed the connection in the middle of the handshake")
        self._received += data

    def next_event(self) -> Event | None:
        """Return the next event, None if more bytes (or a decision of ours) must come first.

        Raises:
            RemoteProtocolError: the peer broke the protocol. Send `data_to_send`, if anything, and close.
        """
        event = None
        while event is None and not self._over:
            waiting = len(self._received)
            try:
                event = self._step()
            except RemoteProtocolError:
                self._end_in_vain()
                raise
            if len(self._received) == waiting:
                break
        return event

    def data_to_send(self) -> bytes:
        """Return what must go to the peer now, once; b"" if nothing must."""
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    @abstractmethod
    def _step(self) -> Event | None:
        """Take one message off `_received`; take nothing while it is incomplete."""

    def _take(self, count: int) -> bytes:
        """Take bytes off the front of what came."""
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _end_in_vain(self) -> None:
        """End it without a flow: what is left of the peer's words is nobody's."""
        self._over = True
        self._received.clear()

    def _broken(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self._peer} {what}")
