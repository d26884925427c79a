"""Tensors on their way in: held to the spec before a byte of them is read, given memory, checked as they come."""

from __future__ import annotations

import mmap

import torch
from nowcast_proto.errors import InvalidSnapshot, TooLarge
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Header, Sink
from nowcast_proto.tensors import TensorEntry, TensorFrame
from torch import Tensor

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGN = 64
_OWN_PAGES = 1 << 18
_TILE = 1 << 20
_ENTRY = 1 << 10
"""Bytes of memory for an entry of a spec; measured at 950 for a parameter with a name of 20 letters."""


def anonymous_memory(nbytes: int) -> memoryview:
    """Zeroed writable memory that goes back to the system as soon as nobody uses it.

    Large blocks get pages of their own: the heap would keep them, and a long-running service would grow.

    Raises:
        TooLarge: The system has no such block.
    """
    try:
        return memoryview(mmap.mmap(-1, nbytes) if nbytes >= _OWN_PAGES else bytearray(nbytes))
    except (MemoryError, OSError) as exc:
        raise TooLarge(f"there is no memory for {nbytes} bytes", remedy="lower NOWCAST_BUDGET") from exc


def check_tensors(spec: ArchitectureSpec, header: Header) -> None:
    """Hold what a stream is about to send to the spec, before a byte of it is read.

    Raises:
        InvalidSnapshot: A tensor is missing, unknown, or of another shape.
    """
    shapes = spec.shapes()
    seen = {entry.name for entry in header.tensors}
    for entry in header.tensors:
        if entry.name not in shapes:
            tied = entry.name in spec.ties
            raise InvalidSnapshot(
                f"the stream has tensor {entry.name[:100]!r}, which the spec {'ties' if tied else 'does not list'}",
                expected=f"the {len(shapes)} tensors of the spec",
                remedy="send tied tensors once, under their first name"
                if tied
                else "add it to the spec or leave it out of the snapshot",
            )
        if entry.shape != shapes[entry.name]:
            raise InvalidSnapshot(
                f"tensor {entry.name[:100]!r} has shape {list(entry.shape)}",
                expected=f"shape {list(shapes[entry.name])}",
                remedy="send the spec of the model you train",
            )
    if missing := [name for name in shapes if name not in seen]:
        raise InvalidSnapshot(
            f"the stream lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected=f"all {len(shapes)} tensors of the spec",
            remedy="save the whole model, or send the spec of what you save",
        )


def check_finite(frame: TensorFrame) -> None:
    """Refuse NaN and infinity; one pass, no copy of the tensor.

    Raises:
        InvalidSnapshot: A value is not finite.
    """
    for tile in tensor_of(frame).reshape(-1).split(_TILE):
        # The sum of finite values may itself overflow, so only a sum that is not finite is looked into.
        if not bool(tile.sum(dtype=torch.float32).isfinite()) and not bool(tile.isfinite().all()):
            raise InvalidSnapshot(
                f"tensor {frame.name[:100]!r} has NaN or infinity",
                expected="finite weights",
                remedy="nowcast from before the training diverged",
            )


def tensor_of(frame: TensorFrame) -> Tensor:
    """The frame's bytes as a torch tensor of its shape, without a copy."""
    return torch.frombuffer(frame.view(), dtype=TORCH_DTYPES[frame.dtype]).reshape(frame.shape)


def packed_sink(header: Header) -> Sink:
    """One block of memory for all tensors of a stream, each aligned for vector loads."""
    offsets, end = [], 0
    for entry in header.tensors:
        offsets.append(end)
        end += -(-entry.nbytes // _ALIGN) * _ALIGN
    block = anonymous_memory(max(end, 1))
    return lambda number, entry: block[offsets[number] : offsets[number] + entry.nbytes]


def packed_bytes(entries: tuple[TensorEntry, ...]) -> int:
    """Bytes `packed_sink` takes for these tensors."""
    return sum(-(-entry.nbytes // _ALIGN) * _ALIGN for entry in entries)


def spec_memory(spec: ArchitectureSpec) -> int:
    """Bytes the spec itself takes while it is kept."""
    return _ENTRY * spec.entries


def spec_bytes(spec: ArchitectureSpec, itemsize: int = 4) -> int:
    """Bytes one snapshot of a spec takes, padding included."""
    return sum(-(-p.numel * itemsize // _ALIGN) * _ALIGN for p in spec.parameters)
