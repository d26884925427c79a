"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

from nowcast_client.network.tracing.labels import Label
from nowcast_client.network.tracing.rules.base import Call, Tensor, rule


def _affine(call: Call, label: Label, shape: Sequence[int], places: Sequence[int]) -> Label:
    """Weight and bias over some axes of the normalised tensor."""
    for name in ("weight", "bias"):
        tensor = call.get(name)
        if not isinstance(tensor, Tensor):
            continue
        call.uses(tensor, "norm")
        axes: list[tuple[int, ...]] = [()] * len(shape)
        for own, place in enumerate(places):
            axes[place] = tensor.label.axes[own]
        spread = Label(tuple(axes), tensor.label.parts, tensor.label.param)
        label = call.meeting.elementwise([label, spread], [], shape)
    return label


def _results(call: Call, label: Label) -> object:
    if not isinstance(call.out, list):
        return label
    rest = [call.meeting.axes.data(shape) if isinstance(shape, tuple) else None for shape in call.out[1:]]
    return [label, *rest]


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(call: Call) -> object:
    x = call.tensor("input")
    count = len(call.get("normalized_shape"))
    places = list(range(x.ndim - count, x.ndim))
    call.meeting.normalise(x.label, places)
    return _results(call, _affine(call, x.label, x.shape, places))


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
    "batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "_batch_norm_with_update_functional",
)
def _batch_norm(call: Call) -> object:
    """Running statistics are the neurons' own: they move with them."""
    x = call.tensor("input")
    place = 1 if x.ndim > 1 else 0
    call.meeting.normalise(x.label, [k for k in range(x.ndim) if k != place])
    return _results(call, _affine(call, x.label, x.shape, [place]))


@rule("instance_norm")
def _instance_norm(call: Call) -> object:
    x = call.tensor("input")
    call.meeting.normalise(x.label, list(range(2, x.ndim)))
    return _results(call, _affine(call, x.label, x.shape, [1]))


@rule("native_group_norm", "group_norm")
def _group_norm(call: Call) -> object:
    x = call.tensor("input")
    groups = call.get("group", call.get("num_groups"))
    axes = call.meeting.axes
    n, c = x.shape[:2]
    cut = axes.view(x.label, (n, groups, c // groups, *x.shape[2:]))
    call.meeting.normalise(cut, list(range(2, len(cut.axes))))
    return _results(call, _affine(call, x.label, x.shape, [1]))


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(call: Call) -> object:
    v, g = call.tensor("v"), call.tensor("g")
    dim = call.get("dim", 0)
    call.meeting.normalise(v.label, [k for k in range(v.ndim) if k != dim])
    label = call.meeting.elementwise([v.label, g.label], [v.shape, g.shape], v.shape)
    return [label, call.meeting.axes.data(call.out[1])] if isinstance(call.out, list) else label
