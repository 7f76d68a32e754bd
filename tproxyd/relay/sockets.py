"""Every socket option and ancillary message that tproxyd uses, by what it is for.

Sources: ip(7), ipv6(7), tcp(7), socket(7), Documentation/networking/tproxy.rst. Constants that Python 3.11's
`socket` lacks are given their Linux numbers here. CAP_NET_RAW is enough for all of it (Linux 5.17 for SO_MARK;
CAP_NET_ADMIN before), with CAP_NET_BIND_SERVICE for addresses whose port is below 1024.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from typing import Final

from tproxyd.flow import Endpoint, OrigDst

Socket = socket.SocketType
"""The type below `socket.socket`, whose Python wrappers and conversions to enums cost microseconds a flow."""

SOL_IPV6: Final = 41
IPV6_TRANSPARENT: Final = 75
IP_RECVORIGDSTADDR: Final = 20
IPV6_RECVORIGDSTADDR: Final = 74
IP_PKTINFO: Final = 8
IP_PKTOPTIONS: Final = 9
IPV6_2292PKTOPTIONS: Final = 6
IP_RECVERR: Final = 11
IPV6_RECVERR: Final = 25
IP_BIND_ADDRESS_NO_PORT: Final = 24
SO_ATTACH_FILTER: Final = 26

LINGER_RESET: Final = struct.pack("ii", 1, 0)
"""Closing sends RST at once; so does the kernel when the process dies, and a cut body never looks complete."""
LINGER_OFF: Final = struct.pack("ii", 0, 0)

BACKLOG: Final = 4096
UDP_LISTENER_BUFFER_BYTES: Final = 4 << 20
ORIG_DST_SPACE: Final = socket.CMSG_SPACE(28) + socket.CMSG_SPACE(20)
"""Room for the original destination, and for the interface of a listener that `ask_interface` was called on."""

CLASHES: Final = frozenset({errno.EADDRNOTAVAIL, errno.EADDRINUSE})
"""What bind and connect answer when someone else has the wanted address and port."""

_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_LEVEL: Final = {4: socket.SOL_IP, 6: SOL_IPV6}
_TRANSPARENT: Final = {4: socket.IP_TRANSPARENT, 6: IPV6_TRANSPARENT}
_RECVORIGDSTADDR: Final = {4: IP_RECVORIGDSTADDR, 6: IPV6_RECVORIGDSTADDR}
_RECVPKTINFO: Final = {4: (socket.SOL_IP, IP_PKTINFO), 6: (SOL_IPV6, socket.IPV6_RECVPKTINFO)}
_PKTOPTIONS: Final = {4: (socket.SOL_IP, IP_PKTOPTIONS), 6: (SOL_IPV6, IPV6_2292PKTOPTIONS)}
_CMSG_HEADER: Final = struct.Struct("@Nii")  # struct cmsghdr
_RECVERR: Final = {4: IP_RECVERR, 6: IPV6_RECVERR}
_NONBLOCKING_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_NONBLOCKING_DATAGRAM: Final = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


def tcp_listener(address: str, port: int, mark: int) -> Socket:
    """Open a TPROXY listener; what it accepts inherits its options, the mark included.

    It is bound to a loopback address, so only packets that a TPROXY rule hands over (and this box itself)
    reach it: a scanner sees a closed port.
    """
    version = Endpoint(address, port).version
    listener = _transparent(version, _NONBLOCKING_STREAM, mark)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def udp_listener(address: str, port: int, mark: int) -> Socket:
    """Open the socket that takes the first datagram of each flow, with its original destination beside it."""
    version = Endpoint(address, port).version
    listener = _transparent(version, _NONBLOCKING_DATAGRAM, mark)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(_LEVEL[version], _RECVORIGDSTADDR[version], 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_LISTENER_BUFFER_BYTES)
        listener.bind((address, port))
    except BaseException:
        listener.close()
        raise
    return listener


def tcp_server_side(version: int, mark: int, *, transparent: bool) -> Socket:
    """Open an unbound, non-blocking socket towards a server; a reset unless it is closed in order."""
    sock = _transparent(version, _NONBLOCKING_STREAM, mark, transparent=transparent)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def udp_server_side(version: int, mark: int, *, transparent: bool) -> Socket:
    """Open an unbound datagram socket that queues ICMP errors with what they are about (IP_RECVERR)."""
    sock = _transparent(version, _NONBLOCKING_DATAGRAM, mark, transparent=transparent)
    sock.setsockopt(_LEVEL[version], _RECVERR[version], 1)
    return sock


def udp_client_side(version: int, mark: int) -> Socket:
    """Open an unbound datagram socket that will speak as the original destination."""
    sock = _transparent(version, _NONBLOCKING_DATAGRAM, mark)
    sock.setsockopt(_LEVEL[version], _RECVERR[version], 1)
    return sock


def keep_alive(sock: Socket) -> None:
    """Have the kernel notice within a minute that the other end of a silent TCP connection is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def raw_sender(version: int, protocol: int, mark: int) -> Socket:
    """Open a raw socket that only sends, with whatever source address `sender_address` names.

    A raw socket gets a copy of all that the box receives of its protocol; the filter drops it unseen.
    """
    sock = _transparent(version, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, mark, protocol)
    instructions = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
    program = struct.pack("HP", 1, ctypes.addressof(instructions))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    return sock


def sender_address(address: str) -> list[tuple[int, int, bytes]]:
    """Return the ancillary message that makes one datagram leave with this source address."""
    if ":" in address:
        info = struct.pack("16si", socket.inet_pton(socket.AF_INET6, address), 0)
        return [(SOL_IPV6, socket.IPV6_PKTINFO, info)]
    info = struct.pack("i4s4s", 0, socket.inet_aton(address), bytes(4))
    return [(socket.SOL_IP, IP_PKTINFO, info)]


def accept(listener: Socket) -> tuple[Socket, tuple[str, int]]:
    """Take a connection in, and the address and port of its client.

    Raises:
        BlockingIOError: none is waiting.
        OSError: see accept(2).
    """
    fd, peer = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  # what socket.socket.accept calls
    sock = Socket(listener.family, socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock, peer


def bind_address_only(sock: Socket, version: int, address: str) -> None:
    """Bind to an address and leave the port to `connect`, which may share it among destinations."""
    sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, 0) if version == 4 else (address, 0, 0, 0))


def deafen(sock: Socket) -> None:
    """Keep the kernel from giving a connected socket any packet from outside, before routing or after (early demux).

    What it was given already can still be read.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")


def let_hear(sock: Socket) -> None:
    """Take `deafen` back."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"")


def is_local(address: str) -> bool:
    """Tell whether an address is this box's own, by asking the kernel to bind to it."""
    family = _FAMILY[Endpoint(address, 0).version]
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def source_towards(sock: Socket, peer: Endpoint) -> Endpoint:
    """Return the address and port that `peer` sees in what `sock` sends, whether or not it is bound to an address."""
    address, port = sock.getsockname()[:2]
    if address in ("0.0.0.0", "::"):
        with socket.socket(sock.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK))
            probe.connect(peer)
            address = probe.getsockname()[0]
    return Endpoint(address, port)


def orig_dst_of_datagram(ancillary: list[tuple[int, int, bytes]]) -> OrigDst | None:
    """Return the original destination that came with a datagram (IP_RECVORIGDSTADDR); None if none did.

    The message holds a `struct sockaddr_in` or `sockaddr_in6`, address and port in network byte order.
    """
    for level, kind, data in ancillary:
        if level == socket.SOL_IP and kind == IP_RECVORIGDSTADDR:
            return OrigDst(socket.inet_ntop(socket.AF_INET, data[4:8]), int.from_bytes(data[2:4], "big"))
        if level == SOL_IPV6 and kind == IPV6_RECVORIGDSTADDR:
            return OrigDst(socket.inet_ntop(socket.AF_INET6, data[8:24]), int.from_bytes(data[2:4], "big"))
    return None


def ask_interface(listener: Socket) -> None:
    """Have what comes in through a listener, connections or datagrams, know the interface that it came in by."""
    level, option = _RECVPKTINFO[4 if listener.family == socket.AF_INET else 6]
    listener.setsockopt(level, option, 1)


def interface_of_connection(accepted: Socket) -> str:
    """Return the interface that a connection's SYN came in by; empty where the kernel does not tell.

    Its listener must have been asked (`ask_interface`). The options of the last packet are those of the SYN as long
    as nobody reads them (IP_PKTOPTIONS, RFC 2292 §4.1): the kernel keeps only the interface and the address.
    """
    level, option = _PKTOPTIONS[4 if accepted.family == socket.AF_INET else 6]
    try:
        data = accepted.getsockopt(level, option, socket.CMSG_SPACE(20))
    except OSError:
        return ""
    if len(data) < _CMSG_HEADER.size:
        return ""
    length, found_level, kind = _CMSG_HEADER.unpack_from(data)
    return interface_of_datagram([(found_level, kind, data[_CMSG_HEADER.size : length])])


def interface_of_datagram(ancillary: list[tuple[int, int, bytes]]) -> str:
    """Return the interface that a datagram came in by (IP_PKTINFO, ip(7)); empty where none is told, or it is gone."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_IP, IP_PKTINFO):
            return _interface_name(struct.unpack_from("@i", data)[0])
        if (level, kind) == (SOL_IPV6, socket.IPV6_PKTINFO):
            return _interface_name(struct.unpack_from("@i", data, 16)[0])
    return ""


def _interface_name(number: int) -> str:
    try:
        return socket.if_indextoname(number)
    except OSError:
        return ""


def _transparent(version: int, kind: int, mark: int, protocol: int = 0, *, transparent: bool = True) -> Socket:
    sock = Socket(_FAMILY[version], kind, protocol)
    try:
        if transparent:
            sock.setsockopt(_LEVEL[version], _TRANSPARENT[version], 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    except BaseException:
        sock.close()
        raise
    return sock
