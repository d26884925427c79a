"""Consistent capture of parameters into host memory, off the trainer's critical path.

Buffers are allocated once. Inside one step hook no optimizer can run, so all tensors are of the same step. On CUDA the
copies run on a side stream into pinned memory; the training stream is made to wait for them before the next optimizer
step writes (a wait between streams, not of the host).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from nowcast_proto.tensors import TensorFrame
from torch import Tensor

from nowcast_client.tensors.layout import WIRE_NAMES, Layout


class Arriving(Protocol):
    """Something that has to be over before a snapshot is whole; a CUDA event is one."""

    def synchronize(self) -> Any:
        """Block until it is over."""


@dataclass
class Slot:
    """One snapshot's place in the ring.

    Attributes:
        buffers: Name -> host tensor in the wire dtype.
        step: Real optimizer step whose weights it holds.
        copied: What the copy still waits for, such as a CUDA event after the last copy on each device; empty where it
            is complete.
        in_use: Whether the slot holds a snapshot somebody may still need.
        frames: What `encode` made of it.
    """

    buffers: dict[str, Tensor]
    step: int = -1
    copied: list[Arriving] = field(default_factory=list)
    in_use: bool = False
    frames: tuple[TensorFrame, ...] = field(default=(), repr=False)

    def wait(self) -> None:
        """Block until the copy is complete. For the uploader's thread."""
        for event in self.copied:
            event.synchronize()
        self.copied = []

    def encode(self) -> tuple[TensorFrame, ...]:
        """Frames over the buffers; each frame's digest is computed on first use and kept."""
        if not self.frames:
            self.wait()
            self.frames = tuple(
                TensorFrame(name, WIRE_NAMES[t.dtype], tuple(t.shape), raw_bytes(t)) for name, t in self.buffers.items()
            )
        return self.frames


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Ring:
    """A fixed number of snapshot slots.

    Args:
        layout: What to capture.
        slots: How many snapshots fit.
        wire_dtype: Dtype to store and send; None keeps each parameter's own.

    Attributes:
        snapshot_bytes: Host memory of one snapshot.
    """

    def __init__(self, layout: Layout, slots: int, wire_dtype: torch.dtype | None) -> None:
        pinned = any(p.is_cuda for p in layout.parameters.values())
        self._lock = threading.Lock()

        def buffer(p: Tensor) -> Tensor:
            made = torch.empty(p.shape, dtype=wire_dtype or p.dtype, device="cpu", pin_memory=pinned)
            return made if pinned else made.zero_()  # ordinary memory is really there once it has been written to

        def make() -> dict[str, Tensor]:
            return {name: buffer(p) for name, p in layout.parameters.items()}

        self._make = make
        self._slots = [Slot({}) for _ in range(slots)]  # buffers are made when they are first needed
        self.snapshot_bytes = sum(p.numel() * (wire_dtype or p.dtype).itemsize for p in layout.parameters.values())
        self._streams = {p.device: torch.cuda.Stream(p.device) for p in layout.parameters.values() if p.is_cuda}
        self._pending: list[torch.cuda.Event] = []

    @property
    def on_streams(self) -> bool:
        """Whether copies run beside the training, so that `hold_writes` must be called before every step."""
        return bool(self._streams)

    @property
    def free(self) -> int:
        """Slots that can take a snapshot now."""
        with self._lock:
            return sum(not slot.in_use for slot in self._slots)

    @property
    def nbytes(self) -> int:
        """Host memory of the buffers made so far."""
        return sum(t.nbytes for slot in self._slots for t in slot.buffers.values())

    def take(self, layout: Layout, step: int, fill: Callable[[Slot], None] | None = None) -> Slot | None:
        """Copy all parameters into a free slot.

        Args:
            layout: The live parameters, in the layout the ring was made for.
            step: Real optimizer step they are of.
            fill: Fills the slot's buffers, where the parameters are not simply here.

        Returns:
            The slot, or None where the ring is full; nothing waits.
        """
        with self._lock:
            slot = next((s for s in self._slots if not s.in_use), None)
            if slot is None:
                return None
            slot.in_use = True
        slot.step, slot.frames, slot.copied = step, (), []
        try:
            slot.buffers = slot.buffers or self._make()
            if fill is None:
                self._copy(layout, slot)
            else:
                fill(slot)
        except Exception:
            self.release(slot)
            raise
        return slot

    def _copy(self, layout: Layout, slot: Slot) -> None:
        with torch.no_grad():
            if not self._streams:
                for name, parameter in layout.parameters.items():
                    slot.buffers[name].copy_(parameter)
                return
            for device, stream in self._streams.items():
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    for name, parameter in layout.parameters.items():
                        if parameter.device == device:
                            # A conversion happens on the device, one tensor at a time, before the bytes travel.
                            source = parameter.detach().to(slot.buffers[name].dtype)
                            slot.buffers[name].copy_(source, non_blocking=True)
                            source.record_stream(stream)
                    event = torch.cuda.Event()
                    event.record(stream)
                    slot.copied.append(event)
                    self._pending.append(event)
            for name, parameter in layout.parameters.items():
                if not parameter.is_cuda:
                    slot.buffers[name].copy_(parameter)

    def hold_writes(self) -> None:
        """Make the training streams wait for copies still running. Called right before an optimizer step."""
        for event in self._pending:
            for device in self._streams:
                torch.cuda.current_stream(device).wait_event(event)
        self._pending.clear()

    def release(self, slot: Slot) -> None:
        """Give a slot back. Giving it back twice is harmless."""
        with self._lock:
            slot.in_use, slot.step = False, -1


def hold_still(deltas: Mapping[str, Tensor], slots: Sequence[Slot]) -> dict[str, Tensor]:
    """A nowcast that moves no element which all of the snapshots agree on. For the uploader's thread.

    Padding rows, rows no batch has touched, pruned and frozen weights: a network predicts all elements of a tensor
    alike and cannot know that these lie still.

    Args:
        deltas: Predicted changes by name.
        slots: The snapshots that are held here; fewer than two say nothing.
    """
    if len(slots) < 2:
        return dict(deltas)
    first, *others = [slot.buffers for slot in slots]
    held: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, delta in deltas.items():
            held[name] = delta
            if name not in first or delta.shape != first[name].shape:
                continue  # refused later on, by name
            still = others[0][name] == first[name]
            for other in others[1:]:
                if not bool(still.any()):
                    break
                still &= other[name] == first[name]
            if bool(still.any()):
                held[name] = delta.masked_fill(still, 0.0)
    return held


def movement(older: Slot, newer: Slot) -> dict[str, float]:
    """Norm of the change of every tensor between two snapshots. For the uploader's thread."""
    older.wait()
    newer.wait()
    with torch.no_grad():
        return {name: float((new.float() - older.buffers[name].float()).norm()) for name, new in newer.buffers.items()}
