"""The processes: a supervisor that owns the rules and the listening sockets, and workers that relay."""
