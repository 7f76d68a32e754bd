"""Protocols spoken with proxies and their clients, without I/O: bytes in, events and bytes out.

Each dialogue is a `Dialogue`: feed it with `receive_data`, ask for events, send what it wants sent. No socket, no
clock: connecting, waiting and giving up are the caller's.
"""
