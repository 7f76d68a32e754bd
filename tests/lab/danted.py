"""Dante's server (Debian's danted), open to everyone."""

from __future__ import annotations

from pathlib import Path


def danted(folder: Path, where: str, port: int) -> list[str]:
    """Write its configuration into `folder`; return the command that runs it on an interface or address."""
    (folder / "danted.conf").write_text(
        f"logoutput: {folder}/log\ninternal: {where} port = {port}\nexternal: {where}\n"
        "socksmethod: none\nclientmethod: none\nuser.privileged: root\nuser.unprivileged: nobody\n"
        "client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\nsocks pass { from: 0.0.0.0/0 to: 0.0.0.0/0\n"
        "  command: bind connect udpassociate bindreply udpreply }\n"
    )
    return ["danted", "-f", f"{folder}/danted.conf", "-p", f"{folder}/danted.pid"]
