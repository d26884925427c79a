"""Operations that move values: views, permutations, slices, concatenations, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nowcast_client.network.tracing.atoms import NONE, Ints
from nowcast_client.network.tracing.labels import Label, Part
from nowcast_client.network.tracing.rules.base import Call, Tensor, rule, unknown


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "unsqueeze",
    "squeeze",
    "flatten",
    "unflatten",
    "ravel",
    "_reshape_copy",
    "atleast_1d",
    "atleast_2d",
    "view_of",
)
def _view(call: Call) -> Label:
    x = call.tensor("self") if "self" in call.arguments else call.tensors()[0]
    if x.label.axes == () or x.shape == call.shape:
        return replace(x.label, axes=((),) * len(call.shape)) if not x.label.fines() else x.label
    return call.meeting.axes.view(x.label, call.shape)


@rule("t", "transpose", "permute", "numpy_T", "adjoint", "mT", "movedim", "swapaxes")
def _permute(call: Call) -> Label:
    x = call.tensor("self") if "self" in call.arguments else call.tensors()[0]
    order = list(range(x.ndim))
    if call.name == "permute":
        order = [call.axis(x, k) for k in call.get("dims")]
    elif x.ndim >= 2:
        a = call.axis(x, call.get("dim0", 0))
        b = call.axis(x, call.get("dim1", 1))
        order[a], order[b] = order[b], order[a]
    return replace(x.label, axes=tuple(x.label.axes[k] for k in order))


@rule("expand")
def _expand(call: Call) -> Label:
    x = call.tensor("self")
    new = len(call.shape) - x.ndim
    axes = []
    for k, size in enumerate(call.shape):
        old = x.label.axes[k - new] if k >= new else ()
        had = x.shape[k - new] if k >= new else 1
        axes.append(old if had == size else (call.meeting.axes.new(size),))
    return replace(x.label, axes=tuple(axes))


@rule("slice")
def _slice(call: Call) -> Label:
    x = call.tensor("self")
    axis = call.axis(x, call.get("dim", 0))
    taken = slice(call.get("start"), call.get("end"), call.get("step", 1))
    return call.meeting.axes.along(x.label, axis, lambda places: places[taken], call.shape[axis])


@rule("narrow")
def _narrow(call: Call) -> Label:
    x, start, size = call.tensor("self"), call.get("start"), call.get("length")
    axis = call.axis(x, call.get("dim"))
    return call.meeting.axes.along(x.label, axis, lambda places: places[start : start + size], size)


@rule("select")
def _select(call: Call) -> Label:
    x = call.tensor("self")
    axis, index = call.axis(x, call.get("dim")), call.get("index")
    return one_of(call, x, axis, index)


def one_of(call: Call, x: Tensor, axis: int, index: int) -> Label:
    """The label of one entry of an axis, which is gone."""
    label = x.label
    if x.shape[axis] != 1:
        label = call.meeting.axes.along(label, axis, lambda places: places[[index]], 1)
    return replace(label, axes=(*label.axes[:axis], *label.axes[axis + 1 :]))


@rule("unbind")
def _unbind(call: Call) -> list[Label]:
    x = call.tensor("self")
    axis = call.axis(x, call.get("dim", 0))
    return [one_of(call, x, axis, index) for index in range(x.shape[axis])]


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "tensor_split", "unsafe_chunk")
def _split(call: Call) -> list[Label]:
    x = call.tensor("self")
    axis = call.axis(x, call.get("dim", 0))
    out, start = [], 0
    for shape in call.out:
        size = shape[axis]
        out.append(_part(call, x, axis, start, size))
        start += size
    return out


def _part(call: Call, x: Tensor, axis: int, start: int, size: int) -> Label:
    return call.meeting.axes.along(x.label, axis, lambda places: places[start : start + size], size)


@rule("cat", "concat")
def _cat(call: Call) -> Label:
    tensors = [t for t in call.get("tensors") if 0 not in t.shape]
    axis = call.axis(tensors[0], call.get("dim", 0))
    return concatenated(call, tensors, axis)


@rule("stack")
def _stack(call: Call) -> Label:
    axis = call.get("dim", 0) % len(call.shape)
    tensors = [
        replace(
            t,
            label=replace(t.label, axes=(*t.label.axes[:axis], (), *t.label.axes[axis:])),
            shape=(*t.shape[:axis], 1, *t.shape[axis:]),
        )
        for t in call.get("tensors")
    ]
    return concatenated(call, tensors, axis)


def concatenated(call: Call, tensors: list[Tensor], axis: int) -> Label:
    """Tensors behind one another along an axis; place by place along the others."""
    meeting, axes = call.meeting, call.meeting.axes
    tensors = [t for t in tensors if t.shape[axis] > 0]
    labels = [axes.single(t.label, axis) for t in tensors]
    if len(labels) == 1:
        return labels[0]
    names = meeting.aligned(
        [replace(label, axes=(*label.axes[:axis], (), *label.axes[axis + 1 :])) for label in labels]
    )
    sizes = [t.shape[axis] for t in tensors]
    joined = axes.new(sum(sizes))
    pieces: list[list[Part]] = []
    own = [label.axes[axis][0] if label.axes[axis] else None for label in labels]
    for label, fine in zip(names, own, strict=True):
        # aligned() renamed the other axes; the concatenated one keeps its number in the parts.
        pieces.append([replace(p, fines=tuple(joined if f == fine else f for f in p.fines)) for p in label.parts])
    involved = [next((p for p in parts if joined in p.fines), None) for parts in pieces]
    free = [[p for p in parts if joined not in p.fines] for parts in pieces]
    shared: set[int] = {f for p in involved if p is not None and p.kind == "grid" for f in p.fines} - {joined}
    differ = [[p for p in parts if p.kind == "grid"] for parts in free]
    if all(p is None or p.kind != "grid" for p in involved) and not shared:
        # Nothing runs over neurons along the axis; where the pieces do elsewhere, each entry may be known by its own.
        whole = _by_entry(call, free, differ, sizes, joined)
        if whole is not None:
            return axes.tidy(_assembled(names, axis, (joined,), whole, all(t.label.param for t in tensors)))
    rest: list[Part] = []
    values: list[Ints | None] = []
    order = sorted(shared)
    for number, (part, parts) in enumerate(zip(involved, free, strict=True)):
        inside = [p for p in parts if shared & set(p.fines)]
        outside = [p for p in parts if not shared & set(p.fines)]
        rest = meeting.combine(rest, outside, all(t.label.param for t in tensors[:number]), tensors[number].label.param)
        values.append(_piece(call, part, inside, order, joined, sizes[number]))
    if all(value is None for value in values):
        kinds = [part.kind if part is not None else "" for part in involved]
        new = [Part((joined,), None, "data")] if any(kinds) or len(tensors) > 1 else []
        return axes.tidy(_assembled(names, axis, (joined,), [*rest, *new], all(t.label.param for t in tensors)))
    shape = [axes.sizes[fine] for fine in order]
    grids = []
    for number, value in enumerate(values):
        if value is None:
            part = involved[number]
            constant = part is None
            made = (
                np.full(sizes[number], NONE, dtype=np.int64)
                if constant
                else meeting.ledger.new(sizes[number], "data beside neurons")
            )
            if not constant:
                meeting.ledger.fix(made, "data stand beside these neurons")
            value = np.broadcast_to(made, (*shape, sizes[number]))
        grids.append(np.broadcast_to(value, (*shape, sizes[number])))
    grid = Part((*order, joined), np.concatenate(grids, axis=-1), "grid")
    return axes.tidy(_assembled(names, axis, (joined,), [*rest, grid], all(t.label.param for t in tensors)))


def _by_entry(
    call: Call, free: list[list[Part]], differ: list[list[Part]], sizes: list[int], joined: int
) -> list[Part] | None:
    """One grid over the new axis and another, where all pieces have one grid over the same fine axes and differ."""
    meeting = call.meeting
    if any(size != 1 for size in sizes) or any(len(grids) != 1 for grids in differ):
        return None
    fines = differ[0][0].fines
    if any(set(grids[0].fines) != set(fines) for grids in differ):
        return None
    values = [grids[0].over(fines).grid for grids in differ]
    if all(np.array_equal(values[0], value) for value in values[1:]) or len(values) > 64:
        return None
    if any(meeting.ledger.is_fresh(value) for value in values):
        return None
    rest: list[Part] = []
    for parts in free:
        rest = meeting.combine(rest, [p for p in parts if p.kind != "grid"])
    return [*rest, Part((joined, *fines), np.stack(values), "grid")]


def _piece(call: Call, part: Part | None, inside: list[Part], order: list[int], joined: int, size: int) -> Ints | None:
    """Atoms of one piece over the axes its neighbours run over together."""
    meeting = call.meeting
    shape = [meeting.axes.sizes[fine] for fine in order]
    if part is None or part.kind != "grid":
        for other in inside:
            if other.kind == "grid":
                meeting.ledger.fix(other.grid, f"{call.name} puts these beside neurons of other axes")
        return None
    others = [p for p in inside if p.kind == "grid"]
    for other in others:
        meeting.ledger.fix(other.grid, f"{call.name} puts these beside neurons of other axes")
    have = [fine for fine in order if fine in part.fines]
    value = part.over([*have, joined]).grid
    value = value.reshape([*(meeting.axes.sizes[f] if f in have else 1 for f in order), size])
    return np.asarray(np.broadcast_to(value, (*shape, size)))


def _assembled(names: list[Label], axis: int, fines: tuple[int, ...], parts: list[Part], param: bool) -> Label:
    axes = [
        next((label.axes[k] for label in names if label.axes[k]), ()) if k != axis else fines
        for k in range(len(names[0].axes))
    ]
    return Label(tuple(axes), tuple(parts), param)


@rule("constant_pad_nd", "pad")
def _pad(call: Call) -> Label:
    x = call.tensor("self")
    label, pads = x.label, list(call.get("pad"))
    for k in range(len(pads) // 2):
        axis, before, after = x.ndim - 1 - k, pads[2 * k], pads[2 * k + 1]
        if before == after == 0:
            continue
        size = x.shape[axis] + before + after

        def padded(places: Ints, low: int = before, high: int = after) -> Ints:
            kept = places[max(0, -low) : len(places) - max(0, -high)]
            return np.concatenate([np.full(max(0, low), NONE), kept, np.full(max(0, high), NONE)])

        single = call.meeting.axes.single(label, axis)
        if not single.axes[axis] and x.shape[axis] == 1:
            made = call.meeting.axes.new(size)
            label = replace(single, axes=(*single.axes[:axis], (made,), *single.axes[axis + 1 :]))
            label = replace(label, parts=(*label.parts, Part((made,), None, "data")))
            continue
        if single.axes[axis] and single.part_of(single.axes[axis][0]) is None:
            made = call.meeting.axes.new(size)
            label = replace(single, axes=(*single.axes[:axis], (made,), *single.axes[axis + 1 :]))
            label = replace(label, parts=(*label.parts, Part((made,), None, "data")))
            continue
        label = call.meeting.axes.along(single, axis, padded, size)
    return label


@rule("flip", "fliplr", "flipud")
def _flip(call: Call) -> Label:
    x, label = call.tensor("self"), call.tensor("self").label
    for axis in call.axes(x, call.get("dims")):
        label = call.meeting.axes.along(label, axis, lambda places: places[::-1], x.shape[axis])
    return label


@rule("roll")
def _roll(call: Call) -> Label:
    x, label = call.tensor("self"), call.tensor("self").label
    dims = call.get("dims", [])
    if not dims:
        return label if not label.parts else _first(unknown(call))
    for shift, axis in zip(call.get("shifts"), call.axes(x, dims), strict=True):
        label = _rolled(call, label, axis, int(shift), x.shape[axis])
    return label


def _rolled(call: Call, label: Label, axis: int, by: int, size: int) -> Label:
    return call.meeting.axes.along(label, axis, lambda places: np.roll(places, by), size)


def _first(labels: Any) -> Label:
    first: Label = labels[0] if isinstance(labels, list) else labels
    return first


@rule("repeat", "tile")
def _repeat(call: Call) -> Label:
    x = call.tensor("self")
    times = list(call.get("repeats", call.get("dims")))
    axes = call.meeting.axes
    label = replace(x.label, axes=((),) * (len(times) - x.ndim) + x.label.axes)
    for axis, count in enumerate(times):
        if count > 1:
            made = axes.new(count)
            label = replace(label, axes=(*label.axes[:axis], (made, *label.axes[axis]), *label.axes[axis + 1 :]))
    return label


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Label:
    x = call.get("self")
    times = call.get("repeats")
    if not isinstance(x, Tensor) or not isinstance(times, int):
        return _first(unknown(call))
    axis = call.axis(x, call.get("dim", 0))
    made = call.meeting.axes.new(times)
    axes = x.label.axes
    return replace(x.label, axes=(*axes[:axis], (*axes[axis], made), *axes[axis + 1 :]))


@rule("slice_scatter")
def _slice_scatter(call: Call) -> Label:
    x, src = call.tensor("self"), call.tensor("src")
    axis = call.axis(x, call.get("dim", 0))
    taken = np.arange(x.shape[axis])[slice(call.get("start"), call.get("end"), call.get("step", 1))]
    return _written(call, x, src, axis, taken)


@rule("select_scatter")
def _select_scatter(call: Call) -> Label:
    x, src = call.tensor("self"), call.tensor("src")
    axis = call.axis(x, call.get("dim"))
    label = replace(src.label, axes=(*src.label.axes[:axis], (), *src.label.axes[axis:]))
    shape = (*src.shape[:axis], 1, *src.shape[axis:])
    return _written(
        call, x, replace(src, label=label, shape=shape), axis, np.array([call.get("index") % x.shape[axis]])
    )


def _written(call: Call, x: Tensor, src: Tensor, axis: int, taken: Ints) -> Label:
    """Values written over a part of an axis: pieces of the old and the new behind one another, put in order."""
    if len(taken) == x.shape[axis] and np.array_equal(taken, np.arange(len(taken))):
        return src.label
    axes = call.meeting.axes
    left = np.setdiff1d(np.arange(x.shape[axis]), taken)
    kept = axes.along(x.label, axis, lambda places: places[left], len(left))
    shape = (*x.shape[:axis], len(left), *x.shape[axis + 1 :])
    both = concatenated(call, [replace(x, label=kept, shape=shape), src], axis)
    order = np.argsort(np.concatenate([left, taken]))
    return axes.along(both, axis, lambda places: places[order], x.shape[axis])


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(call: Call) -> Label:
    x = call.tensor("self")
    axes, shape = call.meeting.axes, x.shape
    lead, (c, h, w) = list(shape[:-3]), shape[-3:]
    n = len(lead)
    first = list(range(n))
    if call.name == "pixel_shuffle":
        r = call.get("upscale_factor")
        label = axes.view(x.label, (*lead, c // r**2, r, r, h, w))
        order = [*first, n, n + 3, n + 1, n + 4, n + 2]
    elif call.name == "pixel_unshuffle":
        r = call.get("downscale_factor")
        label = axes.view(x.label, (*lead, c, h // r, r, w // r, r))
        order = [*first, n, n + 2, n + 4, n + 1, n + 3]
    else:
        groups = call.get("groups")
        label = axes.view(x.label, (*lead, groups, c // groups, h, w))
        order = [*first, n + 1, n, n + 2, n + 3]
    return axes.view(replace(label, axes=tuple(label.axes[k] for k in order)), call.shape)


@rule("unfold")
def _unfold(call: Call) -> Label:
    """Windows along an axis, which becomes data."""
    x = call.tensor("self")
    axis = call.axis(x, call.get("dimension"))
    label = call.meeting.fix(x.label, [axis], "windows run along these neurons")
    made = call.meeting.axes.data((call.shape[axis], call.shape[-1]))
    gone = set(label.axes[axis])
    parts = tuple(part for part in label.parts if not gone & set(part.fines))
    axes = (*label.axes[:axis], made.axes[0], *label.axes[axis + 1 :], made.axes[1])
    return Label(axes, (*parts, *made.parts), x.label.param)


@rule("diagonal", "diag_embed", "tril", "triu")
def _diagonal(call: Call) -> Label:
    x = call.tensor("self")
    if call.name in ("tril", "triu"):
        return call.meeting.fix(x.label, [x.ndim - 2, x.ndim - 1], f"{call.name} knows these by their place")
    a, b = call.axis(x, call.get("dim1", 0)), call.axis(x, call.get("dim2", 1))
    if call.name == "diagonal":
        label = call.meeting.fix(x.label, [a, b], "a diagonal is taken of these neurons")
        gone = {fine for k in (a, b) for fine in label.axes[k]}
        made = call.meeting.axes.data((call.shape[-1],))
        parts = tuple(part for part in label.parts if not gone & set(part.fines))
        axes = (*(axis for k, axis in enumerate(label.axes) if k not in (a, b)), *made.axes)
        return Label(axes, (*parts, *made.parts), x.label.param)
    return _first(unknown(call))
