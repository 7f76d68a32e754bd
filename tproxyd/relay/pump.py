"""One direction of a TCP flow: what is read from the source and not yet taken by the sink, EOF, shutdown.

The technique, and why: a first read with a small buffer serves requests and answers with one system call each;
a read that comes back short has drained the socket, so nothing is read again just to see EAGAIN. Two full reads
in a row mean bulk: from then on splice(2) moves the bytes from socket to pipe to socket inside the kernel, and
the pipe goes back when the direction falls quiet. A direction that stays busy gets patient: the kernel wakes it
for half a pipe of data and no longer for each packet (SO_RCVLOWAT), and whoever owns it runs it again after a
moment, for the tail that is less. Backpressure is the pipe or the one held piece: the source is
not read while either waits for the sink.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import termios
from typing import Final

from tproxyd.relay.pipes import PIPE_BYTES, Pipe, PipePool
from tproxyd.relay.sockets import Socket

READ_BYTES: Final = 16384
TURN_BYTES: Final = 1 << 20
"""A direction that has moved this much lets the other flows have their turn."""

_FULL_READS: Final = 2
_PATIENT_FROM_BYTES: Final = 1 << 20
_PATIENCE_BYTES: Final = PIPE_BYTES // 2
_TAIL_BYTES: Final = READ_BYTES
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_SIOCATMARK: Final = 0x8905


class SourceReset(Exception):
    """The source side is gone: RST, or an error such as a timeout of its retransmissions."""


class SinkReset(Exception):
    """The sink side is gone."""


class Direction:
    """Moves bytes from `source` to `sink`; owns neither.

    Attributes:
        total: bytes that the sink has taken.
        hangup: the source has announced EOF (EPOLLRDHUP); reading goes on until it is met.
        urgent: the source has announced out-of-band data (EPOLLPRI).
        eof: the source has ended and the sink has been told (shutdown(SHUT_WR)).
        blocked: the sink is full; nothing is read until it takes more.
        source_lost: the source was found gone while writing to it, which spends the socket's error: what looks
            like EOF from now on is a reset.
        spliced: bytes have moved by splice.
        last: the other direction has ended, so closing both sockets says what shutdown would.
        patient: the source is heard of only when there is much to move; `run` must be called for the rest.
    """

    __slots__ = (
        "_burst",
        "_full_reads",
        "_held",
        "_pipe",
        "_pipes",
        "_reset",
        "blocked",
        "eof",
        "hangup",
        "last",
        "patient",
        "sink",
        "source",
        "source_lost",
        "spliced",
        "total",
        "urgent",
    )

    def __init__(self, source: Socket, sink: Socket, pipes: PipePool) -> None:
        """Args: two connected, non-blocking sockets, and where pipes come from."""
        self.source = source
        self.sink = sink
        self._pipes = pipes
        self._held = b""
        self._pipe: Pipe | None = None
        self._full_reads = 0
        self._reset = False
        self.total = 0
        self.hangup = False
        self.urgent = False
        self.eof = False
        self.blocked = False
        self.source_lost = False
        self.spliced = False
        self.last = False
        self.patient = False
        self._burst = 0

    @property
    def calm(self) -> bool:
        """Nothing is under way but an exchange of small pieces: `pass_on` will do."""
        return not (
            self._held or self._pipe or self.hangup or self.urgent or self.eof or self.source_lost or self._reset
        )

    @property
    def bulk(self) -> bool:
        """Bytes move by splice, many at a time."""
        return self._pipe is not None

    @property
    def empty(self) -> bool:
        """Nothing waits here for the sink."""
        return not self._held and not (self._pipe and self._pipe.held)

    def pass_on(self) -> bool:
        """Read once and write once, the whole of most requests and answers; False if `run` must go on.

        Only while `calm`. Nothing is raised here: `run` meets again, or was told, what went wrong.
        """
        try:
            data = self.source.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            self._reset = True  # the socket tells of its error only once
            return False
        if not data:
            return False
        try:
            sent = self.sink.send(data)
        except OSError:
            sent = 0
        self.total += sent
        size = len(data)
        if sent == size < READ_BYTES:
            self._full_reads = 0
            return True
        self._full_reads += size == READ_BYTES
        self._held = data[sent:]
        return False

    def run(self) -> bool:
        """Move until the source is drained or the sink is full; False if the turn ended before either.

        Raises:
            SourceReset: after everything that came before the reset has been read.
            SinkReset: whatever was held is lost.
        """
        if self.eof:
            return True
        self.blocked = False
        if self._held and not self._flush_held():
            return True
        if self._reset:
            return self._end_by_reset()
        if self.urgent and (self._pipe is None or self._flush_pipe()):
            return self._copy_urgent()
        if self._pipe is not None:
            return self._splice(self._pipe)
        return self._copy()

    def hold(self, data: bytes) -> None:
        """Have `data` go to the sink before anything that is read; before the first `run`."""
        self._held = data

    def flush(self) -> bool:
        """Give the sink what is held, reading nothing; True when nothing is held any more.

        Raises:
            SinkReset: whatever was held is lost.
        """
        return self._flush_held() and self._flush_pipe()

    def release(self) -> None:
        """Give the pipe back; what is held is lost."""
        self._held = b""
        if self._pipe is not None:
            self._pipes.give_back(self._pipe)
            self._pipe = None
            self._burst = 0
            self.patient = False

    def unacknowledged(self) -> int:
        """Bytes the sink's peer has not acknowledged yet (SIOCOUTQ, tcp(7))."""
        return int.from_bytes(fcntl.ioctl(self.sink.fileno(), termios.TIOCOUTQ, bytes(4)), "little")

    def _copy(self) -> bool:
        moved = 0
        while moved < TURN_BYTES:
            data = self._read(READ_BYTES)
            if data is None:
                self._full_reads = 0
                return True
            if not data:
                self._end()
                return True
            size = len(data)
            moved += size
            if not self._give(data):
                return True
            if size < READ_BYTES:
                self._full_reads = 0
                if not self.hangup:
                    return True
            elif self._bulk():
                return self._splice(self._pipe) if self._pipe else True
        return False

    def _bulk(self) -> bool:
        """Tell whether it is time to splice, and get ready for it."""
        self._full_reads += 1
        if self._full_reads < _FULL_READS:
            return False
        self._pipe = self._pipes.take()
        self.spliced = self._pipe is not None
        self._full_reads = 0
        return self._pipe is not None

    def _splice(self, pipe: Pipe) -> bool:
        moved = 0
        source = self.source.fileno()
        while moved < TURN_BYTES:
            try:
                count = os.splice(source, pipe.writer, PIPE_BYTES, flags=_SPLICE)
            except BlockingIOError:
                if not pipe.held:  # else the pipe is full, and says nothing about the source
                    self._drained(moved)
                    return True
            except OSError:
                return self._end_by_reset()
            else:
                if not count and not pipe.held:
                    return self._end_of_splice()
                pipe.held += count
                moved += count
            if not self._flush_pipe():
                return True
        return False

    def _drained(self, moved: int) -> None:
        """Go back to small reads after a turn that found little, or get patient in a long transfer."""
        self._burst += moved
        if self.patient:
            if moved < _TAIL_BYTES:
                self.release()
                self._wake_from(1)
        elif moved < _FULL_READS * READ_BYTES:
            self.release()
        elif self._burst > _PATIENT_FROM_BYTES:
            self._wake_from(_PATIENCE_BYTES)

    def _wake_from(self, count: int) -> None:
        self.source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        self.patient = count > 1

    def _end_by_reset(self) -> bool:
        """Pass on what came before the reset, then raise it: the socket tells of its error only once."""
        self._reset = True
        if not self._flush_pipe():
            return True
        raise SourceReset

    def _end_of_splice(self) -> bool:
        """Tell EOF from an urgent mark, which splice does not pass: it returns 0 for both once a FIN is there."""
        if self._at_mark():
            self.urgent = True
            return self._copy_urgent()
        self._end()
        return True

    def _copy_urgent(self) -> bool:
        """Pass out-of-band data on as out-of-band data: a read stops at the mark, so a short one proves nothing.

        The read after the mark passes it, which splice never would. See tcp(7), SIOCATMARK; RFC 6093 for what
        the urgent mechanism still means.
        """
        while True:
            if self._at_mark():
                try:
                    self._pass_urgent()
                except BlockingIOError:
                    return True  # announced, but not here yet: its arrival is another event
                if self.blocked:
                    return True
                self.urgent = False
            data = self._read(READ_BYTES)
            if data is None:
                return True
            if not data:
                self._end()
                return True
            if not self._give(data):
                return True
            if not self.urgent:
                return False

    def _pass_urgent(self) -> None:
        try:
            byte = self.source.recv(1, socket.MSG_OOB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: taken before
                raise SourceReset from error
            return
        try:
            self.total += self.sink.send(byte, socket.MSG_OOB)
        except BlockingIOError:
            self._held = byte  # the sink is full: better in band than lost
            self.blocked = True
        except OSError as error:
            raise SinkReset from error

    def _at_mark(self) -> bool:
        return fcntl.ioctl(self.source.fileno(), _SIOCATMARK, bytes(4)) != bytes(4)

    def _read(self, count: int) -> bytes | None:
        """Return what there is, b"" at EOF, None when there is nothing yet."""
        try:
            return self.source.recv(count)
        except BlockingIOError:
            return None
        except OSError as error:
            raise SourceReset from error

    def _give(self, data: bytes) -> bool:
        try:
            sent = self.sink.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise SinkReset from error
        self.total += sent
        if sent == len(data):
            return True
        self._held = data[sent:]
        self.blocked = True
        return False

    def _flush_held(self) -> bool:
        if not self._held:
            return True
        data, self._held = self._held, b""
        return self._give(data)

    def _flush_pipe(self) -> bool:
        pipe = self._pipe
        while pipe is not None and pipe.held:
            try:
                count = os.splice(pipe.reader, self.sink.fileno(), pipe.held, flags=_SPLICE)
            except BlockingIOError:
                self.blocked = True
                return False
            except OSError as error:
                raise SinkReset from error
            pipe.held -= count
            self.total += count
        return True

    def _end(self) -> None:
        if self.source_lost:
            raise SourceReset
        self.eof = True
        self.release()
        if self.last:
            return
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise SinkReset from error
