"""Streams in one piece."""

from __future__ import annotations

from nowcast_proto.stream import Encoder
from nowcast_proto.tensors import Limits, TensorFrame


def joined(encoder: Encoder, **kwargs: int) -> bytes:
    return b"".join(bytes(chunk) for chunk in encoder.chunks(**kwargs))


def spelled(limits: Limits, **changes: object) -> bytes:
    frame = {"name": "w", "dtype": "float32", "shape": (2,), "data": bytes(8), **changes}
    return joined(Encoder("snapshot", {"step": 1}, [TensorFrame(**frame)], limits))  # type: ignore[arg-type]
