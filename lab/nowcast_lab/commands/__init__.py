"""Subcommands of ``nowcast`` that need the client and the service at once; one module each."""
