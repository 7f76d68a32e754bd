"""The `direct` backend: straight to the original destination, as the client, as its address, or as this box."""

from __future__ import annotations

import errno
import logging
from time import monotonic
from typing import Final

from tproxyd.flow import Client, Endpoint, OrigDst
from tproxyd.relay import sockets
from tproxyd.relay.counters import Counters
from tproxyd.relay.settings import DirectSettings

_log = logging.getLogger(__name__)
_LOG_EVERY_S: Final = 10.0


class Direct:
    """Opens sockets towards the original destination."""

    def __init__(self, settings: DirectSettings, server_mark: int, counters: Counters) -> None:
        """Args: settings: which source address the server sees; counters: where clashes are counted."""
        self.full_cone = settings.nat == "full-cone"
        self.keeps_four_tuple = settings.source == "four-tuple"
        self._source = settings.source
        self._mark = server_mark
        self._counters = counters
        self._logged_s = -_LOG_EVERY_S

    def connect(self, client: Client, orig_dst: OrigDst) -> sockets.Socket:
        """Begin a TCP connection and return its socket, not yet connected; the caller closes it.

        Where someone else holds the client's address and port towards this server, another port is taken.

        Raises:
            OSError: the connection failed at once (no route, no descriptor left).
        """
        if self._source == "four-tuple":
            try:
                return self._connect(client, orig_dst, keep_port=True)
            except OSError as error:
                if error.errno not in sockets.CLASHES:
                    raise
                self._note_clash(client, orig_dst, error)
        return self._connect(client, orig_dst, keep_port=False)

    def open_datagram(self, client: Client, connect_to: OrigDst | None) -> sockets.Socket:
        """Open the UDP socket that speaks for a client; the caller closes it.

        Args:
            client: who is spoken for.
            connect_to: the only destination (symmetric), or None for any (full-cone).

        Raises:
            OSError: it could not be opened, bound or connected.
        """
        if self._source == "four-tuple":
            try:
                return self._open_datagram(client, connect_to, keep_port=True)
            except OSError as error:
                if error.errno not in sockets.CLASHES:
                    raise
                self._note_clash(client, connect_to, error)
        return self._open_datagram(client, connect_to, keep_port=False)

    def _connect(self, client: Client, orig_dst: OrigDst, *, keep_port: bool) -> sockets.Socket:
        version = client.version
        sock = sockets.tcp_server_side(version, self._mark, transparent=self._source != "gateway")
        try:
            if keep_port:
                sock.bind(client)
            elif self._source != "gateway":
                sockets.bind_address_only(sock, version, client.address)
            code = sock.connect_ex(orig_dst)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, f"connect to {orig_dst}")
        except BaseException:
            sock.close()
            raise
        return sock

    def _open_datagram(self, client: Client, connect_to: OrigDst | None, *, keep_port: bool) -> sockets.Socket:
        sock = sockets.udp_server_side(client.version, self._mark, transparent=self._source != "gateway")
        try:
            if keep_port:
                sock.bind(client)
            elif self._source != "gateway":
                sock.bind((client.address, 0))
            if connect_to is not None:
                sock.connect(connect_to)
        except BaseException:
            sock.close()
            raise
        return sock

    def _note_clash(self, client: Client, orig_dst: Endpoint | None, error: OSError) -> None:
        """Count a taken source port and log one now and then; the box's own flows' port is always taken, by them."""
        if sockets.is_local(client.address):
            return
        self._counters.source_port_clashes += 1
        now = monotonic()
        if now - self._logged_s < _LOG_EVERY_S:
            return
        self._logged_s = now
        towards = f" towards {orig_dst}" if orig_dst else ""
        _log.info("source port of %s is taken%s (%s): the server sees another port", client, towards, error.strerror)
