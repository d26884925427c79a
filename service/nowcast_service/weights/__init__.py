"""Checkpoints by name: shipped, registered, downloaded."""
