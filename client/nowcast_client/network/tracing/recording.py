"""One forward pass as a list of aten operations.

The pass runs without gradients, on fake tensors where the network allows (nothing is computed and no memory is
taken), else for real. Mutations and views are taken out by `torch.func.functionalize`. Values that depend on nothing
but constants of the code, buffers and whole-number inputs are computed all the same: they tell neurons apart, or not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call, functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from nowcast_client.network.tracing.restoring import untouched

log = logging.getLogger("nowcast")

MAX_CONSTANT = 1 << 22
"""Elements of a constant that is computed; larger ones count as data."""
MAX_OPERATIONS = 200_000
"""Operations of one forward pass that are recorded."""


class TooLong(Exception):
    """The forward pass has more operations than are recorded."""


@dataclass(frozen=True)
class Ref:
    """A tensor in the arguments of an operation: the number of its value."""

    value: int


@dataclass
class Value:
    """A tensor of the pass.

    Attributes:
        shape: Its sizes.
        constant: What it holds, where that depends on no parameter and no floating input.
        given: It depends on whole-number inputs.
        name: Parameter or buffer it is.
        kind: ``parameter``, ``buffer``, ``input`` or empty.
    """

    shape: tuple[int, ...]
    constant: Tensor | None = None
    given: bool = False
    name: str = ""
    kind: str = ""


@dataclass
class Operation:
    """One call: its arguments hold a `Ref` for every tensor, its results value numbers."""

    name: str
    func: Any
    arguments: dict[str, Any]
    results: Any
    pointwise: bool


@dataclass
class Recording:
    """All of one pass.

    Attributes:
        values: By number.
        operations: In order.
        outputs: Values that the network gave out.
        parameters: Value of each parameter.
        faked: It ran on fake tensors.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    faked: bool = True


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self._numbers: Any = WeakTensorKeyDictionary()
        self._kept: list[Tensor] = []

    def number(self, tensor: Tensor) -> int:
        found = self._numbers.get(tensor)
        if found is None:
            constant = None
            if tensor.numel() <= MAX_CONSTANT and not _is_fake(tensor) and not tensor.is_meta:
                with unset_fake_temporarily():
                    constant = tensor.detach()
            found = self.add(tensor, Value(tuple(tensor.shape), constant))
        return int(found)

    def add(self, tensor: Tensor, value: Value) -> int:
        self.recording.values.append(value)
        number = len(self.recording.values) - 1
        self._numbers[tensor] = number
        if self.recording.faked:
            self._kept.append(tensor)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removeprefix("prims::")
        if func._schema.name.startswith("prim::"):
            return func(*args, **kwargs)
        refs: list[int] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                refs.append(self.number(leaf))
                return Ref(refs[-1])
            return leaf

        noted_args, noted_kwargs = tree_map(note, args), tree_map(note, kwargs)
        constant, given = self._constant(func, refs, noted_args, noted_kwargs)
        if constant is not None and constant is not _ITSELF and not _has_tensor(constant):
            return constant
        out = func(*args, **kwargs)
        constant = out if constant is _ITSELF else constant
        if len(self.recording.operations) >= MAX_OPERATIONS:
            raise TooLong
        arguments = dict(zip((a.name for a in func._schema.arguments), noted_args, strict=False)) | noted_kwargs
        constants = iter(_leaves(constant)) if constant is not None else None

        def result(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            held = next(constants) if constants is not None else None
            if held is not None and held.numel() > MAX_CONSTANT:
                held = None
            return self.add(leaf, Value(tuple(leaf.shape), held, given))

        results = tree_map(result, out)
        pointwise = torch.Tag.pointwise in func.tags
        self.recording.operations.append(Operation(name, func, arguments, results, pointwise))
        return out

    def _constant(self, func: Any, refs: Sequence[int], args: Any, kwargs: Any) -> tuple[Any, bool]:
        """The result, where it depends on constants alone, and whether inputs of whole numbers are among them."""
        values = [self.recording.values[number] for number in refs]
        given = any(value.given for value in values)
        if any(value.constant is None for value in values) or torch.Tag.nondeterministic_seeded in func.tags:
            return None, given
        if sum(_product(value.shape) for value in values) > 4 * MAX_CONSTANT:
            return None, given

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                constant = self.recording.values[leaf.value].constant
                return constant.clone() if constant is not None and func._schema.is_mutable else constant
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return leaf

        if not self.recording.faked:
            return _ITSELF, given
        try:
            with unset_fake_temporarily():
                return func(*tree_map(real, args), **tree_map(real, kwargs)), given
        except Exception as error:  # a kernel of somebody else's: the value is then unknown, nothing worse
            log.debug("constant of %s: %s", func, error)
            return None, given


_ITSELF: list[Tensor] = []
"""Stands for the result of the operation, where that is real."""


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, Tensor):
        yield value


def _product(shape: Sequence[int]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention, recurrent layers and transformer layers as the operations they are made of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # This one flag alone: `torch.backends.mkldnn.flags` sets another one too, and warns of it.
    onednn = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        with (
            torch.backends.cudnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=onednn)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What fake tensors log of a kernel they cannot run is no error here: the pass is then run for real."""
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        noisy.setLevel(level)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout and with running statistics, for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def outputs_of(given: Any) -> list[Tensor]:
    """The floating tensors that a network answers with.

    Of a mapping with logits or a loss only these: states of a network's inside, given out beside its answer, move with
    its neurons. Objects that are no tensors, sequences or mappings (caches) are passed over.
    """
    if isinstance(given, Tensor):
        return [given] if given.is_floating_point() or given.is_complex() else []
    if isinstance(given, Mapping):
        named = [value for key, value in given.items() if str(key) == "loss" or str(key).startswith("logits")]
        return [tensor for value in (named or list(given.values())) for tensor in outputs_of(value)]
    if isinstance(given, list | tuple):
        return [tensor for value in given for tensor in outputs_of(value)]
    if hasattr(given, "__dataclass_fields__"):
        return outputs_of(vars(given))
    return []


def record(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, fake: bool, functional: bool = True
) -> Recording:
    """Run one forward pass and write down its operations.

    Args:
        model: The network, without wrappers.
        args: Positional inputs.
        kwargs: Keyword inputs.
        fake: On fake tensors of the same shapes, on the CPU.
        functional: Take out mutations and views.
    """
    recording = Recording(faked=fake)
    recorder = _Recorder(recording)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    device = torch.device("cpu") if fake else None

    def tensor(value: Tensor) -> Tensor:
        if mode is None:
            return value.detach()
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=device)

    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameters[name] = tensor(parameter)
        recording.parameters[name] = recorder.add(
            parameters[name], Value(tuple(parameter.shape), None, name=name, kind="parameter")
        )
    for name, buffer in model.named_buffers():
        held = None if buffer.is_meta or buffer.numel() > MAX_CONSTANT else buffer.detach().cpu()
        parameters[name] = tensor(buffer) if fake else buffer.detach().clone()
        recorder.add(parameters[name], Value(tuple(buffer.shape), held, name=name, kind="buffer"))

    def given(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        inside = tensor(leaf)
        whole = not (leaf.is_floating_point() or leaf.is_complex())
        held = leaf.detach().cpu() if whole and not leaf.is_meta and leaf.numel() <= MAX_CONSTANT else None
        recorder.add(inside, Value(tuple(leaf.shape), held, given=True, kind="input"))
        return inside

    inputs: tuple[Any, Any] = tree_map(given, (tuple(args), dict(kwargs)))

    def forward(weights: dict[str, Tensor], inner: tuple[Any, Any]) -> list[Tensor]:
        return outputs_of(functional_call(model, weights, inner[0], inner[1]))

    run: Callable[..., list[Tensor]] = functionalize(forward, remove="mutations_and_views") if functional else forward
    with (
        torch.no_grad(),
        untouched(model),
        plain_kernels(),
        evaluating(model),
        _quiet(),
        contextlib.ExitStack() as stack,
    ):
        if mode is not None:
            stack.enter_context(mode)
        stack.enter_context(recorder)
        outputs = run(parameters, inputs)
    recording.outputs = [recorder.number(output) for output in outputs]
    return recording
