"""The live weights: which they are, how a patch is written into them, and how it is undone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from nowcast_proto.errors import NowcastError
from nowcast_proto.spec import ArchitectureSpec
from torch import nn
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.network.modules import tensors_of
from nowcast_client.tensors.average import Average
from nowcast_client.tensors.copies import Copies
from nowcast_client.tensors.layout import Layout, fingerprint, layout_of, stirring
from nowcast_client.tensors.patch import Backup, Patch, apply
from nowcast_client.tensors.watch import Watch


class Patcher:
    """The weights of one model under its optimizers.

    Args:
        model: The network, as it is trained.
        optimizers: The innermost optimizers.
        spec: What travels.
        copies: Models whose parameters follow the trained ones.
        outermost: Optimizers as the caller passed them, wrappers around them included.
        watch: Notices what others write.
        sharded: Whether parameters may be shards of a tensor that no rank holds whole.
        average: Steps that an average of the weights reaches back; None keeps none.
        derive: Derives the spec anew, where parameters may begin to train later; None where it is the caller's own.

    Attributes:
        spec: As given; another one after parameters outside it began to train.
        layout: The live parameters.
        optimizers: As given.
        average: Of the weights; None where none is kept.

    Raises:
        AttachError: See `nowcast_client.tensors.layout.layout_of`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        spec: ArchitectureSpec,
        copies: Sequence[nn.Module],
        outermost: Sequence[object],
        watch: Watch,
        *,
        sharded: bool,
        average: int | None = None,
        derive: Callable[[], ArchitectureSpec] | None = None,
    ) -> None:
        self.spec = spec
        self.optimizers = list(optimizers)
        self.layout = layout_of(model, optimizers, spec, sharded=sharded)
        self.copies = Copies(model, copies, optimizers, self.layout, outermost)
        self.backup = Backup()
        self.watch = watch
        self.average = Average(model, average) if average is not None else None
        self._model = model
        self._sharded = sharded
        self._derive = derive
        self._fingerprint = fingerprint(model, optimizers)

    def averaged(self) -> AbstractContextManager[None]:
        """See `nowcast_client.handle.Handle.averaged`."""
        if self.average is None:
            raise AttachError(
                "no average of the weights is kept",
                expected="attach(..., average=STEPS)",
                remedy="a fiftieth of the training is a good length",
            )
        return self.average.in_place()

    def live(self) -> Layout:
        """The layout as it is now: the same object while nothing about it has changed.

        Raises:
            AttachError: As `layout_of`.
        """
        mark = fingerprint(self._model, self.optimizers)
        if mark == self._fingerprint:
            return self.layout
        spec = self._derived()
        live = layout_of(self._model, self.optimizers, spec, sharded=self._sharded)
        self._fingerprint, self.spec = mark, spec
        same = live.same_tensors(self.layout) and live.movable == self.layout.movable
        return self.layout if same else live

    def rebind(self) -> str:
        """Follow parameters that were replaced, or that began to train.

        Returns:
            What has changed; empty where they are still the same objects.

        Raises:
            AttachError: They are others altogether.
        """
        live = self.live()
        self.copies.check(live)
        if live is self.layout:
            return ""
        changed, self.layout = self.layout.change_to(live), live
        return changed

    def rewire(self, spec: ArchitectureSpec) -> None:
        """The network turned out to be wired otherwise than it was taken to be.

        Raises:
            AttachError: See `nowcast_client.tensors.layout.layout_of`.
        """
        self.layout = layout_of(self._model, self.optimizers, spec, sharded=self._sharded)
        self.spec, self._derive = spec, None

    def network(self) -> str:
        """Names and shapes of all tensors as a digest, however they are wired."""
        shapes, _, _ = tensors_of(self._model)
        return hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()

    def follow(self, optimizers: Sequence[Optimizer], outermost: Sequence[object]) -> None:
        """Go on with other optimizers of the same parameters; ``outermost`` as for the first ones.

        Raises:
            AttachError: They do not hold the model's parameters, or keep copies of them that cannot be followed.
        """
        self.layout = layout_of(self._model, optimizers, self.spec, sharded=self._sharded)
        self.copies = self.copies.with_optimizers(optimizers, outermost)
        self.optimizers = list(optimizers)
        self._fingerprint = fingerprint(self._model, optimizers)

    def save(self, *, state: bool) -> None:
        """Copy what a patch will overwrite, with ``state`` that of the optimizers too."""
        self.backup.save(self.layout, self.optimizers if state else ())
        self.copies.save(self.layout)

    def write(self, patch: Patch) -> None:
        """Write a patch, all of it or none.

        Raises:
            PatchRefused: A write failed; everything is as it was.
        """
        apply(patch, stirring(self.layout, self.optimizers), self.backup, self.copies)

    def undo(self, *, state: bool = True) -> None:
        """Put back what `save` found, bit for bit; with ``state`` the optimizers' too."""
        if state:
            self.backup.restore(self.layout)
        else:
            self.backup.restore_parameters(self.layout)
        self.copies.restore()
        if self.average is not None and state:
            self.average.restart()  # it holds weights of the nowcast that was undone

    @property
    def rate(self) -> float | None:
        """The largest learning rate of all groups; None where none is known on the host."""
        rates = [group.get("lr") for optimizer in self.optimizers for group in optimizer.param_groups]
        known = [float(rate) for rate in rates if rate is not None and not getattr(rate, "is_cuda", False)]
        return max(known) if known else None

    def _derived(self) -> ArchitectureSpec:
        if self._derive is None:
            return self.spec
        try:
            derived = self._derive()
        except NowcastError:  # what is frozen or new now leaves no network that can be wired: go on with the old one
            return self.spec
        known, found = self.spec.shapes(), derived.shapes()
        same = all(found[name] == shape for name, shape in known.items() if name in found)
        return derived if same else self.spec  # other shapes make another network
