"""Tensor frames as NumPy arrays and back. bfloat16, which NumPy lacks, is carried as its bits in uint16."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nowcast_proto.errors import MalformedFrame
from nowcast_proto.tensors import TensorFrame, check_dtype

CARRIERS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}
"""Wire dtype -> NumPy dtype of the same bytes."""


def frame_of(name: str, array: NDArray[Any], *, dtype: str = "float32", snapshot: int = 0) -> TensorFrame:
    """A frame over an array; copies only where the array is not contiguous or not yet in the wire dtype.

    Args:
        name: The tensor's name.
        array: Any shape; float32 or float16 values, or bfloat16 bits in uint16 where ``dtype`` is bfloat16.
        dtype: The wire dtype to send.
        snapshot: Number of the snapshot in its stream, 0 = oldest.

    Raises:
        MalformedFrame: The array cannot be sent as this dtype.
    """
    check_dtype(name, dtype)
    if array.dtype != CARRIERS[dtype]:
        if array.dtype.kind != "f":
            raise MalformedFrame(f"tensor {name!r} is an array of {array.dtype}", expected="an array of floats")
        array = to_bfloat16(array) if dtype == "bfloat16" else array.astype(CARRIERS[dtype])
    array = np.ascontiguousarray(array).reshape(array.shape)
    return TensorFrame(name, dtype, tuple(array.shape), array.reshape(-1).view(np.uint8).data, snapshot)


def array_of(frame: TensorFrame) -> NDArray[Any]:
    """The frame's bytes as an array of its shape, without a copy (bfloat16 as uint16 bits)."""
    return np.frombuffer(frame.view(), dtype=CARRIERS[frame.dtype]).reshape(frame.shape)


def float32_of(frame: TensorFrame) -> NDArray[np.float32]:
    """The frame's values as float32, without a copy where they already are."""
    array = array_of(frame)
    return from_bfloat16(array) if frame.dtype == "bfloat16" else array.astype(np.float32, copy=False)


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    quiet = (bits >> 16) | 0x40  # rounding could carry a NaN's last bits over into infinity
    return np.where(np.isnan(bits.view(np.float32)), quiet, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Float32 values of bfloat16 bits; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("nowcast_proto.arrays needs a little-endian machine: the wire's bytes are used in place")
