"""CRC32c (RFC 4960 appendix B), which the standard library lacks; headers are short, so a table is quick enough."""

from __future__ import annotations

from typing import Final

_REFLECTED_POLYNOMIAL: Final = 0x82F63B78
_ALL_ONES: Final = 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC32c of `data` as a number of 32 bits."""
    remainder = _ALL_ONES
    for byte in data:
        remainder = _TABLE[(remainder ^ byte) & 0xFF] ^ (remainder >> 8)
    return remainder ^ _ALL_ONES


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (_REFLECTED_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE: Final = tuple(_entry(byte) for byte in range(256))
