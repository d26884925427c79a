"""The contract between client and service: specs, frames, messages, errors. Needs pydantic and msgpack only."""
