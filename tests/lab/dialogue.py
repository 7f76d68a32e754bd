"""Drives the dialogues of `tproxyd.protocols`: by bytes, or over a blocking socket."""

from __future__ import annotations

import socket
from typing import Final, TypeVar

from tproxyd.protocols.dialogue import Dialogue

Event = TypeVar("Event")

_READ_BYTES: Final = 4096


def hear(dialogue: Dialogue[Event], data: bytes) -> list[Event]:
    """Feed one piece, and return the events that it brings."""
    dialogue.receive_data(data)
    events = []
    while (event := dialogue.next_event()) is not None:
        events.append(event)
    return events


def converse(connected: socket.socket, dialogue: Dialogue[Event]) -> Event:
    """Go on until the next event, and return that; what the dialogue wants sent before it is sent.

    Raises:
        RemoteProtocolError: as the dialogue does; its last words were sent.
    """
    connected.sendall(dialogue.data_to_send())
    while True:
        try:
            event = dialogue.next_event()
            if event is not None:
                return event
            dialogue.receive_data(connected.recv(_READ_BYTES))
            event = dialogue.next_event()
        finally:
            connected.sendall(dialogue.data_to_send())
        if event is not None:
            return event
