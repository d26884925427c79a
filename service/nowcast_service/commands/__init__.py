"""Subcommands of ``nowcast``, one module each, with a function ``register(app)``."""
