"""A live network as a function of a copy of its weights, on inputs as small and in numbers as exact as it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nowcast_client.network.tracing.recording import outputs_of
from nowcast_client.network.tracing.restoring import seed_anew

EXACT = 1e-8
"""Relative change of the outputs that is rounding, in float64."""
MIXED = 2e-6
"""The same where the network computes something in float32 whatever its weights are."""
SINGLE = 2e-4
"""The same where the network refuses float64."""
TOKENS = 16
"""Whole-number inputs longer than this are cut for the proof, where the network takes them shorter."""
SAMPLES = 2
"""Samples of a batch that the proof uses, where the network takes fewer."""


class Network:
    """A live network as a function of a copy of its weights.

    Args:
        model: The network; neither its weights nor anything else of it is changed.
        args: Positional inputs.
        kwargs: Keyword inputs.
        dtype: Of the copy.
        seed: Of the values that tensors get which are zero or all alike.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype | None, seed: int = 0
    ) -> None:
        self._model, self._dtype = model, dtype
        devices = {parameter.device for parameter in model.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None  # wrappers take inputs from elsewhere
        self._args, self._kwargs = self._cast((tuple(args), dict(kwargs)))
        self.forwards = 0
        self.reference: list[Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            copy = self._cast(parameter.detach()).clone(memory_format=torch.contiguous_format)
            if (
                copy.is_floating_point()
                and bool((copy == copy.reshape(-1)[0]).all())
                and (copy.numel() > 1 or not copy.any())
            ):
                noise = torch.randn(copy.shape, generator=generator, dtype=torch.float64)
                copy += 0.3 * noise.to(copy)
            self.tensors[name] = copy
        self._buffers = {name: self._cast(buffer.detach()) for name, buffer in model.named_buffers()}
        for path, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                prefix = f"{path}." if path else ""
                self._buffers[f"{prefix}running_mean"] = torch.zeros_like(self._buffers[f"{prefix}running_mean"])
                self._buffers[f"{prefix}running_var"] = torch.ones_like(self._buffers[f"{prefix}running_var"])

    def _cast(self, value: Any) -> Any:
        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach() if self._device is None else leaf.detach().to(self._device)
            return leaf.to(self._dtype) if leaf.is_floating_point() and self._dtype is not None else leaf

        return tree_map(cast, value)

    def outputs(self, *, gradients: bool = False) -> list[Tensor]:
        """The floating outputs with the weights as they are now."""
        self.forwards += 1
        devices = sorted({tensor.get_device() for tensor in self.tensors.values() if tensor.is_cuda})
        with (
            torch.set_grad_enabled(gradients),
            sdpa_kernel(SDPBackend.MATH),
            _EvenNoise(),  # type: ignore[no-untyped-call]
        ):
            seed_anew(devices)
            buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
            given = functional_call(self._model, {**self.tensors, **buffers}, self._args, self._kwargs)
        found = outputs_of(given)
        if not found or not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            raise ValueError("it gives no floating output" if not found else "its outputs are not finite")
        return found if gradients else [tensor.detach().clone() for tensor in found]


def ready(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], elements: int, max_copy: int
) -> tuple[Network, float, str]:
    """The network on inputs as small as it takes, in the highest precision it takes, and what is rounding then."""
    wide = 8 * elements <= max_copy
    tried: Exception | None = None
    for dtype in ([torch.float64] if wide else []) + [None]:
        for inputs in _smaller(args, kwargs):
            network = None
            try:
                network = Network(model, *inputs, dtype)
                network.reference = network.outputs()
                again, exact = _again(network)
                if change_of(again, network.reference) > 0:
                    raise ValueError("its outputs are not the same twice")
                if dtype is None:
                    return network, SINGLE, "in the network's own precision"
                return network, EXACT if exact else MIXED, "in float64"
            except Exception as error:  # whatever a forward of somebody else's raises on other sizes or types
                tried = error
                del network
    raise tried if tried is not None else ValueError("no inputs")


class _EvenNoise(TorchDispatchMode):
    """Noise that is the same for all neurons of a sample, and nothing dropped: a draw that no permutation sees.

    Drawn neuron by neuron and held fixed it would tell neurons apart that are alike. Noise of given means or chances is
    as drawn.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(out[1])
        if name == "bernoulli" and func._schema.overload_name in ("p", "float"):
            even = torch.ones_like(out)
        elif name in _NOISE and not _by_means(func) and isinstance(out, Tensor) and out.numel():
            first = out.flatten(1)[:, 0] if out.dim() > 1 else out.reshape(-1)[0]
            even = first.reshape(-1, *[1] * (out.dim() - 1)).expand(out.shape) if out.dim() else out
        else:
            return out
        return out.copy_(even.clone()) if func._schema.is_mutable else even.clone()


def _by_means(func: Any) -> bool:
    """Whether each element is drawn from a distribution of its own (``normal(means, …)``)."""
    return bool(func._schema.name == "aten::normal" and func._schema.overload_name != "float_float")


_NOISE = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "uniform", "normal", "exponential", "log_normal", "normal_functional"}
)
"""Operations that draw for every element alike."""


class _Narrow(TorchDispatchMode):
    """Sees whether a forward in float64 computes anything in less."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.found = True
        return out


def _again(network: Network) -> tuple[list[Tensor], bool]:
    """The outputs once more, and whether the network computed in float64 throughout."""
    with _Narrow() as mode:  # type: ignore[no-untyped-call]
        outputs = network.outputs()
    return outputs, not mode.found


def _smaller(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
    """Inputs with fewer samples and tokens where that can be, then as they are."""
    tensors: list[Tensor] = []
    tree_map(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (tuple(args), dict(kwargs)))
    leading = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    whole = [tensor for tensor in tensors if tensor.dim() > 1 and not tensor.is_floating_point()]
    lengths = {tensor.shape[1] for tensor in whole}
    alone = len(leading) == 1 and next(iter(leading)) > SAMPLES and all(tensor.dim() for tensor in tensors)
    long = len(lengths) == 1 and next(iter(lengths)) > TOKENS and len(whole) == len(tensors)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf = leaf[:SAMPLES] if alone else leaf
            return leaf[:, :TOKENS] if long else leaf
        return leaf

    if alone or long:
        yield tree_map(cut, tuple(args)), tree_map(cut, dict(kwargs))
    yield args, kwargs


def change_of(new: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """Largest change of an output, relative to the largest element of that output."""
    if len(new) != len(old) or any(a.shape != b.shape for a, b in zip(new, old, strict=True)):
        return float("inf")
    return max(
        (
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            for a, b in zip(new, old, strict=True)
            if a.numel()
        ),
        default=0.0,
    )
