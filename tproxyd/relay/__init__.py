"""The data plane: sockets, listeners, the pump. What runs inside a worker, and nothing that needs CAP_NET_ADMIN.

`sockets` holds every socket option and ancillary message; `pump` moves bytes; `tcp` and `udp` give flows their
lives. Relayed bytes never pass through asyncio: see `poller`.
"""
