"""What operations on one tensor do to labels: axes are reduced, or what lies along them stays where it is.

Reducing a part of a grid makes its rows move as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nowcast_client.network.tracing.atoms import NONE, Ledger
from nowcast_client.network.tracing.labels import Axes, Label, Part


class Reducing:
    """What happens to neurons along axes that are reduced or fixed.

    Args:
        axes: Makes fine axes.
        ledger: Where restrictions are written down.
    """

    def __init__(self, axes: Axes, ledger: Ledger) -> None:
        self.axes = axes
        self.ledger = ledger

    def reduce_parts(self, parts: Sequence[Part], fines: Sequence[int]) -> list[Part]:
        """What is left when some fine axes are summed, or otherwise reduced to what does not depend on their order."""
        gone = set(fines)
        out: list[Part] = []
        for part in parts:
            rest = [fine for fine in part.fines if fine not in gone]
            if len(rest) == len(part.fines):
                out.append(part)
            elif part.kind == "class":
                if rest:
                    out += [Part((fine,), None, "data") for fine in rest]
            elif part.kind == "grid" and rest:
                inside = [fine for fine in part.fines if fine in gone]
                values = part.over([*rest, *inside]).grid
                shape = [self.axes.sizes[fine] for fine in rest]
                heads = self.ledger.head(values.reshape(int(np.prod(shape)), -1))
                out.append(Part(tuple(rest), heads.reshape(shape), "grid"))
        return out

    def reduce(self, label: Label, axes: Sequence[int], *, keep: bool) -> Label:
        """A label with some axes reduced.

        Args:
            label: Of the tensor.
            axes: Which, from the front.
            keep: They stay as axes of size one.
        """
        gone = [fine for k in axes for fine in label.axes[k]]
        left = tuple(() if k in axes else axis for k, axis in enumerate(label.axes) if keep or k not in axes)
        return self.axes.tidy(replace(label, axes=left, parts=tuple(self.reduce_parts(label.parts, gone)), tag=None))

    def normalise(self, label: Label, axes: Sequence[int]) -> None:
        """Every value depends on all values along these axes, whatever their order (softmax, norms)."""
        self.reduce_parts(label.parts, [fine for k in axes for fine in label.axes[k]])

    def fix(self, label: Label, axes: Sequence[int] | None, why: str) -> Label:
        """Neurons along some axes (all where None) stay where they are, and those axes are data from then on."""
        wanted = set(range(len(label.axes))) if axes is None else set(axes)
        fines = [fine for k in wanted for fine in label.axes[k]]
        parts: list[Part] = []
        for part in label.parts:
            inside = [fine for fine in part.fines if fine in fines]
            if not inside:
                parts.append(part)
                continue
            rest = [fine for fine in part.fines if fine not in fines]
            if part.kind == "grid" and rest:
                values = part.over([*inside, *rest]).grid
                places = int(np.prod([self.axes.sizes[fine] for fine in inside]))
                self.ledger.fix(self.ledger.head(values.reshape(places, -1)), why)
                if not (part.grid == NONE).all():
                    parts.append(self._rows(part, inside, rest))
            elif part.kind == "grid":
                self.ledger.fix(part.grid, why)
        covered = {fine for part in parts for fine in part.fines}
        parts += [Part((fine,), None, "data") for fine in fines if fine not in covered]
        return replace(label, parts=tuple(parts), tag=None)

    def _rows(self, part: Part, inside: list[int], rest: list[int]) -> Part:
        """What the axes that stay run over when others become data: neurons of one row, or rows as a whole."""
        values = part.over([*rest, *inside]).grid
        shape = [self.axes.sizes[fine] for fine in rest]
        heads = self.ledger.head(values.reshape(int(np.prod(shape)), -1))
        return Part(tuple(rest), heads.reshape(shape), "grid")
