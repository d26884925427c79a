"""Second copies of the weights: found, and moved along with a patch, or refused.

A moving average of the model, or the second sequence a schedule-free optimizer keeps, was made from the weights before
a patch. Left alone, an average would lag behind by the whole jump, and an optimizer would pull the weights back out of
it. Copies that are known are shifted by the change the weights got; unknown ones stop the nowcasting with a reason.
Running statistics of normalisation layers belong to the weights they were gathered under: they come back with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.network.modules import plain_name
from nowcast_client.tensors.layout import Layout, local
from nowcast_client.tensors.wrappers import Kept, alike, kept_by, lying_at

SHIFTED: dict[str, tuple[str, ...]] = {"schedulefree": ("z",), "torch.optim.asgd": ("ax",)}
"""Optimizer module -> keys of its state that follow the weights when shifted by the same change.

Schedule-free trains at y = (1 - b) z + b x ("The Road Less Scheduled", section 2): with y and z moved by d, x has moved
by d as well. ASGD's ``ax`` is an average of the weights that is read, never trained from.
"""


class Copies:
    """Every second copy of the weights that is known, and the running statistics.

    Args:
        model: The trained model.
        models: Models whose parameters follow the trained ones by name.
        optimizers: The innermost optimizers.
        layout: The trained parameters.
        outermost: Optimizers as the caller passed them, wrappers around them included.

    Raises:
        AttachError: A model lacks a trained parameter, or an optimizer already shows copies that cannot be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        layout: Layout,
        outermost: Sequence[object] = (),
    ) -> None:
        self._model = model
        self._models = list(models)
        self._optimizers = list(optimizers)
        self._outermost = list(outermost)
        self._looked: set[int] = set()
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._kept: list[tuple[Kept, Tensor]] = []
        for model in self._models:
            names = self._named(model)
            for name in sorted(layout.movable):
                parameter = layout.parameters[name]
                if name not in names or names[name].shape != parameter.shape:
                    raise AttachError(
                        f"the copy ({type(model).__name__}) has no {name!r} of shape {list(parameter.shape)}",
                        expected="a model with the trained model's parameters",
                        remedy="pass copies= only models built from this one, such as AveragedModel",
                    )
        self.check(layout)

    def with_optimizers(self, optimizers: Sequence[Optimizer], outermost: Sequence[object]) -> Copies:
        """The same models beside other optimizers."""
        fresh = Copies(self._model, (), (), Layout({}, frozenset()), outermost)
        fresh._models, fresh._optimizers = self._models, list(optimizers)
        return fresh

    def check(self, layout: Layout) -> None:
        """Look once at every optimizer's state for tensors that are the weights again.

        Raises:
            AttachError: There are some, under a key nobody told us about; or the visible weights are not the trained
                ones at the moment.
        """
        kept_by(self._outermost, layout)
        for optimizer in self._optimizers:
            # Before its first step the two modes show the same weights.
            averaged = any(group.get("train_mode") is False for group in optimizer.param_groups)
            if averaged and self._keys(optimizer) and any(optimizer.state.values()):
                raise AttachError(
                    f"{type(optimizer).__name__} is in evaluation mode, so the model shows its average",
                    expected="train mode while training",
                    remedy="call optimizer.train() before training goes on",
                )
            if id(optimizer) in self._looked or not optimizer.state:
                continue
            self._looked.add(id(optimizer))
            for key in _weights_again(optimizer, layout) - set(self._keys(optimizer)):
                raise AttachError(
                    f"{type(optimizer).__name__} keeps a second copy of the weights (state {key!r})",
                    expected="an optimizer whose only weights are the model's, or one that is known: "
                    + ", ".join(sorted(SHIFTED)),
                    remedy="a patch of the visible copy alone would be pulled back out; attach to another optimizer",
                )

    def save(self, layout: Layout) -> None:
        """Copy all copies, and the running statistics, to host memory."""
        with torch.no_grad():
            found = [copy for _, copy in self._all(layout)] + list(self._statistics())
            self._saved = [(tensor, local(tensor).to("cpu", copy=True)) for tensor in found]
            kept = kept_by(self._outermost, layout)
            self._kept = [(one, local(one.tensor).to("cpu", copy=True)) for one in kept]

    def shift(self, changes: dict[str, Tensor], layout: Layout) -> None:
        """Add what the weights got, by name, float32, on the weights' device."""
        with torch.no_grad():
            kept = [(one.name, one.tensor) for one, _ in self._kept]
            for name, copy in [*self._all(layout), *kept]:
                own = local(copy)
                own.copy_(own.float() + changes[name].to(own.device))

    def restore(self) -> None:
        """Put back what `save` found, bit for bit."""
        with torch.no_grad():
            for copy, saved in self._saved:
                local(copy).copy_(saved)
            there = lying_at(self._outermost) if self._kept else {}
            for kept, saved in self._kept:
                local(there.get(kept.where, kept.tensor)).copy_(saved)

    def __bool__(self) -> bool:
        return bool(self._models or self._kept) or any(self._keys(optimizer) for optimizer in self._optimizers)

    def _statistics(self) -> Iterator[Tensor]:
        for module in self._model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                yield from (buffer for _, buffer in module.named_buffers(recurse=False))

    @staticmethod
    def _named(model: nn.Module) -> dict[str, Tensor]:
        return {plain_name(name): p for name, p in model.named_parameters()}

    @staticmethod
    def _keys(optimizer: Optimizer) -> tuple[str, ...]:
        home = type(optimizer).__module__
        return next((keys for module, keys in SHIFTED.items() if home.startswith(module)), ())

    def _all(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """Name of the weight, and a copy of it."""
        for model in self._models:
            for name, copy in self._named(model).items():
                if name in layout.movable:
                    yield name, copy.detach()
        for optimizer in self._optimizers:
            for key in self._keys(optimizer):
                for name in sorted(layout.movable):
                    held = optimizer.state.get(layout.parameters[name], {}).get(key)
                    if isinstance(held, Tensor):
                        yield name, held


def _weights_again(optimizer: Optimizer, layout: Layout) -> set[str]:
    """Keys of an optimizer's state under which the weights themselves lie."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in sorted(layout.movable):
        parameter = layout.parameters[name]
        state = optimizer.state.get(parameter)
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                pairs.setdefault(key, []).append((value, parameter))
    with torch.no_grad():
        return {key for key, found in pairs.items() if alike(found)}
