"""What operations on several tensors do to labels: values meet place by place, tensors are contracted.

Two grids over the same axes join; a grid over some of the axes of another either stands for its rows (heads) or moves
with them; data and constants tell neurons apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nowcast_client.network.tracing.atoms import Ints, Ledger
from nowcast_client.network.tracing.labels import Axes, Label, Part, refine
from nowcast_client.network.tracing.parameters import Parameters
from nowcast_client.network.tracing.reducing import Reducing


class Meeting(Reducing):
    """What happens to neurons where tensors meet.

    Args:
        axes: Makes fine axes.
        ledger: Where restrictions are written down.
        parameters: May be divided as what they meet.
    """

    def __init__(self, axes: Axes, ledger: Ledger, parameters: Parameters) -> None:
        super().__init__(axes, ledger)
        self.parameters = parameters
        self.kind = "tie"
        self.what = ""

    def elementwise(self, labels: Sequence[Label], shapes: Sequence[Sequence[int]], out: Sequence[int]) -> Label:
        """Values meet place by place, with broadcasting.

        Args:
            labels: Of the tensors.
            shapes: Of the tensors.
            out: Of the result.
        """
        params = all(label.param for label in labels)
        padded = [replace(label, axes=((),) * (len(out) - len(label.axes)) + label.axes) for label in labels]
        aligned = self.aligned(padded)
        axes = tuple(next((label.axes[k] for label in aligned if label.axes[k]), ()) for k in range(len(out)))
        parts: tuple[Part, ...] = ()
        before = None
        for label in aligned:
            if before is None:
                parts = label.parts
            else:
                parts = tuple(self.combine(parts, label.parts, before, label.param))
            before = label.param if before is None else before and label.param
        for size, axis in zip(out, axes, strict=True):
            if size != 1 and not axis:
                raise ValueError(f"shapes {shapes} do not give {out}")
        tag = next((label.tag for label in labels if label.tag), None)
        return self.axes.tidy(Label(axes, parts, params, tag))

    def aligned(self, labels: Sequence[Label]) -> list[Label]:
        """Labels of equally many axes, with fine axes of equal sizes and names where they have any."""
        labels = list(labels)
        wanted: list[list[int]] = []
        for k in range(len(labels[0].axes)):
            pieces = [[self.axes.sizes[fine] for fine in label.axes[k]] for label in labels if label.axes[k]]
            found = refine(pieces) if pieces else []
            if found is None:
                labels = [self.axes.single(label, k) for label in labels]
                found = [max(int(np.prod(sizes)) for sizes in pieces)]
            wanted.append(found)
        labels = [
            self.axes.align(label, [sizes if label.axes[k] else [] for k, sizes in enumerate(wanted)])
            for label in labels
        ]
        names = [tuple(self.axes.new(size) for size in sizes) for sizes in wanted]
        renamed = []
        for label in labels:
            table = {fine: new for k, axis in enumerate(label.axes) for fine, new in zip(axis, names[k], strict=False)}
            renamed.append(self.axes.rename(label, table))
        return renamed

    def combine(
        self, ours: Sequence[Part], theirs: Sequence[Part], ours_param: bool = False, theirs_param: bool = False
    ) -> list[Part]:
        """What values known by ``ours`` and values known by ``theirs`` are known by after they met."""
        out: list[Part] = []
        rest_a, rest_b = list(ours), list(theirs)
        while rest_a:
            group_a, group_b = [rest_a.pop(0)], list[Part]()
            while True:
                fines = {fine for part in (*group_a, *group_b) for fine in part.fines}
                more_a = [part for part in rest_a if fines & set(part.fines)]
                more_b = [part for part in rest_b if fines & set(part.fines)]
                if not more_a and not more_b:
                    break
                group_a, group_b = group_a + more_a, group_b + more_b
                rest_a = [part for part in rest_a if part not in more_a]
                rest_b = [part for part in rest_b if part not in more_b]
            out += self._resolve(group_a, group_b, ours_param, theirs_param)
        return out + rest_b

    def _resolve(self, a: list[Part], b: list[Part], a_param: bool, b_param: bool) -> list[Part]:
        if not b:
            return a
        if len(a) == len(b) == 1 and set(a[0].fines) == set(b[0].fines):
            return [self._same(a[0], b[0])]
        if a_param and not b_param and self.parameters.adopt(a, b, self.ledger, self.axes.sizes):
            return b
        if b_param and self.parameters.adopt(b, a, self.ledger, self.axes.sizes):
            return a
        parts = [*a, *b]
        largest = max(parts, key=lambda part: (part.kind == "grid", len(part.fines)))
        every = {fine for part in parts for fine in part.fines}
        if largest.kind != "grid":  # no grid at all: data and classes lie over one fine axis each
            return [self._same(p, q) for p in a for q in b if p.fines == q.fines]
        if set(largest.fines) != every:
            largest = self._spread(every)
        for part in parts:
            if part is not largest:
                if set(part.fines) == every:
                    largest = self._same(largest, part)
                else:
                    self.nested(largest, part)
        return [largest]

    def _spread(self, fines: set[int]) -> Part:
        """Neurons of their own for results that two grids over different axes give together."""
        order = tuple(sorted(fines))
        shape = [self.axes.sizes[fine] for fine in order]
        return Part(order, self.ledger.new(int(np.prod(shape)), "results").reshape(shape), "grid")

    def _same(self, a: Part, b: Part) -> Part:
        if a.kind == "grid" and b.kind == "grid":
            b = b.over(a.fines)
            return replace(a, values=self.ledger.join(a.grid, b.grid, self.kind))
        if b.kind == "grid":
            a, b = b, a
        if a.kind == "grid":
            if b.kind == "data":
                self.ledger.fix(a.grid, f"{self.what} meets data that tell these neurons apart")
            else:
                self._cut(a.grid, b.grid)
            return a
        if a.kind == b.kind == "class":
            pairs = np.stack([a.grid, b.grid], axis=1)
            return replace(a, values=np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64))
        return a if a.kind == "data" else b

    def _cut(self, grid: Ints, classes: Ints) -> None:
        for one in np.unique(classes):
            chosen = grid[classes == one]
            self.ledger.cut(chosen, grid)

    def nested(self, p: Part, q: Part) -> None:
        """Write down what it means that two parts meet that lie over different axes."""
        if len(p.fines) < len(q.fines):
            p, q = q, p
        common = [fine for fine in p.fines if fine in q.fines]
        rest = [fine for fine in p.fines if fine not in common]
        if p.kind != "grid":
            if q.kind == "grid":
                self.ledger.fix(q.grid, f"{self.what} meets data that tell these neurons apart")
            return
        n_common = int(np.prod([self.axes.sizes[fine] for fine in common]))
        rows = p.over([*common, *rest]).grid.reshape(n_common, -1)
        if q.kind != "grid":
            heads = self.ledger.head(rows)
            if q.kind == "data":
                self.ledger.fix(heads, f"{self.what} meets data that tell these heads or places apart")
            else:
                self._cut(heads, q.grid)
            return
        extra = [fine for fine in q.fines if fine not in common]
        columns = q.over([*common, *extra]).grid.reshape(n_common, -1)
        if columns.shape[1] == 1:
            column = columns[:, 0]
            if self.ledger.is_group(column):
                self.ledger.assign_head(column, rows)
                return
            self.ledger.settle(column)
            for place in range(rows.shape[1]):
                self.ledger.join(column, rows[:, place], "tie")
            return
        for place in range(1, rows.shape[1]):
            self.ledger.join(rows[:, 0], rows[:, place], "tie")
        for place in range(columns.shape[1]):
            self.ledger.join(rows[:, 0], columns[:, place], "tie")

    def contract(self, a: Label, b: Label, summed: Sequence[int]) -> Label:
        """Multiply place by place and sum over some axes; both labels have the same axes, empty where they lack one.

        Args:
            a: Label.
            b: Label, with as many axes.
            summed: Axes that are summed.
        """
        a, b = self.aligned([a, b])
        gone = [fine for k in summed for fine in (a.axes[k] or b.axes[k])]
        touched = set(gone)
        inner_a = [part for part in a.parts if touched & set(part.fines)]
        inner_b = [part for part in b.parts if touched & set(part.fines)]
        self._constrain(inner_a, inner_b, a.param, b.param)
        left_a = self.reduce_parts(a.parts, gone)
        left_b = self.reduce_parts(b.parts, gone)
        parts = self.combine(left_a, left_b, a.param, b.param)
        axes = tuple(() if k in summed else (a.axes[k] or b.axes[k]) for k in range(len(a.axes)))
        # A constant times a parameter is a value of the network: a first hidden state of zeros, say.
        params = all(label.param and any(part.kind == "grid" for part in label.parts) for label in (a, b))
        if not params:
            for part in parts:
                if part.kind == "grid":
                    self.ledger.settle(part.grid)
        tag = self._attention(a, b, inner_a, inner_b, parts) if not (a.param or b.param) else None
        return Label(axes, tuple(parts), params, tag)

    def _constrain(self, a: list[Part], b: list[Part], a_param: bool, b_param: bool) -> None:
        """Restrict neurons as the products under a sum demand."""
        for p in a:
            for q in b:
                if not set(p.fines) & set(q.fines):
                    continue
                if set(p.fines) == set(q.fines):
                    self._same(p, q)
                    continue
                if (
                    a_param
                    and not b_param
                    and self.parameters.adopt(self._whole(a, p, q), self._whole(b, p, q), self.ledger, self.axes.sizes)
                ):
                    continue
                if b_param and self.parameters.adopt(
                    self._whole(b, p, q), self._whole(a, p, q), self.ledger, self.axes.sizes
                ):
                    continue
                self.nested(p, q)

    @staticmethod
    def _whole(parts: list[Part], p: Part, q: Part) -> list[Part]:
        fines = set(p.fines) | set(q.fines)
        return [part for part in parts if fines & set(part.fines)]

    def _attention(
        self, a: Label, b: Label, inner_a: list[Part], inner_b: list[Part], parts: Sequence[Part]
    ) -> tuple[str, Ints, Ints] | None:
        probabilities = next((label.tag for label in (a, b) if label.tag and label.tag[0] == "probabilities"), None)
        if probabilities is not None:
            other = b if a.tag is probabilities else a
            values = [part.grid for part in other.parts if part.kind == "grid"]
            self.ledger.role(probabilities[1], "query")
            self.ledger.role(probabilities[2], "key")
            for grid in values:
                if not self.ledger.is_group(grid):
                    self.ledger.role(grid.ravel(), "value")
            return None
        grids = [
            np.concatenate([part.grid.ravel() for part in inner if part.kind == "grid"] or [np.zeros(0, np.int64)])
            for inner in (inner_a, inner_b)
        ]
        if grids[0].size and grids[1].size:
            return ("scores", grids[0], grids[1])
        return None
