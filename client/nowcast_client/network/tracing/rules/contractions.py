"""Products that sum over an axis: matrix products, convolutions, bilinear forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nowcast_client.network.tracing.labels import Label, Part
from nowcast_client.network.tracing.rules.base import Call, Tensor, rule, unknown


def product(call: Call, a: Tensor, b: Tensor) -> Label:
    """(…, m, k) times (…, k, n)."""
    left = Label(
        (*a.label.axes[:-2], a.label.axes[-2], a.label.axes[-1], ()), a.label.parts, a.label.param, a.label.tag
    )
    right = Label(
        (*b.label.axes[:-2], (), b.label.axes[-2], b.label.axes[-1]), b.label.parts, b.label.param, b.label.tag
    )
    for one, other in ((a, b), (b, a)):
        if one.label.param and not other.label.param:
            call.uses(one, "linear")
    label = call.meeting.contract(left, right, [len(left.axes) - 2])
    return replace(label, axes=(*label.axes[:-2], label.axes[-1]))


def _plus(call: Call, label: Label, extra: Tensor) -> Label:
    meeting = call.meeting
    if extra.label.param:
        call.uses(extra, "bias")
    meeting.kind = "residual"
    out = meeting.elementwise([label, extra.label], [call.shape, extra.shape], call.shape)
    meeting.kind = "tie"
    return out


@rule("mm", "bmm", "matmul")
def _mm(call: Call) -> Label:
    first, second = call.tensors()[:2]
    return call.meeting.axes.tidy(product(call, first, second))


@rule("addmm", "baddbmm")
def _addmm(call: Call) -> Label:
    one, two = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    return _plus(call, call.meeting.axes.tidy(product(call, call.tensor(one), call.tensor(two))), call.tensor("self"))


@rule("mv", "dot", "vdot", "addmv")
def _vector(call: Call) -> Label:
    if call.name == "addmv":
        a, b = call.tensor("mat"), call.tensor("vec")
    else:
        a, b = call.tensors()[:2]
    left, right = a.label, replace(b.label, axes=(*((),) * (a.ndim - 1), *b.label.axes))
    for one in (a, b):
        if one.label.param:
            call.uses(one, "linear")
    label = call.meeting.contract(left, right, [a.ndim - 1])
    label = call.meeting.axes.tidy(replace(label, axes=label.axes[:-1]))
    return _plus(call, label, call.tensor("self")) if call.name == "addmv" else label


@rule("linear")
def _linear(call: Call) -> Label:
    x, w = call.tensor("input"), call.tensor("weight")
    n = x.ndim
    left = Label((*x.label.axes, ()), x.label.parts, x.label.param)
    right = Label((*((),) * (n - 1), w.label.axes[1], w.label.axes[0]), w.label.parts, w.label.param)
    call.uses(w, "linear")
    label = call.meeting.contract(left, right, [n - 1])
    label = replace(label, axes=(*label.axes[: n - 1], label.axes[n]))
    bias = call.get("bias")
    return _plus(call, label, bias) if isinstance(bias, Tensor) else call.meeting.axes.tidy(label)


@rule("_trilinear")
def _trilinear(call: Call) -> Label:
    meeting = call.meeting
    labels, shapes = [], []
    for name, missing in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        tensor, label, shape = call.tensor(name), call.tensor(name).label, list(call.tensor(name).shape)
        for axis in sorted(call.get(missing)):
            label = replace(label, axes=(*label.axes[:axis], (), *label.axes[axis:]))
            shape.insert(axis, 1)
        labels.append(label)
        shapes.append(shape)
        if tensor.label.param:
            call.uses(tensor, "linear")
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    met = meeting.elementwise(labels, shapes, full)
    for part in met.parts:
        if part.kind == "grid":
            meeting.ledger.settle(part.grid)
    return replace(meeting.reduce(met, call.get("sumdim"), keep=False), param=False)


@rule("convolution", "_convolution", "convolution_overrideable", "conv2d", "conv1d", "conv3d")
def _convolution(call: Call) -> Label:
    x, w, bias = call.tensor("input"), call.tensor("weight"), call.get("bias")
    groups, transposed = call.get("groups", 1), bool(call.get("transposed", False))
    meeting, axes = call.meeting, call.meeting.axes
    spatial = list(range(x.ndim - (w.ndim - 2), x.ndim))
    label_x = meeting.fix(x.label, spatial, "a convolution runs along these neurons")
    label_w = kernel_axes(call, w, list(range(2, w.ndim)))
    call.uses(w, "conv")
    batch = x.ndim - w.ndim + 1  # leading axes of the input
    channels = x.shape[batch]
    first, second = w.shape[0], w.shape[1]
    label_x = Label(label_x.axes[: batch + 1], _without(label_x, spatial), x.label.param)
    label_w = Label(label_w.axes[:2], _without(label_w, list(range(2, w.ndim))), w.label.param)
    outputs = second * groups if transposed else first
    label_x = axes.view(label_x, (*x.shape[:batch], groups, channels // groups))
    if transposed:  # (in, out / groups)
        label_w = axes.view(label_w, (groups, channels // groups, second))
        sides = (label_w.axes[0], label_w.axes[1], label_w.axes[2])
    else:  # (out, in / groups)
        label_w = axes.view(label_w, (groups, first // groups, second))
        sides = (label_w.axes[0], label_w.axes[2], label_w.axes[1])
    left = replace(label_x, axes=(*label_x.axes, ()))
    right = replace(label_w, axes=(*((),) * batch, *sides))
    if groups > 1 and not transposed:
        left, right = _grouped(call, left, right, w, batch)
    label = meeting.contract(left, right, [batch + 1])
    label = replace(label, axes=(*label.axes[: batch + 1], label.axes[batch + 2]))
    label = axes.view(label, (*x.shape[:batch], outputs))
    if isinstance(bias, Tensor):
        call.uses(bias, "bias")
        meeting.kind = "residual"
        label = meeting.elementwise([label, bias.label], [], (*x.shape[:batch], outputs))
        meeting.kind = "tie"
    data = axes.data(call.shape[batch + 1 :])
    return Label((*label.axes, *data.axes), (*label.parts, *data.parts), label.param)


def kernel_axes(call: Call, w: Tensor, places: list[int]) -> Label:
    """The label of a weight whose axes of kernel positions are values of its edges."""
    label, meeting = w.label, call.meeting
    for k in places:
        for fine in label.axes[k]:
            part = label.part_of(fine)
            if part is None or part.kind != "grid":
                continue
            if len(part.fines) > 1 or not meeting.parameters.as_features(part, meeting.ledger):
                label = meeting.fix(label, [k], "kernel positions are known by their place")
            else:
                parts = tuple(p for p in label.parts if p is not part)
                label = replace(label, parts=(*parts, Part((fine,), None, "data")))
    return label


def _without(label: Label, gone: list[int]) -> tuple[Part, ...]:
    fines = {fine for k in gone for fine in label.axes[k]}
    return tuple(part for part in label.parts if not fines & set(part.fines))


def _grouped(call: Call, left: Label, right: Label, w: Tensor, batch: int) -> tuple[Label, Label]:
    """A plain grouped weight joins neurons of each group with those of its own group alone."""
    meeting = call.meeting
    left, right = meeting.aligned([left, right])
    a = [part for part in left.parts if set(part.fines) & {*left.axes[batch], *left.axes[batch + 1]}]
    group, inner, outer = right.axes[batch], right.axes[batch + 1], right.axes[batch + 2]
    out = [part for part in right.parts if set(part.fines) & {*group, *outer}]
    if len(a) != 1 or len(out) != 1 or a[0].kind != "grid" or out[0].kind != "grid" or len(group) != 1:
        return left, right
    source = a[0]
    if set(source.fines) != {*group, *left.axes[batch + 1]} or set(out[0].fines) != {*group, *outer}:
        return left, right
    if w.value < 0 or not meeting.ledger.grouped(w.value, _matrix(source, group), _matrix(out[0], group)):
        return left, right
    heads = meeting.ledger.head(_matrix(source, group))
    targets = _matrix(out[0], group)
    if targets.shape[1] > 1 or source.grid.size != targets.size:
        meeting.ledger.assign_head(heads, targets)
    else:
        meeting.ledger.move_together(source.grid.ravel(), targets.ravel())
    # What is left to contract: nothing; the rows of the result are the weight's.
    gone = {*left.axes[batch + 1], *inner}
    rest = tuple(part for part in left.parts if part is not source)
    parts = tuple(part for part in right.parts if not set(part.fines) & gone)
    blank = replace(left, axes=(*left.axes[:batch], (), (), ()), parts=rest)
    return blank, replace(right, axes=(*right.axes[: batch + 1], (), right.axes[batch + 2]), parts=parts)


def _matrix(part: Part, group: tuple[int, ...]) -> np.ndarray:
    rest = [fine for fine in part.fines if fine not in group]
    values = part.over([*group, *rest]).grid
    return values.reshape(values.shape[0], -1)


@rule("_grouped_mm")
def _grouped_mm(call: Call) -> Any:
    """Rows sorted by expert times a matrix each: rows and experts are data, the inner axes meet."""
    a, b = call.tensor("self"), call.tensor("mat2")
    if a.ndim != 2 or b.ndim != 3:
        return unknown(call)
    meeting = call.meeting
    fixed = meeting.fix(b.label, [0], "experts are known by their number")
    gone = set(fixed.axes[0])
    parts = tuple(part for part in fixed.parts if not gone & set(part.fines))
    matrix = Tensor(Label(fixed.axes[1:], parts, b.label.param), b.shape[1:])
    call.uses(b, "linear")
    return meeting.axes.tidy(product(call, a, matrix))
