"""ICMP errors to a flow's other end, as the network itself would have sent them.

`unreachable` is pure: it builds the message (RFC 792, RFC 4443 §3) around the header of the datagram in
question. `IcmpSender` sends it with the address of whoever could not be reached.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final

from tproxyd.flow import Endpoint, Network
from tproxyd.relay import sockets
from tproxyd.relay.counters import Counters

_PROTOCOL: Final = {Network.TCP: socket.IPPROTO_TCP, Network.UDP: socket.IPPROTO_UDP}
_PER_SECOND: Final = 200
_QUOTED_TRANSPORT_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class IcmpError:
    """Type, code and the type's own 32 bits (an MTU, or 0), in the numbers of one IP version."""

    kind: int
    code: int
    info: int = 0


PORT_UNREACHABLE: Final = {4: IcmpError(3, 3), 6: IcmpError(1, 4)}
_BY_ERRNO: Final = {
    errno.ECONNREFUSED: PORT_UNREACHABLE,
    errno.EHOSTUNREACH: {4: IcmpError(3, 1), 6: IcmpError(1, 3)},
    errno.EHOSTDOWN: {4: IcmpError(3, 1), 6: IcmpError(1, 3)},
    errno.ENETUNREACH: {4: IcmpError(3, 0), 6: IcmpError(1, 0)},
    errno.ENETDOWN: {4: IcmpError(3, 0), 6: IcmpError(1, 0)},
    errno.EACCES: {4: IcmpError(3, 13), 6: IcmpError(1, 1)},
    errno.EPERM: {4: IcmpError(3, 13), 6: IcmpError(1, 1)},
}


def from_errno(code: int, version: int) -> IcmpError | None:
    """Return the ICMP error behind a socket's errno; None where there is none."""
    by_version = _BY_ERRNO.get(code)
    return by_version[version] if by_version else None


def from_error_queue(ancillary: list[tuple[int, int, bytes]], version: int) -> IcmpError | None:
    """Return what a message of the error queue is about (`struct sock_extended_err`, ip(7)); None: nothing to pass on.

    Only destination unreachable, packet too big and time exceeded make sense to the other end.
    """
    for level, kind, data in ancillary:
        if (level, kind) in ((socket.SOL_IP, sockets.IP_RECVERR), (sockets.SOL_IPV6, sockets.IPV6_RECVERR)):
            code_of_error, origin, icmp_type, code, info = struct.unpack_from("=IBBBxI", data)
            if origin in (2, 3):  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6
                passed_on = (3, 11) if version == 4 else (1, 2, 3)
                return IcmpError(icmp_type, code, info) if icmp_type in passed_on else None
            return from_errno(code_of_error, version)
    return None


def unreachable(error: IcmpError, network: Network, sender: Endpoint, receiver: Endpoint, payload_bytes: int) -> bytes:
    """Build the ICMP message about a packet from `sender` to `receiver`; IPv6's checksum is the kernel's job."""
    ports = struct.pack("!HH", sender.port, receiver.port)
    transport = ports + (struct.pack("!HH", 8 + payload_bytes, 0) if network is Network.UDP else bytes(4))
    length = (_QUOTED_TRANSPORT_BYTES if network is Network.UDP else 20) + payload_bytes
    if sender.version == 6:
        quoted = struct.pack("!IHBB", 6 << 28, length & 0xFFFF, _PROTOCOL[network], 64)
        quoted += socket.inet_pton(socket.AF_INET6, sender.address)
        quoted += socket.inet_pton(socket.AF_INET6, receiver.address)
        return struct.pack("!BBHI", error.kind, error.code, 0, error.info) + quoted + transport
    head = struct.pack("!BBHHHBBH", 0x45, 0, (20 + length) & 0xFFFF, 0, 0x4000, 64, _PROTOCOL[network], 0)
    head += socket.inet_aton(sender.address) + socket.inet_aton(receiver.address)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    message = struct.pack("!BBHI", error.kind, error.code, 0, error.info) + head + transport
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`: a sum modulo 65535 is a one's complement sum."""
    if len(data) % 2:
        data += b"\0"
    return 0xFFFF - int.from_bytes(data, "big") % 0xFFFF


class IcmpSender:
    """Sends ICMP errors to clients and servers, a bounded number a second."""

    def __init__(self, mark: int, counters: Counters) -> None:
        """Args: mark: SO_MARK of the raw sockets, which are opened when first needed."""
        self._mark = mark
        self._counters = counters
        self._sockets: dict[int, sockets.Socket] = {}
        self._second = 0
        self._left = _PER_SECOND

    def send(
        self,
        error: IcmpError,
        network: Network,
        sender: Endpoint,
        receiver: Endpoint,
        *,
        payload_bytes: int,
        now: float,
    ) -> None:
        """Tell `sender`, in the name of `receiver`, that its packet did not arrive; drop it when over the rate."""
        if not self._may_send(now):
            return
        version = sender.version
        message = unreachable(error, network, sender, receiver, payload_bytes)
        try:
            raw = self._socket(version)
            raw.sendmsg([message], sockets.sender_address(receiver.address), 0, (sender.address, 0))
        except OSError:
            return  # ICMP is best effort everywhere
        self._counters.icmp_errors_sent += 1

    def close(self) -> None:
        """Close the raw sockets."""
        for raw in self._sockets.values():
            raw.close()
        self._sockets.clear()

    def _may_send(self, now: float) -> bool:
        if int(now) != self._second:
            self._second, self._left = int(now), _PER_SECOND
        self._left -= 1
        return self._left >= 0

    def _socket(self, version: int) -> sockets.Socket:
        if version not in self._sockets:
            protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
            self._sockets[version] = sockets.raw_sender(version, protocol, self._mark)
        return self._sockets[version]
