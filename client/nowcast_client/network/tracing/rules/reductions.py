"""Sums, means, maxima and what else does not depend on the order of what it takes in."""

from __future__ import annotations

from typing import Any

from nowcast_client.network.tracing.labels import Label
from nowcast_client.network.tracing.rules.base import Call, Tensor, rule, unknown


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "var",
    "std",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "any",
    "all",
    "nansum",
    "nanmean",
    "var_mean",
    "std_mean",
    "aminmax",
    "count_nonzero",
    "max",
    "min",
    "frobenius_norm",
)
def _reduce(call: Call) -> Any:
    x = call.tensor("self") if "self" in call.arguments else call.tensors()[0]
    if call.name in ("max", "min") and len(call.tensors()) == 2:
        from nowcast_client.network.tracing.rules.pointwise import elementwise

        return elementwise(call)
    dims = call.get("dim")
    axes = call.axes(x, dims)
    label = call.meeting.reduce(x.label, axes, keep=bool(call.get("keepdim", False)))
    if not isinstance(call.out, list):
        return label
    if call.name in ("max", "min") and call.used[1]:
        label_fixed = call.meeting.fix(x.label, axes, f"{call.name} gives out the place of one of these")
        return [call.meeting.reduce(label_fixed, axes, keep=bool(call.get("keepdim", False)))] * 2
    return [label for _ in call.out]


@rule("argmax", "argmin")
def _place(call: Call) -> Label:
    x = call.tensor("self")
    dim = call.get("dim")
    axes = call.axes(x, dim) if dim is not None else list(range(x.ndim))
    label = call.meeting.fix(x.label, axes, f"{call.name} gives out the place of one of these")
    return call.meeting.reduce(label, axes, keep=bool(call.get("keepdim", False)))


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logcumsumexp_never")
def _softmax(call: Call) -> Label:
    x = call.tensor("self")
    call.meeting.normalise(x.label, [call.axis(x, call.get("dim", -1))])
    label = x.label
    if label.tag and label.tag[0] == "scores":
        label = Label(label.axes, label.parts, label.param, ("probabilities", label.tag[1], label.tag[2]))
    return label


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(call: Call) -> Label:
    from nowcast_client.network.tracing.rules.pointwise import elementwise

    x = call.tensor("grad_output")
    for tensor in call.tensors():
        call.meeting.normalise(tensor.label, [call.axis(x, call.get("dim", -1))])
    return elementwise(call)


@rule(
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "cummin",
    "sort",
    "topk",
    "argsort",
    "kthvalue",
    "median",
    "mode",
    "nanmedian",
    "msort",
)
def _ordered(call: Call) -> Any:
    """The order along an axis matters: its neurons stay where they are."""
    x = call.tensor("self")
    dim = call.get("dim", -1 if call.name in ("topk", "sort", "argsort", "kthvalue") else None)
    if dim is None:
        return unknown(call)
    axis = call.axis(x, dim)
    label = call.meeting.fix(x.label, [axis], f"{call.name} puts these in an order")
    size = x.shape[axis]
    if call.name in ("kthvalue", "median", "mode", "nanmedian"):
        label = call.meeting.reduce(label, [axis], keep=bool(call.get("keepdim", False)))
    elif call.name == "topk" and call.shape[axis] != size:
        k = call.shape[axis]
        label = call.meeting.axes.along(label, axis, lambda places: places[:k], k)
    return [label for _ in call.out] if isinstance(call.out, list) else label


@rule("_cdist_forward", "cdist", "_euclidean_dist")
def _cdist(call: Call) -> Label:
    """Distances of all rows to all rows: the last axes meet, rows stay."""
    return pairwise(call, call.tensor("x1"), call.tensor("x2"))


def pairwise(call: Call, a: Tensor, b: Tensor) -> Label:
    """Every row of one with every row of the other, their last axes met and summed."""
    left = Label((*a.label.axes[:-1], (), a.label.axes[-1]), a.label.parts, a.label.param)
    right = Label((*b.label.axes[:-2], (), *b.label.axes[-2:]), b.label.parts, b.label.param)
    n = max(len(left.axes), len(right.axes))
    left = Label(((),) * (n - len(left.axes)) + left.axes, left.parts, left.param)
    right = Label(((),) * (n - len(right.axes)) + right.axes, right.parts, right.param)
    for tensor in (a, b):
        if tensor.label.param:
            call.uses(tensor, "linear")
    label = call.meeting.contract(left, right, [n - 1])
    return Label(label.axes[:-1], label.parts, label.param, label.tag)
