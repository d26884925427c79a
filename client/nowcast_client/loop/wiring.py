"""How the network is wired, found out at its first training step: traced, proven, and only then nowcast."""

from __future__ import annotations

import logging
import time

from nowcast_proto.errors import NowcastError
from torch import nn

from nowcast_client.errors import AttachError
from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.network.capture import FirstForward
from nowcast_client.network.wired import Wired, wire

log = logging.getLogger("nowcast")

REMEDY = "pass spec=derive_spec(model, example=(args, kwargs)), table= or spec="


class Wirer:
    """Wires one network from its first forward pass with gradients, before anything of it is sent or patched.

    Args:
        model: The network, as it is trained.
        known: Its names tell a family: it is that where no forward pass is seen, or none can be traced.
        alone: No other ranks hold the same layout of tensors.
        graphless: A predictor was named, which may need no graph: the service says where it does.
        include_frozen: See `nowcast_client.network.derive.derive_spec`.
    """

    def __init__(self, model: nn.Module, *, known: bool, alone: bool, graphless: bool, include_frozen: bool) -> None:
        self._model, self._known, self._alone = model, known, alone
        self._graphless, self._include_frozen = graphless, include_frozen
        self._first = FirstForward(model)

    def close(self) -> None:
        """Nothing is wired any more."""
        self._first.forget()

    def settle(self, work: Nowcasting) -> None:
        """After an optimizer step: wire the network, if a forward pass was seen. Takes seconds once, and says so."""
        example = self._first.example
        if example is None:
            if work.snapshot_due(work.steps.step):
                work.report.once("unseen", self._unseen(), logging.INFO if self._known else logging.WARNING)
                if self._known:
                    self._open(work)
            return
        work.wirer = None
        began = time.monotonic()
        try:
            wired = wire(self._model, *example, include_frozen=self._include_frozen)
        except Exception as error:  # whatever a network of somebody else's raises: the training goes on
            log.debug("the network cannot be traced", exc_info=True)
            self._without(work, str(error))
            return
        finally:
            self.close()
        log.info("%s (%.1f s of this step, once)", wired.lines(), time.monotonic() - began)
        if wired.proof.broken:
            self._without(work, wired.proof.note)
        else:
            self._take(work, wired)

    def _take(self, work: Nowcasting, wired: Wired) -> None:
        if wired.spec != work.patcher.spec:
            try:
                self._rewire(work, wired)
            except NowcastError as error:
                work.turn_off(f"the network is wired otherwise than its names say, and cannot travel so: {error}")
                return
            work.windows.open(work.patcher.spec, work.patcher.layout)
        self._open(work)
        work.windows.proven(wired.proof.share if wired.proof.proven else None)

    def _rewire(self, work: Nowcasting, wired: Wired) -> None:
        if not self._alone and list(wired.spec.shapes()) != list(work.patcher.layout.parameters):
            raise AttachError(
                "other tensors travel than the other ranks were told",
                remedy="pass include_frozen=True, or the spec of derive_spec(model, example=(args, kwargs))",
            )
        work.patcher.rewire(wired.spec)

    def _without(self, work: Nowcasting, why: str) -> None:
        """No wiring came of the trace."""
        if self._known:
            log.warning("the network is wired by its names, unproven: %s", why)
            self._open(work)
        elif self._graphless:
            self._open(work)
        else:
            work.turn_off(f"it is not known how the network is wired: {why}; {REMEDY}")

    def _open(self, work: Nowcasting) -> None:
        if work.windows.uploader is None:
            work.windows.open(work.patcher.spec, work.patcher.layout)

    def _unseen(self) -> str:
        name = type(self._model).__name__
        seen = f"no forward pass of the attached {name} was seen (is another module called, or a compiled one?)"
        if self._known:
            return f"{seen}: it is wired by its names, unproven"
        return f"{seen}, and its names tell no family: there are no nowcasts until one is; or {REMEDY}"


def whole(model: nn.Module) -> bool:
    """Whether this process holds the weights whole; of shards no forward pass can be tried."""
    return not any(hasattr(tensor, "to_local") for tensor in model.parameters())
