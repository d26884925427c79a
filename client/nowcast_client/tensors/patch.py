"""Stage a nowcast, check it, write it in place; and put everything back if it does not prove itself.

Nothing is written before all of it has been checked, and what is about to be overwritten is in host memory by then, so
a write that fails half-way is undone: the weights are the old ones or the new ones, never a mix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nowcast_client.errors import PatchRefused
from nowcast_client.tensors.copies import Copies
from nowcast_client.tensors.layout import Layout, local

SCHEDULED = frozenset({"params", "lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})
"""Keys of a parameter group that belong to the caller's schedule and are never put back."""
REACH = 20
"""Strides a nowcast of any horizon may reach. To a network refined on what its nowcasts are worth the horizon says how
late in training it is; at a horizon of one stride tensors that hardly move (biases) were seen to be moved by 62."""


@dataclass(frozen=True)
class Patch:
    """A predicted change of the weights, in host memory.

    Attributes:
        nowcast_id: Which nowcast it answers.
        step: Real optimizer step of the snapshot the change is relative to.
        horizon: Strides it looks ahead.
        deltas: Name -> predicted parameters minus that snapshot, float32, bfloat16 or float16.
        flat: One stretch of memory that ``deltas`` are views of, in their order, where they are to be broadcast.
    """

    nowcast_id: str
    step: int
    horizon: int
    deltas: Mapping[str, Tensor]
    flat: Tensor | None = None


FAINT = 1 / 500
"""Movement in a stride, as a part of a tensor's size, below which a network cannot tell where the tensor goes: it sees
weights relative to their spread, and the change it predicts for a tensor is wrong by up to a fifth of that, whatever
the tensor does (measured on the embedding of a T5, which starts fifty times as large as the other weights)."""


@dataclass(frozen=True)
class Verified:
    """A nowcast that passed every check.

    Attributes:
        deltas: Name -> predicted change; zero where a tensor is left alone.
        stretch: Norm of the whole change over ``horizon`` times the movement of the whole network.
        left_alone: Tensors that hardly move, and whose predicted change was beyond the bound.
    """

    deltas: dict[str, Tensor]
    stretch: float
    left_alone: tuple[str, ...] = ()


def verify(
    deltas: Mapping[str, Tensor],
    layout: Layout,
    newest: Mapping[str, Tensor],
    stride_movement: Mapping[str, float],
    horizon: int,
    bound: float,
) -> Verified:
    """Check every tensor of a nowcast that will be written before any is used.

    A straight path at the speed of the history covers ``horizon`` times the movement of one stride; a real path is
    shorter. A tensor whose change is more than ``bound`` times that, or `REACH` strides' worth where the horizon is
    shorter, is not a forecast. Where a tensor hardly moves against its size (`FAINT`), none is to be had: it is left
    alone, and the others are taken.

    Args:
        deltas: Predicted changes by name.
        layout: The tensors they are for; those that are never written need only be there.
        newest: The snapshot the changes are relative to.
        stride_movement: Largest norm of a tensor's change over one stride of the history.
        horizon: Strides the nowcast looks ahead.
        bound: Allowed multiple of ``max(horizon, REACH) * stride_movement``.

    Raises:
        PatchRefused: A tensor is missing, unknown, of another shape or dtype, not finite, or moves too far.
    """
    missing = [name for name in layout.parameters if name not in deltas]
    extra = [name for name in deltas if name not in layout.parameters]
    if missing or extra:
        raise PatchRefused(
            f"the nowcast lacks {missing[:1] or 'nothing'} and brings {extra[:1] or 'nothing'} besides",
            expected=f"exactly the {len(layout.parameters)} tensors of the spec",
        )
    total, room, reach = 0.0, 0.0, max(horizon, REACH)
    left_alone: list[str] = []
    for name, parameter in layout.parameters.items():
        delta = deltas[name]
        if delta.shape != parameter.shape:
            raise PatchRefused(
                f"the nowcast of {name!r} has shape {list(delta.shape)}", expected=f"shape {list(parameter.shape)}"
            )
        if not delta.is_floating_point():
            raise PatchRefused(f"the nowcast of {name!r} is {delta.dtype}", expected="floating point")
        if name not in layout.movable:
            continue
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float32))
        if not math.isfinite(norm) and not bool(torch.isfinite(delta).all()):
            raise PatchRefused(f"the nowcast of {name!r} has NaN or infinity", expected="finite values")
        moved = stride_movement[name]
        # A tensor that lay still may come back with rounding of its own size, nothing more.
        allowed = bound * reach * moved + 1e-6 * parameter.numel() ** 0.5
        if not norm <= allowed:
            if math.isfinite(norm) and moved < FAINT * float(torch.linalg.vector_norm(newest[name].float())):
                left_alone.append(name)
                continue
            raise PatchRefused(
                f"the nowcast moves {name!r} by {norm:.3g}",
                expected=f"at most {allowed:.3g}: {bound:g} x {reach} strides at the history's {moved:.3g} each",
                remedy="raise patch_bound if such jumps are wanted",
            )
        total += norm**2
        room += moved**2
    if left_alone and not room:
        raise PatchRefused(
            "the nowcast moves every tensor farther than its history allows, and all hardly move against their size",
            remedy="use a longer period, so that there is a movement to go by",
        )
    taken = {name: torch.zeros_like(delta) if name in left_alone else delta for name, delta in deltas.items()}
    return Verified(taken, math.sqrt(total) / (horizon * math.sqrt(room)) if room else 0.0, tuple(left_alone))


class Backup:
    """What a patch overwrites, and the optimizer state beside it, in host memory until the verdict.

    Buffers are kept between patches. Writing back restores values bit for bit and in place, so objects that hold
    references to the tensors (compiled graphs, fused optimizers) stay valid.
    """

    def __init__(self) -> None:
        self._pool: dict[tuple[object, ...], Tensor] = {}
        self._parameters: dict[str, _Saved] = {}
        self._states: list[tuple[Optimizer, list[tuple[Any, Any]], list[dict[str, Any]]]] = []

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(t.nbytes for t in self._pool.values())

    def save(self, layout: Layout, optimizers: Sequence[Optimizer]) -> None:
        """Copy movable parameters and the state of the optimizers. Ordered before later work on the same stream."""
        with torch.no_grad():
            self._parameters = {
                name: self._save(parameter.detach(), ("parameter", name))
                for name, parameter in layout.parameters.items()
                if name in layout.movable
            }
            self._states = []
            for number, optimizer in enumerate(optimizers):
                rows = [
                    (key, self._save(state, (number, place)))
                    for place, (key, state) in enumerate(optimizer.state.items())
                ]
                groups = [
                    self._save(
                        {k: v for k, v in group.items() if k not in SCHEDULED and k not in optimizer.defaults},
                        (number, "group", place),
                    )
                    for place, group in enumerate(optimizer.param_groups)
                ]
                self._states.append((optimizer, rows, groups))

    def restore(self, layout: Layout) -> None:
        """Put parameters and optimizer state back as they were at `save`, bit for bit."""
        self.restore_parameters(layout)
        with torch.no_grad():
            for optimizer, rows, groups in self._states:
                kept = {key for key, _ in rows}
                for key in [key for key in optimizer.state if key not in kept]:
                    del optimizer.state[key]
                for key, saved in rows:
                    optimizer.state[key] = _restored(optimizer.state.get(key), saved)
                for group, values in zip(optimizer.param_groups, groups, strict=False):
                    for name, saved in values.items():
                        group[name] = _restored(group.get(name), saved)

    def restore_parameters(self, layout: Layout) -> None:
        """Put the parameters back; optimizer state stays."""
        with torch.no_grad():
            for name, saved in self._parameters.items():
                local(layout.parameters[name]).copy_(saved.buffer)

    def change(self, layout: Layout) -> dict[str, Tensor]:
        """What the parameters have moved by since `save`: name -> float32, on their device; of a shard its part."""
        with torch.no_grad():
            return {
                name: local(layout.parameters[name]).float() - saved.buffer.to(layout.parameters[name].device).float()
                for name, saved in self._parameters.items()
            }

    def _save(self, value: Any, path: tuple[object, ...]) -> Any:
        if isinstance(value, Tensor):
            whole, value = value, local(value)
            buffer = self._pool.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
                self._pool[path] = buffer
            buffer.copy_(value, non_blocking=True)
            return _Saved(buffer, value.device, whole if whole is not value else None)
        if isinstance(value, dict):
            return {key: self._save(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._save(item, (*path, i)) for i, item in enumerate(value)])
        return copy.deepcopy(value)


@dataclass(frozen=True)
class _Saved:
    """A tensor in the pool, the device it came from, and the sharded tensor it was a part of."""

    buffer: Tensor
    device: torch.device
    whole: Tensor | None = None


def _restored(current: Any, saved: Any) -> Any:
    """The saved value; written into the tensors of ``current`` where those still fit."""
    if isinstance(saved, _Saved):
        current = saved.whole if current is None else current
        own = local(current) if isinstance(current, Tensor) else None
        if own is not None and own.shape == saved.buffer.shape and own.dtype == saved.buffer.dtype:
            own.copy_(saved.buffer)
            return current
        return saved.buffer.to(saved.device, copy=True)
    if isinstance(saved, dict):
        old = current if isinstance(current, dict) else {}
        fresh = {key: _restored(old.get(key), item) for key, item in saved.items()}
        if isinstance(current, dict):
            current.clear()
            current.update(fresh)
            return current
        return fresh
    if isinstance(saved, list | tuple):
        old_items = current if isinstance(current, list | tuple) and len(current) == len(saved) else [None] * len(saved)
        return type(saved)([_restored(o, s) for o, s in zip(old_items, saved, strict=True)])
    return copy.deepcopy(saved)


def apply(patch: Patch, layout: Layout, backup: Backup, copies: Copies | None = None) -> None:
    """Write a verified patch into the live parameters, all of it or none.

    Args:
        patch: Verified changes.
        layout: The live parameters; only the movable ones are written.
        backup: Holds the parameters as they are now.
        copies: Second copies of the weights, saved too; they get the same change.

    Raises:
        PatchRefused: A write failed; the parameters are back as they were.
    """
    try:
        with torch.no_grad():
            for name, parameter in layout.parameters.items():
                if name in layout.movable and bool(patch.deltas[name].any()):
                    own = local(parameter)
                    own.copy_(_moved(own, patch, name))
        if copies:
            copies.shift(backup.change(layout), layout)
    except Exception as exc:
        backup.restore_parameters(layout)
        if copies:
            copies.restore()
        raise PatchRefused(f"writing the nowcast failed: {exc}", expected="a write of every tensor") from exc


def _moved(parameter: Tensor, patch: Patch, name: str) -> Tensor:
    # The sum is taken in float32 whatever the dtypes, and rounded once.
    delta = patch.deltas[name].to(parameter.device, non_blocking=True)
    # Where nothing is predicted to change nothing does, not even the sign of a zero.
    return torch.where(delta == 0, parameter.float(), parameter.float() + delta.float())
