"""A machine under load makes no property false: examples have no deadline (pytest-timeout has the last word)."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
