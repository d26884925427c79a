"""The way to the service and what is said on it."""
