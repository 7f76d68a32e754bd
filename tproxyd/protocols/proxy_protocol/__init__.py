"""The PROXY protocol, versions 1 and 2 (HAProxy's proxy-protocol.txt): who a relayed connection really comes from."""

from tproxyd.protocols.proxy_protocol.header import Header, Tlv, TlvType
from tproxyd.protocols.proxy_protocol.parser import Receiver, parse, render

__all__ = ["Header", "Receiver", "Tlv", "TlvType", "parse", "render"]
