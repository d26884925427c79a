"""Operations on each value by itself, and where tensors meet place by place."""

from __future__ import annotations

from nowcast_client.network.tracing.labels import Label
from nowcast_client.network.tracing.rules.base import Call, rule

RESIDUAL = {"add", "sub", "rsub"}


def elementwise(call: Call) -> Label:
    """Any number of tensors with broadcasting: equal places belong together."""
    tensors = call.tensors()
    call.meeting.kind = "residual" if call.name in RESIDUAL else "tie"
    if not tensors:
        return call.meeting.axes.blank(call.shape)
    label = call.meeting.elementwise([t.label for t in tensors], [t.shape for t in tensors], call.shape)
    call.meeting.kind = "tie"
    others = [t for t in tensors if not t.label.param]
    for tensor in tensors:
        if tensor.label.param and others:
            call.uses(tensor, "elementwise")
    return label


@rule(
    "native_dropout",
    "_fused_dropout",
    "bernoulli",
    "rrelu_with_noise",
    "rrelu_with_noise_functional",
    "_prelu_kernel",
    "complex",
    "polar",
    "where",
    "lift_fresh",
    "clone",
    "alias",
    "detach",
    "_to_copy",
    "to",
    "contiguous",
    "lift",
    "conj",
    "_conj",
    "_neg_view",
    "_conj_physical",
    "real",
    "imag",
    "resolve_conj",
    "resolve_neg",
    "view_as",
    "fake_quantize_per_tensor_affine",
    "convert_element_type",
    "device_put",
    "nan_to_num",
    "masked_fill",
    "masked_fill_",
    "copy",
    "dropout",
    "prelu",
    "threshold_backward",
    "tanh_backward",
    "sigmoid_backward",
    "gelu_backward",
    "silu_backward",
    "elu_backward",
    "softplus_backward",
    "hardtanh_backward",
    "leaky_relu_backward",
    "native_dropout_backward",
    "mish_backward",
    "expand_as",
)
def _pointwise(call: Call) -> object:
    label = elementwise(call)
    if isinstance(call.out, list):
        return [label for _ in call.out]
    return label


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(call: Call) -> Label:
    return elementwise(call)


@rule(
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "zeros",
    "ones",
    "full",
    "empty",
    "scalar_tensor",
    "normal_functional",
    "randn",
    "rand",
    "new_empty_strided",
    "empty_strided",
    "fill",
    "zero",
    "uniform",
    "normal",
    "randint",
    "randint_like",
    "eye",
    "arange",
    "linspace",
    "fill_",
    "zero_",
    "randperm",
    "exponential",
    "log_normal",
)
def _made(call: Call) -> Label:
    """Made of nothing: constant, or noise that treats all alike. (Known constants are judged by their values.)"""
    if call.name in ("eye", "arange", "linspace", "randperm"):
        return call.meeting.axes.data(call.shape)
    return call.meeting.axes.blank(call.shape)


@rule(
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "_assert_async",
    "_assert_scalar",
    "sym_size",
    "item",
    "_assert_tensor_metadata",
    "is_same_size",
)
def _scalar(call: Call) -> None:
    """A number for the code; what it decides is not followed, the proof sees it."""
    return


@rule("view_as_real")
def _as_real(call: Call) -> Label:
    x = call.tensor("self")
    label = call.meeting.axes.data((2,))
    return Label((*x.label.axes, *label.axes), (*x.label.parts, *label.parts), x.label.param, x.label.tag)


@rule("view_as_complex")
def _as_complex(call: Call) -> Label:
    x = call.tensor("self")
    fixed = call.meeting.fix(x.label, [x.ndim - 1], "neurons are real and imaginary parts")
    parts = tuple(part for part in fixed.parts if not set(part.fines) & set(fixed.axes[-1]))
    return Label(fixed.axes[:-1], parts, x.label.param, None)


@rule("isin", "bucketize", "searchsorted")
def _looked_up(call: Call) -> Label:
    x = call.get("elements") or call.get("self") or call.get("input")
    return x.label if hasattr(x, "label") else call.meeting.axes.data(call.shape)


@rule("glu")
def _glu(call: Call) -> Label:
    """The second half of an axis gates the first."""
    x = call.tensor("self")
    axis, half = call.axis(x, call.get("dim", -1)), call.shape[call.axis(x, call.get("dim", -1))]
    axes = call.meeting.axes
    first = axes.along(x.label, axis, lambda places: places[:half], half)
    second = axes.along(x.label, axis, lambda places: places[half:], half)
    return call.meeting.elementwise([first, second], [], call.shape)
