"""Which live tensors a nowcast is about: names as the spec spells them, ties once, frozen ones apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.tensors import DTYPES
from torch import nn
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.network.modules import plain_name

WIRE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
"""Wire dtype -> torch dtype."""
WIRE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in WIRE_DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """Live parameters of one model in the order of its spec.

    Attributes:
        parameters: Name in the spec -> live parameter.
        movable: Names a patch may write: trainable and held by an attached optimizer.
    """

    parameters: dict[str, nn.Parameter]
    movable: frozenset[str]

    @property
    def numel(self) -> int:
        """Elements of all parameters together."""
        return sum(p.numel() for p in self.parameters.values())

    def same_tensors(self, other: Layout) -> bool:
        """Whether both name the same live objects."""
        return self.parameters.keys() == other.parameters.keys() and all(
            p is other.parameters[name] for name, p in self.parameters.items()
        )

    def change_to(self, other: Layout) -> str:
        """What is different in another layout of the same network, for a message."""
        shared = self.parameters.keys() & other.parameters.keys()
        if not all(self.parameters[name] is other.parameters[name] for name in shared):
            return "the model's parameters were replaced"
        joined, left = sorted(other.movable - self.movable), sorted(self.movable - other.movable)
        said = [f"{names} {what}" for names, what in ((joined, "train from now on"), (left, "train no more")) if names]
        return "; ".join(said)


def fingerprint(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[object, ...]:
    """Changes whenever `layout_of` may give something else: a cheap look at the tensors model and optimizers hold."""
    held = (id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return (*((id(p), p.dtype, p.shape, p.requires_grad) for p in model.parameters()), *held)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor this process holds: a shard of a DTensor (a view of its storage), else all of it."""
    shard = getattr(tensor, "to_local", None)
    return shard() if shard is not None else tensor


def innermost(optimizer: object) -> Optimizer:
    """The real optimizer inside wrappers that hold one as ``.optimizer`` (Accelerate, Lightning, schedulers).

    Raises:
        AttachError: There is no optimizer with step hooks inside.
    """
    seen: set[int] = set()
    current = optimizer
    while id(current) not in seen:
        seen.add(id(current))
        inner = inside(current)
        if inner is None:
            break
        current = inner
    if not isinstance(current, Optimizer) or not hasattr(current, "register_step_post_hook"):
        raise AttachError(
            f"the optimizer is a {type(current).__name__}",
            expected="a torch.optim.Optimizer, or a wrapper that holds one as .optimizer",
            remedy="pass the optimizer whose step() changes the weights",
        )
    return current


def inside(optimizer: object) -> object | None:
    """What a wrapper steps: its ``.optimizer``, or the optimizer it holds under another name (SAM, Lookahead)."""
    inner: object | None = getattr(optimizer, "optimizer", None)
    if inner is not None:
        return inner
    held = getattr(optimizer, "__dict__", {}).values()
    return next((value for value in held if isinstance(value, Optimizer)), None)


def stirring(layout: Layout, optimizers: Sequence[Optimizer]) -> Layout:
    """The layout without what is at rest: parameters of groups whose rate is zero now are not written."""
    resting = {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if not getattr(group.get("lr"), "is_cuda", False) and group.get("lr") == 0
        for p in group["params"]
    }
    movable = frozenset(name for name in layout.movable if id(layout.parameters[name]) not in resting)
    return layout if movable == layout.movable else Layout(layout.parameters, movable)


def layout_of(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    spec: ArchitectureSpec,
    *,
    sharded: bool = False,
) -> Layout:
    """Pair the spec's names with the model's live parameters.

    Args:
        model: The model as it is trained; wrappers (compile, DDP, checkpointing) may be around it.
        optimizers: The innermost optimizers that step it.
        spec: What travels.
        sharded: Also take parameters that are shards (DTensor).

    Raises:
        AttachError: A tensor of the spec is missing, has another shape, or cannot travel; or the optimizers do not
            hold the model's parameters.
    """
    live = {plain_name(name): p for name, p in model.named_parameters()}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters: dict[str, nn.Parameter] = {}
    for name, shape in spec.shapes().items():
        parameter = live.get(name)
        if parameter is None:
            raise AttachError(
                f"the spec lists {name!r}, which the model does not have",
                expected="names of model.named_parameters()",
                remedy="derive the spec from this model, or correct the name",
            )
        if tuple(parameter.shape) != shape:
            raise AttachError(
                f"parameter {name!r} has shape {list(parameter.shape)}", expected=f"shape {list(shape)} as in the spec"
            )
        if parameter.is_meta:
            raise AttachError(f"parameter {name!r} is on the meta device", remedy="attach once the weights exist")
        if not parameter.is_floating_point() or parameter.dtype not in WIRE_NAMES:
            raise AttachError(
                f"parameter {name!r} is {str(parameter.dtype).removeprefix('torch.')}",
                expected="one of " + ", ".join(WIRE_DTYPES),
                remedy="train in one of these, or leave the tensor out with spec=",
            )
        kind = type(parameter.data)
        if kind is not torch.Tensor and kind is not nn.Parameter and not (sharded and kind.__name__ == "DTensor"):
            raise AttachError(
                f"parameter {name!r} is a {type(parameter.data).__name__}",
                expected="an ordinary tensor",
                remedy="quantised parameters cannot be nowcast; sharded ones need torch.distributed to be initialised",
            )
        parameters[name] = parameter
    movable = frozenset(name for name, p in parameters.items() if p.requires_grad and id(p) in held)
    if not movable:
        raise AttachError(
            "the optimizer holds none of the model's trainable parameters",
            expected="the optimizer that was built from this model's parameters",
            remedy="if it steps float32 master copies, attach to a model and optimizer that share their tensors",
        )
    _refuse_masters(live, optimizers)
    _refuse_searches(optimizers)
    return Layout(parameters, movable)


def _refuse_masters(live: dict[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
    """A half-precision model whose optimizer steps float32 copies: a patch of the model would be overwritten."""
    own = {id(p) for p in live.values()}
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in live.values())
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    masters = sum(p.dtype == torch.float32 and id(p) not in own for group in groups for p in group["params"])
    if half and masters:
        raise AttachError(
            f"the optimizer steps {masters} float32 tensors that are not the half-precision model's own",
            expected="an optimizer that steps the model's parameters themselves",
            remedy="a patched half-precision copy would be overwritten from its float32 master at the next step",
        )


def _refuse_searches(optimizers: Sequence[Optimizer]) -> None:
    """Optimizers whose state is differences of positions: a patch would become one of them."""
    for optimizer in optimizers:
        names = [kind.__name__ for kind in type(optimizer).__mro__ if "lbfgs" in kind.__name__.lower()]
        if names or any("old_dirs" in state for state in optimizer.state.values() if isinstance(state, dict)):
            raise AttachError(
                f"{type(optimizer).__name__} builds its steps from the positions the weights have been at",
                expected="an optimizer whose state is of gradients, such as AdamW or SGD",
                remedy="a patch would be taken for a step of its own and spoil the following ones",
            )


def views(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of a layout as parts of one stretch of memory, in its order."""
    parts = torch.split(flat, [p.numel() for p in layout.parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(layout.parameters.items(), parts, strict=True)}
