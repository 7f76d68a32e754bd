"""SOCKS5 (RFC 1928) with user name and password (RFC 1929): client, server, and the header of UDP datagrams.

Not here: GSSAPI (RFC 1961), fragments of datagrams (§7 leaves them to implementations; nobody sends them), SOCKS4.
Reserved bytes are sent as zero and not looked at when received.
"""

from tproxyd.protocols.socks5.causes import CAUSE_OF_REPLY, REPLY_OF_CAUSE
from tproxyd.protocols.socks5.client import Associated, Bound, Client, Connected, Rejected, Unauthenticated
from tproxyd.protocols.socks5.server import Request, Server
from tproxyd.protocols.socks5.udp import Fragmented, datagram_header, decode_datagram
from tproxyd.protocols.socks5.wire import UNSPECIFIED, Command, Method, Reply

__all__ = [
    "CAUSE_OF_REPLY",
    "REPLY_OF_CAUSE",
    "UNSPECIFIED",
    "Associated",
    "Bound",
    "Client",
    "Command",
    "Connected",
    "Fragmented",
    "Method",
    "Rejected",
    "Reply",
    "Request",
    "Server",
    "Unauthenticated",
    "datagram_header",
    "decode_datagram",
]
