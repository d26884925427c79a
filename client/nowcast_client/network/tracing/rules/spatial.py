"""Operations along positions that treat all neurons of other axes alike: pooling, resizing, Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nowcast_client.network.tracing.labels import Label
from nowcast_client.network.tracing.rules.base import Call, Tensor, rule


def _along(call: Call, x: Tensor, places: Sequence[int], sizes: Sequence[int]) -> Label:
    """Some axes become data, of other sizes."""
    axes = call.meeting.axes
    label = call.meeting.fix(x.label, list(places), f"{call.name} runs along these neurons")
    gone = {fine for k in places for fine in label.axes[k]}
    made = axes.data(sizes)
    new = list(label.axes)
    for k, axis in zip(places, made.axes, strict=True):
        new[k] = axis
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    return axes.tidy(Label(tuple(new), (*parts, *made.parts), x.label.param))


_SPATIAL = {
    1: (
        "max_pool1d",
        "avg_pool1d",
        "adaptive_avg_pool1d",
        "upsample_nearest1d",
        "upsample_linear1d",
        "_upsample_nearest_exact1d",
        "reflection_pad1d",
        "replication_pad1d",
        "max_pool1d_with_indices",
    ),
    2: (
        "max_pool2d_with_indices",
        "max_pool2d",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "reflection_pad2d",
        "replication_pad2d",
        "_upsample_nearest_exact2d",
        "fractional_max_pool2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    ),
    3: (
        "max_pool3d_with_indices",
        "max_pool3d",
        "avg_pool3d",
        "_adaptive_avg_pool3d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool3d",
        "upsample_nearest3d",
        "upsample_trilinear3d",
        "reflection_pad3d",
        "replication_pad3d",
        "_upsample_nearest_exact3d",
    ),
}


@rule(*(name for names in _SPATIAL.values() for name in names))
def _pool(call: Call) -> Any:
    count = next(count for count, names in _SPATIAL.items() if call.name in names)
    x = call.tensor("self") if "self" in call.arguments else call.tensor("input")
    places = list(range(x.ndim - count, x.ndim))
    shape = call.shape
    label = _along(call, x, places, shape[len(shape) - count :])
    return [label for _ in call.out] if isinstance(call.out, list) else label


@rule("grid_sampler_2d", "grid_sampler_3d")
def _sample(call: Call) -> Label:
    x, grid = call.tensor("input"), call.tensor("grid")
    call.meeting.fix(grid.label, None, "positions are computed from these")
    return _along(call, x, list(range(2, x.ndim)), call.shape[2:])


@rule("im2col", "col2im")
def _columns(call: Call) -> Label:
    """(…, C, H, W) <-> (…, C * kernel, positions): kernel positions are values of the channel."""
    x = call.tensor("self")
    axes, kernel = call.meeting.axes, call.get("kernel_size")
    window = int(kernel[0]) * int(kernel[1])
    if call.name == "im2col":
        lead = x.ndim - 3
        label = call.meeting.fix(x.label, [lead + 1, lead + 2], "windows run along these neurons")
        gone = {fine for k in (lead + 1, lead + 2) for fine in label.axes[k]}
        made = axes.data((window, call.shape[-1]))
        parts = tuple(part for part in label.parts if not gone & set(part.fines))
        inside = (*label.axes[lead], *made.axes[0])
        return axes.tidy(Label((*label.axes[:lead], inside, made.axes[1]), (*parts, *made.parts), x.label.param))
    lead = x.ndim - 2
    cut = axes.view(x.label, (*x.shape[:lead], x.shape[lead] // window, window, x.shape[-1]))
    label = call.meeting.fix(cut, [lead + 1, lead + 2], "windows run along these neurons")
    gone = {fine for k in (lead + 1, lead + 2) for fine in label.axes[k]}
    made = axes.data(call.shape[-2:])
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    return Label((*label.axes[: lead + 1], *made.axes), (*parts, *made.parts), x.label.param)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fourier(call: Call) -> Label:
    x = call.tensor("self")
    places = call.axes(x, call.get("dim"))
    return _along(call, x, places, [call.shape[k] for k in places])
