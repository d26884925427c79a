"""Checkpoints that come with the package; read them through `nowcast_service.weights.registry`."""
