"""A transparent proxy gateway: rules, IP_TRANSPARENT sockets, policy and relay."""

__version__ = "0.1.0"
