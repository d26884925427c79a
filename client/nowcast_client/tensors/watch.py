"""Weights that somebody else wrote between two optimizer steps: found without reading them all.

Best weights reloaded, a checkpoint put back, an average swapped in for good: the snapshots from before and from after
such a write are no trajectory. Version counters and addresses tell of most writes; writes through ``.data`` leave no
trace there, and a swap that was undone leaves one though nothing has changed. So a few elements of every tensor are
remembered at the end of a step, and looked at before the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nowcast_client.tensors.layout import Layout

PROBED = 16
"""Elements of a tensor that are remembered."""
MOST = 512
"""Tensors that are, evenly spread over the network."""
USUAL = 3
"""Writes, each within a stride of the one before, after which the next is a part of how this network is trained."""


class Watch:
    """Tells a jump of the weights from what belongs to the training: clamping, slow weights, a swap that was undone.

    Args:
        stride: Steps between snapshots: writes that come as often belong to every stride alike.
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._layout: Layout | None = None
        self._marks: list[tuple[int, int]] = []
        self._views: list[list[Tensor]] = []  # strided views into the tensors, by device and dtype
        self._then: list[Tensor] = []
        self._unread: list[Tensor] = []  # what devices other than the host have found, not waited for
        self._newest, self._in_a_row = -1, 0

    @property
    def marked(self) -> bool:
        """Whether there are weights to compare with."""
        return self._layout is not None

    def forget(self) -> None:
        """The weights are about to be put where an earlier training was."""
        self._layout, self._unread = None, []

    def mark(self, layout: Layout) -> None:
        """Remember the weights as they are at the end of a step."""
        marks = _marks(layout)
        if layout is not self._layout or _addresses(marks) != _addresses(self._marks):
            self._views = _views(layout)
        self._layout, self._marks = layout, marks
        self._then = [torch.cat(views) for views in self._views]

    def jumped(self, layout: Layout, step: int) -> bool:
        """Whether the weights are others than at the last `mark`, in a way that is no part of the training.

        Args:
            layout: The live parameters.
            step: Step the weights are of.
        """
        if layout is not self._layout:
            return False  # whoever replaced parameters is dealt with elsewhere
        marks = _marks(layout)
        touched = marks != self._marks
        if _addresses(marks) != _addresses(self._marks):
            self._views = _views(layout)
        changed = self._changed(wait=touched)
        if not (touched or changed):
            return False
        self._in_a_row = self._in_a_row + 1 if 0 <= step - self._newest <= self._stride else 0
        self._newest = step
        return changed and self._in_a_row < USUAL

    def found_late(self) -> bool:
        """Whether a device has found a jump since the last call; waits for it."""
        unread, self._unread = self._unread, []
        return any(bool(found) for found in unread)

    def _changed(self, *, wait: bool) -> bool:
        """Whether more than half of what is remembered of any tensor has changed.

        A put-back moves all of a tensor; a bound that some elements have run into moves those.
        """
        found = False
        with torch.no_grad():
            for views, then in zip(self._views, self._then, strict=True):
                if then.is_cpu and not wait and torch.equal(then.view(torch.uint8), torch.cat(views).view(torch.uint8)):
                    continue
                parts = zip(views, torch.split(then, [view.numel() for view in views]), strict=True)
                if then.is_cpu or wait:
                    found = found or any(2 * int(view.ne(old).sum()) > old.numel() for view, old in parts)
                elif self._in_a_row < USUAL:
                    self._unread = [*self._unread[-1:], torch.cat(views).ne(then).double().mean() > 0.5]
        return found


def _own(tensor: Tensor) -> Tensor:
    """The part held here, without the cost of `local`."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def _marks(layout: Layout) -> list[tuple[int, int]]:
    """Version and address of every tensor."""
    held = [_own(p) for p in layout.parameters.values()]
    return [(0 if p.is_inference() else p._version, p.data_ptr()) for p in held]


def _addresses(marks: list[tuple[int, int]]) -> list[int]:
    return [address for _, address in marks]


def _views(layout: Layout) -> list[list[Tensor]]:
    """A few elements of every tensor, wherever they lie in its memory."""
    parameters = list(layout.parameters.values())
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters[:: -(-len(parameters) // MOST)]:
        own = _own(parameter).detach()
        if own.numel() == 0:
            continue
        reach = sum((n - 1) * stride for n, stride in zip(own.shape, own.stride(), strict=True))
        apart = max(1, reach // PROBED)
        view = own.as_strided((min(PROBED, reach // apart + 1),), (apart,), own.storage_offset())
        found.setdefault((own.device, own.dtype), []).append(view)
    return list(found.values())
