"""Two sockets joined in the kernel: a verdict program sends what either receives out by the other.

Sources: bpf(2), Documentation/bpf/map_sockmap.rst, include/uapi/linux/bpf.h; Linux 5.13 for a verdict without a parser.
Seven bpf(2) calls and a program of fifteen instructions: neither a compiler nor libbpf is needed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
from typing import Final

_SYSCALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _PROG_ATTACH = 0, 2, 3, 5, 8
_MAP_TYPE_SOCKHASH: Final = 18
_PROG_TYPE_SK_SKB: Final = 14
_SK_SKB_VERDICT: Final = 38
_GET_SOCKET_COOKIE, _SK_REDIRECT_HASH = 46, 72
_PSEUDO_MAP_FD: Final = 1
_ATTR_BYTES: Final = 128
_PAIRS: Final = 32768

_SO_COOKIE: Final = 57
_COOKIE_BYTES: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


class Sockmap:
    """Where joined sockets stand; a socket that is closed leaves by itself."""

    def __init__(self) -> None:
        """Make the maps and the program.

        Raises:
            OSError: EPERM without CAP_BPF and CAP_NET_ADMIN; EINVAL where the kernel lacks it.
        """
        self._peers, self._sources = _sockhash(), _sockhash()
        program = _load(_program(self._peers))
        _bpf(_PROG_ATTACH, struct.pack("=IIII", self._sources, program, _SK_SKB_VERDICT, 0))
        os.close(program)  # the map holds it

    def join(self, one: socket.SocketType, two: socket.SocketType) -> None:
        """Send what either receives out by the other, beginning with what it has received and nobody has read.

        Both must be known as peers before either is a source: a verdict that finds no peer drops. From then on
        nothing can be read from them here.

        Raises:
            OSError: EOPNOTSUPP if one is no longer established: its end has already said FIN.
        """
        first, second = _cookie(one), _cookie(two)
        put = [
            *((self._peers, second, one), (self._peers, first, two)),
            *((self._sources, first, one), (self._sources, second, two)),
        ]
        for number, (where, key, sock) in enumerate(put):
            try:
                _element(_MAP_UPDATE, where, key, sock.fileno())
            except OSError:
                for done, its_key, _ in put[:number]:
                    _element(_MAP_DELETE, done, its_key)
                raise
        for sock in (one, two):  # tcp_set_rcvlowat() calls data_ready, which runs the verdict on what is waiting
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _program(peers: int) -> bytes:
    """Assemble `return skb->len ? bpf_sk_redirect_hash(skb, peers, &cookie, 0) : SK_DROP`.

    A bare FIN is a packet of 0 bytes: sent on, it would end the peer with EPIPE (sk_psock_backlog()).
    """
    return b"".join(
        [
            _instruction(0x61, to=2, source=1),  # r2 = skb->len
            _instruction(0x55, to=2, offset=2),  # if r2 != 0 goto +2
            _instruction(0xB7, to=0),  # r0 = SK_DROP
            _instruction(0x95),  # exit
            _instruction(0xBF, to=6, source=1),  # r6 = skb
            _instruction(0x85, value=_GET_SOCKET_COOKIE),
            _instruction(0x7B, to=10, source=0, offset=-_COOKIE_BYTES),  # *(u64 *)(fp - 8) = r0
            _instruction(0xBF, to=1, source=6),  # r1 = skb
            _instruction(0x18, to=2, source=_PSEUDO_MAP_FD, value=peers),  # r2 = map, in two parts
            _instruction(0x00),
            _instruction(0xBF, to=3, source=10),  # r3 = fp
            _instruction(0x07, to=3, value=-_COOKIE_BYTES),  # r3 -= 8
            _instruction(0xB7, to=4),  # r4 = 0: egress
            _instruction(0x85, value=_SK_REDIRECT_HASH),
            _instruction(0x95),
        ]
    )


def _instruction(code: int, *, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, to | source << 4, offset, value)


def _sockhash() -> int:
    return _bpf(_MAP_CREATE, struct.pack("=IIIII", _MAP_TYPE_SOCKHASH, _COOKIE_BYTES, 4, 2 * _PAIRS, 0))


def _load(program: bytes) -> int:
    instructions, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(instructions), ctypes.addressof(licence)
    attributes = (_PROG_TYPE_SK_SKB, len(program) // 8, *addresses, 0, 0, 0, 0, 0, b"sockmap", 0, _SK_SKB_VERDICT)
    return _bpf(_PROG_LOAD, struct.pack("=IIQQIIQII16sII", *attributes))


def _element(command: int, where: int, key: bytes, fd: int | None = None) -> None:
    keys = ctypes.create_string_buffer(key, len(key))
    value = ctypes.c_uint32(fd or 0)
    at = ctypes.addressof(value) if fd is not None else 0
    _bpf(command, struct.pack("=IIQQQ", where, 0, ctypes.addressof(keys), at, 0))


def _cookie(sock: socket.SocketType) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE_BYTES)


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, _ATTR_BYTES)
    found: int = _libc.syscall(_SYSCALL[platform.machine()], command, buffer, _ATTR_BYTES)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found
