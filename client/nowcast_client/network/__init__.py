"""What network this is: its spec, its wiring and the proof of it."""
