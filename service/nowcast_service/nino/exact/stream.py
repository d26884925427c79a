"""Standardised tiles of a history, and the way back of what the network makes of them.

Snapshots stay where they are: in host memory, in a memory map, on the device. A tile is read through the strided view
of its block, brought to the device if it is elsewhere, and standardised there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from nowcast_service.graph.blocks import Block, View
from nowcast_service.history import History
from nowcast_service.nino.exact.plan import STRIP, Part
from nowcast_service.nino.scaling import EPSILON, Scale

_IN_FLIGHT = 2
"""Transfers under way at once: one tile is read while another is computed on."""


class Access(Protocol):
    """Parts of one block in some flattened tensors of the same parameter (snapshots, or results)."""

    parameter: str

    def read(self, part: Part) -> Sequence[Tensor]:
        """(I, J, features) values in each tensor."""
        ...

    def store(self, part: Part, number: int, values: Tensor, *, add: bool) -> None:
        """Add (I, J, features) values to one tensor, or put them there."""
        ...


def access(block: Block, view: View, flats: Sequence[Tensor]) -> Access:
    """Access to one block."""
    shape = view.transposed
    return _Strided(block, view, flats) if shape is None else _Transposed(block, view, shape, flats)


class _Strided:
    """Values at strides: every part is a view. A diagonal block is (n_sources, 1, features)."""

    def __init__(self, block: Block, view: View, flats: Sequence[Tensor]) -> None:
        self.parameter = view.parameter
        self._views = [view.of(flat, block.n_sources, block.n_targets, diagonal=block.diagonal) for flat in flats]
        if block.diagonal:
            self._views = [v[:, None] for v in self._views]

    def read(self, part: Part) -> Sequence[Tensor]:
        return [view[part.i0 : part.i1, part.j0 : part.j1] for view in self._views]

    def store(self, part: Part, number: int, values: Tensor, *, add: bool) -> None:
        view = self._views[number][part.i0 : part.i1, part.j0 : part.j1]
        if add:
            view.add_(values)
        else:
            view.copy_(values)


class _Transposed:
    """Values of a matrix W (rows, columns) in the order of its transpose: edge p carries element p of W.T.

    The published layout does so with embeddings (see `View`). No strides describe it, and reading W down its columns
    touches a cache line per element, so a strip of columns is copied at a time and parts are views of the copy.
    """

    def __init__(self, block: Block, view: View, shape: tuple[int, int], flats: Sequence[Tensor]) -> None:
        self.parameter = view.parameter
        self._n_targets = block.n_targets
        self._rows, self._columns = shape
        size = self._rows * self._columns
        self._flats = [flat[view.offset : view.offset + size] for flat in flats]
        self._strips: list[Tensor] = []
        self._start = self._end = 0  # elements of W.T the strips hold

    def read(self, part: Part) -> Sequence[Tensor]:
        n = self._n_targets
        if part.i0 * n < self._start or part.i1 * n > self._end:
            first = part.i0 * n // self._rows
            last = min(self._columns, max(first + STRIP, -(-part.i1 * n // self._rows)))
            self._strips = []  # free first
            for flat in self._flats:
                strip = torch.empty(last - first, self._rows, dtype=flat.dtype, device=flat.device)
                self._strips.append(strip.copy_(flat.view(self._rows, -1)[:, first:last].t()))
            self._start, self._end = first * self._rows, last * self._rows
        shape = (part.i1 - part.i0, part.j1 - part.j0, 1)
        at = part.i0 * n + part.j0 - self._start
        return [strip.as_strided(shape, (n, 1, 1), at) for strip in self._strips]

    def store(self, part: Part, number: int, values: Tensor, *, add: bool) -> None:
        device = values.device
        p = torch.arange(part.i0, part.i1, device=device)[:, None] * self._n_targets
        p = (p + torch.arange(part.j0, part.j1, device=device)).view(-1)  # (I J,)
        at = p.remainder(self._rows).mul_(self._columns).add_(p.floor_divide_(self._rows))
        flat = self._flats[number]
        if add:
            flat.index_add_(0, at, values.reshape(-1))
        else:
            flat[at] = values.reshape(-1)


class Reader:
    """Reads edges of blocks as raw inputs of the network.

    Args:
        history: The snapshots.
        scales: Scale of every parameter that is read.
        device: Where tiles are wanted.
    """

    def __init__(self, history: History, scales: Mapping[str, Scale], device: torch.device) -> None:
        self._history = history
        self._scales = scales
        self._device = device
        self._staging: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def open(self, block: Block) -> Access | float:
        """Access to a block in all snapshots, or the fixed feature of an auxiliary link."""
        if not isinstance(block.values, View):
            return block.values
        return access(block, block.values, self._history.flat(block.values.parameter))

    def read(self, values: Access | float, part: Part, out: Tensor) -> None:
        """Fill ``out`` with standardised inputs.

        Args:
            values: What `open` gave for the block of the edges.
            part: Which edges.
            out: (tiles, I, J / tiles, features * context) contiguous, the targets cut into tiles of equal size; column
                ``context * position + snapshot``.
        """
        context = len(self._history)
        if isinstance(values, int | float):
            # Set after scaling, in position 0 of all snapshots.
            out.zero_()
            out[..., :context] = values
            return
        views = [view.unflatten(1, (len(out), -1)).movedim(1, 0) for view in values.read(part)]
        columns = out.unflatten(-1, (-1, context))
        if views[0].device == out.device:
            for number, view in enumerate(views):
                columns[..., number].copy_(view)
        else:
            self._transfer(views, columns)
        scale = self._scales[values.parameter]
        out.sub_(scale.mean).mul_(scale.factor)  # centred first: norms at 1.0 lose nothing

    def _transfer(self, views: Sequence[Tensor], columns: Tensor) -> None:
        """Host to device through pinned memory, without waiting for the device."""
        stage: Tensor | None = None
        done = torch.cuda.Event()
        if len(self._staging) >= _IN_FLIGHT:
            stage, done = self._staging.popleft()
            done.synchronize()
        stage, host = staged(views, stage, pinned=True)
        columns.copy_(host.to(self._device, non_blocking=True).movedim(0, -1))
        done.record(torch.cuda.current_stream(self._device))
        self._staging.append((stage, done))


def staged(views: Sequence[Tensor], stage: Tensor | None, *, pinned: bool) -> tuple[Tensor, Tensor]:
    """Values of several snapshots side by side, in a type that holds each of them exactly.

    Args:
        views: The values in each snapshot, of one shape; a snapshot may have a type of its own.
        stage: A buffer to use again where it is large enough.
        pinned: Whether the buffer is read by a device.

    Returns:
        The buffer, and its part that holds the values: (snapshots, *shape).
    """
    dtype = reduce(torch.promote_types, (view.dtype for view in views))
    numel = sum(view.numel() for view in views)
    if stage is None or stage.numel() < numel or stage.dtype != dtype:
        stage = torch.empty(numel, dtype=dtype, pin_memory=pinned)
    host = stage[:numel].view(len(views), *views[0].shape)
    for number, view in enumerate(views):
        host[number].copy_(view)
    return stage, host


class Writer:
    """Adds predicted changes to results that start as the newest snapshot.

    Args:
        results: One mapping parameter -> float32 tensor per horizon, holding the newest snapshot.
        scales: Scale of every parameter that is written.
        residual: Whether the network predicts the change of the newest snapshot, or the parameter itself.
        update_scale: Factor on a predicted change.
    """

    def __init__(
        self,
        results: Sequence[Mapping[str, Tensor]],
        scales: Mapping[str, Scale],
        *,
        residual: bool,
        update_scale: float,
    ) -> None:
        self._results = results
        self._scales = scales
        self._residual = residual
        self._update_scale = update_scale
        self._pending: deque[tuple[Access, Part, Tensor, torch.cuda.Event]] = deque()

    def open(self, block: Block) -> Access | None:
        """Access to a block in the results; None for an auxiliary link and where the parameter has no variance.

        Such a parameter stays exactly where it is. None as well where the tensor is predicted at another of its uses.
        """
        view = block.values
        if not isinstance(view, View) or not block.writes or self._scales[view.parameter].constant:
            return None
        return access(block, view, [result[view.parameter].view(-1) for result in self._results])

    def write(self, values: Access, block: Block, part: Part, inputs: Tensor, outputs: Tensor) -> None:
        """Un-scale the network's outputs and store them.

        With x the newest scaled snapshot and y the output, the prediction is (x + c y) s + m. As x (s + 1e-6) + m is
        the newest weight w itself, that is w + c y s - x 1e-6, which loses nothing where the change is small against w.

        Args:
            values: What `open` gave for the block of the edges.
            block: The block.
            part: Which edges.
            inputs: Standardised inputs, all (I, J, features, context) of them.
            outputs: All (I, J, horizons, features) of them, overwritten.
        """
        shape = (part.i1 - part.i0, part.j1 - part.j0)
        inputs = inputs.view(*shape, block.features, -1)
        outputs = outputs.view(*shape, len(self._results), block.features)
        scale = self._scales[values.parameter]
        if self._residual:
            outputs.mul_(scale.std * self._update_scale)
            outputs.sub_(inputs[..., -1].unsqueeze(-2), alpha=EPSILON)
        else:
            outputs.mul_(scale.std).add_(scale.mean)
        home = self._results[0][values.parameter].device
        if outputs.device == home:
            self._store(values, part, outputs)
            return
        host = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=home.type == "cpu", device=home)
        host.copy_(outputs, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(outputs.device if outputs.is_cuda else home))
        self._pending.append((values, part, host, done))
        if len(self._pending) > _IN_FLIGHT:
            self._drain()

    def finish(self) -> None:
        """Wait for transfers under way."""
        while self._pending:
            self._drain()

    def _drain(self) -> None:
        values, part, host, done = self._pending.popleft()
        done.synchronize()
        self._store(values, part, host)

    def _store(self, values: Access, part: Part, outputs: Tensor) -> None:
        for number in range(outputs.shape[-2]):
            values.store(part, number, outputs[..., number, :], add=self._residual)
