"""Rows looked up, gathered and scattered by number: the axis that is numbered is known by place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nowcast_client.network.tracing.labels import Label
from nowcast_client.network.tracing.rules.base import Call, Tensor, rule, unknown


def _rows(call: Call, table: Tensor, index_label: Label, why: str) -> Label:
    """A row of the table for each entry of the index."""
    label = call.meeting.fix(table.label, [0], why)
    gone = set(label.axes[0])
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    param = table.label.param and index_label.param
    if not param:
        for part in parts:
            if part.kind == "grid":
                call.meeting.ledger.settle(part.grid)
    return Label((*index_label.axes, *label.axes[1:]), (*index_label.parts, *parts), param)


def _index_label(call: Call, index: Tensor) -> Label:
    return replace(call.meeting.axes.data(index.shape), param=False)


@rule("embedding")
def _embedding(call: Call) -> Label:
    weight, index = call.tensor("weight"), call.tensor("indices")
    known = index.constant is not None and index.label.param
    call.uses(weight, "position_embedding" if known else "token_embedding")
    return _rows(call, weight, _index_label(call, index), "rows of an embedding are known by their number")


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _bag(call: Call) -> list[Any]:
    weight = call.tensor("weight")
    call.uses(weight, "token_embedding")
    label = _rows(
        call, weight, call.meeting.axes.data(call.shape[:1]), "rows of an embedding are known by their number"
    )
    return [label, *(call.meeting.axes.data(shape) for shape in call.out[1:])]


@rule("index_select")
def _index_select(call: Call) -> Label:
    x, index = call.tensor("self"), call.tensor("index")
    axis = call.axis(x, call.get("dim"))
    return _taken(call, x, axis, index)


def _taken(call: Call, x: Tensor, axis: int, index: Tensor) -> Label:
    places = index.whole_numbers()
    if places is not None and index.label.param and places.ndim <= 1:
        places = places.reshape(-1) % x.shape[axis]
        return call.meeting.axes.along(x.label, axis, lambda old: old[places], len(places))
    label = call.meeting.fix(x.label, [axis], f"{call.name} takes these by number")
    gone = set(label.axes[axis])
    made = call.meeting.axes.data((call.shape[axis],))
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    return Label((*label.axes[:axis], made.axes[0], *label.axes[axis + 1 :]), (*parts, *made.parts), False)


@rule("index", "_unsafe_index")
def _index(call: Call) -> Any:
    x, indices = call.tensor("self"), list(call.get("indices"))
    axes: list[int] = []
    axis = 0
    booleans = False
    for index in indices:
        if isinstance(index, Tensor):
            constant = index.constant
            boolean = constant is not None and str(constant.dtype) in ("torch.bool", "torch.uint8")
            booleans = booleans or boolean
            width = index.ndim if boolean else 1
            axes += list(range(axis, axis + width))
            axis += width
        else:
            axis += 1
    tensors = [index for index in indices if isinstance(index, Tensor)]
    if len(axes) == 1 and len(tensors) == 1 and tensors[0].ndim == 1 and not booleans:
        return _taken(call, x, axes[0], tensors[0])
    for tensor in tensors:
        call.meeting.fix(tensor.label, None, "rows are taken by these numbers")
    if len(axes) > x.ndim:
        return unknown(call)
    label = call.meeting.fix(x.label, axes, "index takes these by number")
    gone = {fine for k in axes for fine in label.axes[k]}
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    kept = [k for k in range(x.ndim) if k not in axes]
    n_made = len(call.shape) - len(kept)
    together = axes == list(range(axes[0], axes[-1] + 1))
    place = axes[0] if together else 0
    made = call.meeting.axes.data(call.shape[place : place + n_made])
    rest = [label.axes[k] for k in kept]
    out = (*rest[:place], *made.axes, *rest[place:])
    return Label(out, (*parts, *made.parts), False)


@rule("gather", "take_along_dim")
def _gather(call: Call) -> Label:
    x, index = call.tensor("self"), call.tensor("index" if "index" in call.arguments else "indices")
    axis = call.axis(x, call.get("dim"))
    label = call.meeting.fix(x.label, [axis], "gather takes these by number")
    gone = set(label.axes[axis])
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    made = call.meeting.axes.data((index.shape[axis],))
    source = Label((*label.axes[:axis], made.axes[0], *label.axes[axis + 1 :]), (*parts, *made.parts), label.param)
    cut = [
        replace(
            source,
            axes=tuple(a if index.shape[k] == x.shape[k] or k == axis else () for k, a in enumerate(source.axes)),
        )
    ]
    if any(index.shape[k] != x.shape[k] for k in range(x.ndim) if k != axis):
        call.meeting.fix(x.label, [k for k in range(x.ndim) if index.shape[k] != x.shape[k]], "gather takes a part")
        return call.meeting.axes.data(call.shape)
    return replace(call.meeting.elementwise([*cut, index.label], [], call.shape), param=False)


@rule("index_add", "index_copy", "scatter_add", "scatter", "scatter_reduce", "index_reduce", "index_fill")
def _scatter(call: Call) -> Label:
    x = call.tensor("self")
    axis = call.axis(x, call.get("dim"))
    label = call.meeting.fix(x.label, [axis], f"{call.name} numbers these")
    source = call.get("source") or call.get("src") or call.get("tensor")
    index = call.tensor("index")
    labels = [label]
    for other in (source, index if index.ndim == x.ndim else None):
        if not isinstance(other, Tensor) or other.ndim != x.ndim:
            continue
        fixed = call.meeting.fix(other.label, [axis], f"{call.name} numbers these")
        gone = set(fixed.axes[axis])
        parts = tuple(part for part in fixed.parts if not gone & set(part.fines))
        part_only = [k for k in range(x.ndim) if k != axis and other.shape[k] != x.shape[k]]
        if part_only:
            call.meeting.fix(x.label, part_only, f"{call.name} writes to a part of these")
            call.meeting.fix(other.label, part_only, f"{call.name} writes to a part of these")
            return call.meeting.axes.data(call.shape)
        labels.append(Label((*fixed.axes[:axis], (), *fixed.axes[axis + 1 :]), parts, other.label.param))
    call.meeting.kind = "residual"
    out = call.meeting.elementwise(labels, [], call.shape)
    call.meeting.kind = "tie"
    return replace(out, param=False)


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(call: Call) -> Label:
    x, values = call.tensor("self"), call.tensor("values")
    indices = list(call.get("indices"))
    axes: list[int] = []
    axis = 0
    for index in indices:
        width = 1
        if isinstance(index, Tensor):
            boolean = index.constant is not None and str(index.constant.dtype) == "torch.bool"
            width = index.ndim if boolean else 1
            axes += list(range(axis, axis + width))
        axis += width
    label = call.meeting.fix(x.label, axes, "values are put at these by number")
    kept = [k for k in range(x.ndim) if k not in axes]
    n_rows = values.ndim - len(kept)
    if n_rows < 0 or axes != list(range(len(axes))):
        call.meeting.fix(values.label, None, "values are put by number")
        return call.meeting.fix(label, None, "values are put at these by number")
    fixed = call.meeting.fix(values.label, list(range(n_rows)), "values are put by number")
    gone = {fine for k in range(n_rows) for fine in fixed.axes[k]}
    parts = tuple(part for part in fixed.parts if not gone & set(part.fines))
    other = Label((*((),) * len(axes), *fixed.axes[n_rows:]), parts, values.label.param)
    return replace(call.meeting.elementwise([label, other], [], x.shape), param=False)


@rule(
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "histc",
    "one_hot",
    "multinomial",
    "nonzero_static",
    "unique_dim_consecutive",
)
def _by_value(call: Call) -> Any:
    return unknown(call, f"{call.name} gives out places")


@rule("masked_scatter")
def _masked_scatter(call: Call) -> Any:
    return unknown(call)


def entries(shape: tuple[int, ...]) -> int:
    """Number of entries of a shape."""
    return int(np.prod(shape))
