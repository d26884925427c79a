"""Five snapshots of one network, checked against its spec.

Snapshots stay where they are (host memory, a memory map, the device); nothing is stacked or copied here. Predictors
read them tensor by tensor, the exact engine tile by tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from nowcast_proto.errors import InvalidSnapshot
from nowcast_proto.spec import ArchitectureSpec
from torch import Tensor

_CHUNK = 1 << 20
"""Elements looked at together."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class History:
    """Snapshots of one network, oldest first.

    Attributes:
        spec: The architecture all snapshots share.
        snapshots: One mapping name -> tensor per snapshot, shapes as in the spec, floating point, contiguous.
    """

    spec: ArchitectureSpec
    snapshots: tuple[Mapping[str, Tensor], ...]

    @classmethod
    def of(cls, spec: ArchitectureSpec, snapshots: Sequence[Mapping[str, Tensor]]) -> History:
        """Check snapshots against the spec.

        Args:
            spec: Names and shapes every snapshot must have.
            snapshots: Oldest first. Tied aliases may be present and are ignored.

        Raises:
            InvalidSnapshot: A tensor is missing, unknown, of another shape or dtype, or not finite.
        """
        if not snapshots:
            raise InvalidSnapshot("no snapshots were given", expected="at least one")
        shapes = spec.shapes()
        for number, snapshot in enumerate(snapshots):
            where = f"snapshot {number + 1} of {len(snapshots)}"
            missing = [name for name in shapes if name not in snapshot]
            if missing:
                raise InvalidSnapshot(
                    f"{where} lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
                    expected=f"all {len(shapes)} tensors of the spec",
                    remedy="save the whole model, or send the spec of what you save",
                )
            extra = [name for name in snapshot if name not in shapes and name not in spec.ties]
            if extra:
                raise InvalidSnapshot(
                    f"{where} has tensor {extra[0]!r}, which the spec does not list",
                    expected="only tensors of the spec",
                    remedy="add it to the spec or leave it out of the snapshot",
                )
            for name, shape in shapes.items():
                tensor = snapshot[name]
                if tuple(tensor.shape) != shape:
                    raise InvalidSnapshot(
                        f"{where}: tensor {name!r} has shape {list(tensor.shape)}", expected=f"shape {list(shape)}"
                    )
                if tensor.device != snapshots[0][name].device:
                    raise InvalidSnapshot(
                        f"{where}: tensor {name!r} is on {tensor.device}",
                        expected=f"{snapshots[0][name].device}, where the first snapshot has it",
                    )
                if tensor.dtype not in _FLOATS:
                    raise InvalidSnapshot(
                        f"{where}: tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}",
                        expected="float32, bfloat16 or float16",
                    )
                if not all_finite(tensor):
                    raise InvalidSnapshot(
                        f"{where}: tensor {name!r} has NaN or infinity",
                        expected="finite weights",
                        remedy="nowcast from before the training diverged",
                    )
        # Views read tensors by strides of the contiguous layout; a tensor that is contiguous already is not copied.
        return cls(spec, tuple({name: snap[name].detach().contiguous() for name in shapes} for snap in snapshots))

    def __len__(self) -> int:
        return len(self.snapshots)

    def flat(self, name: str) -> tuple[Tensor, ...]:
        """The named tensor of every snapshot, each flattened to (numel,), without a copy."""
        return tuple(snapshot[name].reshape(-1) for snapshot in self.snapshots)

    def newest(self, name: str) -> Tensor:
        """The named tensor of the newest snapshot, in its own shape."""
        return self.snapshots[-1][name]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, found without a mask of its size."""
    chunk = _CHUNK if tensor.device.type == "cpu" else 64 * _CHUNK
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(chunk))
