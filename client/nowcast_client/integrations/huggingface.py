"""Hugging Face Trainer: ``add_nowcast(trainer, url=..., period=...)`` before ``trainer.train()``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from nowcast_client.attaching import attach
from nowcast_client.handle import Handle
from nowcast_client.integrations.networks import network
from nowcast_client.loggers import describe, together
from nowcast_client.settings import AttachSettings, Connection

log = logging.getLogger("nowcast")


class _LossHook:
    """Hands on what a model returns; hangs on that very model while it computes a step.

    The model's owner may copy, pickle or save it there. A copy carries a hook that does nothing and needs nothing of
    ours to be loaded, and what a shallow copy computes, which shares the hook, is not the training's.
    """

    def __init__(self, model: nn.Module, take: Callable[[nn.Module, Any], None]) -> None:
        self._model = weakref.ref(model)
        self._take = take

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._model() is model:
            self._take(model, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes any three arguments and returns None


class NowcastCallback(TrainerCallback, ExportableState):
    """Attaches when training begins, acts where a step has ended, reports the loss, keeps its state in checkpoints.

    The loss is read off the model's output at every forward pass in training, so that a patch can be judged step by
    step. Where the output has none, or the model is compiled as a whole, the averages the Trainer logs are taken: log
    often enough then (a few times within the recovery window).

    Nowcast metrics go into the Trainer's own next log entry, so that no run it reports to is moved forward by them. The
    callbacks that report must come after this one for that, as `add_nowcast` sees to. Several events in one entry are
    counted by kind.

    Args:
        url: As in `nowcast_client.attach`.
        settings: Everything else `nowcast_client.attach` takes; ``total_steps`` is the Trainer's by default.

    Attributes:
        handle: The handle while training runs.
        summary: What `Handle.summary` said when the last training ended.
    """

    def __init__(self, url: str | Connection | None = None, **settings: Unpack[AttachSettings]) -> None:
        self.handle: Handle | None = None
        self.summary: dict[str, Any] = {}
        self.saved: dict[str, Any] | None = None
        self._url = url
        self._settings: AttachSettings = settings
        self._numbers: dict[str, float] = {}
        self._forward: Any = None
        self._watched = False
        self._seen_loss = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the innermost optimizer; go on from a checkpoint's state on resume."""
        if self.handle is not None:  # an earlier training was interrupted
            self.handle.close()
        model: nn.Module = kwargs["model"]
        settings: AttachSettings = {
            "total_steps": state.max_steps,
            "metrics": self._take,
            **self._settings,
            "acts": "when_told",
        }
        # A model of the library is what it is; one of the user's own may only wrap a network to return its loss.
        inner = model if hasattr(model, "config") else network(model)
        self.handle = attach(inner, kwargs["optimizer"], self._url, **settings)
        self._seen_loss = False
        saved = self._restored(state)
        if saved is not None:
            self.handle.load_state_dict(saved)
        self._watched = not args.torch_compile  # a hook inside the compiled graph would break it

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to the model while it computes this step's losses, and no longer."""
        self._deafen()
        if self.handle is not None and self._watched:
            model: nn.Module = kwargs["model"]
            self._forward = model.register_forward_hook(_LossHook(model, self._observe))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The losses of this step are known."""
        self._deafen()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a snapshot, patch, or judge: between a finished step and the next one."""
        if self.handle is None:
            return
        self.handle.act()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the nowcast metrics; take the logged loss where the model shows none."""
        if self.handle is None or logs is None:
            return
        if not self._seen_loss and "loss" in logs:
            self.handle.observe(float(logs["loss"]), step=max(0, self.handle.step - 1))
        if self._numbers:
            logs.update(self._numbers)
            if state.log_history:
                state.log_history[-1].update(self._numbers)
            self._numbers = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the evaluation's losses; those of several data sets are averaged."""
        if self.handle is not None:
            for name, value in (metrics or {}).items():
                if name.startswith("eval_") and name.endswith("_loss"):
                    self.handle.observe(value, split="validation")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach and say what was gained."""
        self._deafen()
        if self.handle is not None:
            self.handle.close()
            self.summary = self.handle.summary()
            if state.is_world_process_zero:
                log.info("%s", describe(self.summary))
            self.handle = None
        self.saved = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``; values JSON has no form for stay out of it."""
        kept = (item for item in self._settings.items() if item[0] != "api_key")
        plain = {k: v for k, v in kept if v is None or isinstance(v, str | int | float | bool)}
        url = self._url if isinstance(self._url, str) else None
        saved = self.handle.state_dict() if self.handle is not None else self.saved
        return {"args": {"url": url, **plain}, "attributes": {"saved": saved}}

    def _restored(self, state: TrainerState) -> dict[str, Any] | None:
        """The state a checkpoint was saved with, whether or not the Trainer restores callbacks from checkpoints."""
        if state.global_step == 0:
            return None
        if self.saved is not None:
            return self.saved
        # Typed as a list of callbacks; what a checkpoint holds is a dict by class name.
        kept: Any = state.stateful_callbacks
        stored = kept.get(type(self).__name__) if isinstance(kept, dict) else None
        if isinstance(stored, list):
            stored = stored[0] if stored else None
        saved = stored.get("attributes", {}).get("saved") if isinstance(stored, dict) else None
        return saved if isinstance(saved, dict) else None

    def _deafen(self) -> None:
        if self._forward is not None:
            self._forward.remove()
            self._forward = None

    def _observe(self, model: nn.Module, output: Any) -> None:
        if self.handle is None or not model.training or not torch.is_grad_enabled():
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._seen_loss = True
            self.handle.observe(loss)

    def _take(self, numbers: Mapping[str, float], step: int) -> None:
        self._numbers = together(self._numbers, {**numbers, "nowcast/step": float(step)})


def add_nowcast(
    trainer: Trainer, url: str | Connection | None = None, **settings: Unpack[AttachSettings]
) -> NowcastCallback:
    """Nowcast a Trainer's training: one line before ``trainer.train()``.

    Args:
        trainer: The Trainer.
        url: As in `nowcast_client.attach`.
        settings: Everything else `nowcast_client.attach` takes.

    Returns:
        The callback, already added.
    """
    callback = NowcastCallback(url, **settings)
    trainer.add_callback(callback)
    # First in line: what it adds to a log entry then reaches the callbacks that report it.
    line = trainer.callback_handler.callbacks
    line.insert(0, line.pop())
    return callback
