"""A thin ctypes binding of libnftables (libnftables(3)): text in, text or JSON out.

JSON is for reading only: as an input format it loses flags in nftables 1.0.6. A context belongs to the network
namespace of the thread that made it, so each call makes one and frees it.
"""

from __future__ import annotations

import ctypes
import json
from functools import cache
from typing import Any, Final

from tproxyd.errors import KernelUnsupported, PermissionDenied, RulesetError

_STATELESS: Final = 1 << 2
_JSON: Final = 1 << 4
_TERSE: Final = 1 << 11
_CTX_DEFAULT: Final = 0


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnftables.so.1", use_errno=True)
    except OSError as error:
        raise KernelUnsupported(
            "libnftables.so.1 is not installed: apt-get install libnftables1, or set interception.ruleset: iptables"
        ) from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def run(commands: str, *, as_json: bool = False, stateless: bool = False, terse: bool = False) -> str:
    """Run nftables commands as one transaction and return what they print; `terse` leaves out what sets hold.

    Raises:
        RulesetError: libnftables refused the commands; the first line of its reason.
        PermissionDenied: without CAP_NET_ADMIN.
        KernelUnsupported: libnftables is not installed.
    """
    library = _library()
    context = ctypes.c_void_p(library.nft_ctx_new(_CTX_DEFAULT))
    if not context:
        raise RulesetError("nftables: no context could be made (out of memory, or no netlink socket)")
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        flags = (_JSON if as_json else 0) | (_STATELESS if stateless else 0) | (_TERSE if terse else 0)
        library.nft_ctx_output_set_flags(context, flags)
        failed = library.nft_run_cmd_from_buffer(context, commands.encode())
        output = (library.nft_ctx_get_output_buffer(context) or b"").decode(errors="replace")
        reason = (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace")
    finally:
        library.nft_ctx_free(context)
    if failed:
        raise _error(reason)
    return output


def run_json(commands: str, *, terse: bool = False) -> list[dict[str, Any]]:
    """Run listing commands and return libnftables' objects (libnftables-json(5)) without the meta information.

    Raises:
        As `run`.
    """
    output = run(commands, as_json=True, stateless=True, terse=terse)
    objects: list[dict[str, Any]] = json.loads(output)["nftables"] if output.strip() else []
    return [item for item in objects if "metainfo" not in item]


def _error(reason: str) -> RulesetError | PermissionDenied:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    first = next((line for line in lines if "Error:" in line), lines[0] if lines else "no reason given")
    text = first.partition("Error:")[2].strip() or first
    if "Operation not permitted" in text:
        return PermissionDenied("nftables: not permitted: run as root or with CAP_NET_ADMIN")
    return RulesetError(f"nftables: {text}")
