"""Refine a network on what a nowcast is for: the loss of a training after it has recovered from the jump.

`train` teaches where weights will be. What that is worth to a training is another matter: an error along a steep
direction of the loss is gone after twenty steps, one along a flat direction stays, and the L1 distance rewards
predictions that are too short. So here the network nowcasts live trainings of small networks, and is taught by what
becomes of them in the period that follows.

Every training goes on twice from each nowcast, with the same batches: having jumped a little farther than predicted,
and a little less far. From the second half of the period come

* the mean gradient g of the training loss. The derivative of the loss after recovery with respect to the displacement
  d is nearly g, taking the recovery itself as independent of d (the first-order approximation of MAML, Finn et al.,
  2017, section 5.2). These gradients are made by the trainings anyway.
* the difference of the two losses, which says exactly, recovery included, what the length of d is worth. Where it
  contradicts g . d, the part of g along d gives way.

Lessons are noisy. An update takes several episodes, which as many processes as there are cores can give, and the
checkpoint is an average over updates (Polyak and Juditsky, 1992).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.model import NiNoTwin
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from nowcast_lab.metatrain.episodes import RefineConfig
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.forward import check_trainable
from nowcast_lab.metatrain.heldout import refuse_held_out
from nowcast_lab.metatrain.lessons import Job
from nowcast_lab.metatrain.recipes import CONTEXT, Recipe
from nowcast_lab.metatrain.teachers import teachers
from nowcast_lab.metatrain.train import STATE, basis, imported, read_state, resume, save
from nowcast_lab.metatrain.vector import learning_rate

log = logging.getLogger(__name__)


def refine(
    start: Checkpoint,
    recipe: Recipe,
    config: RefineConfig,
    out: Path,
    *,
    data: str | None = None,
    device: str = "cpu",
    workers: int = 1,
    compiled: bool = False,
    save_every: int = 20,
    on_update: Callable[[int, dict[str, float]], None] = lambda _update, _values: None,
    stop_after: int | None = None,
) -> dict[str, float]:
    """Refine a checkpoint, or go on with the refinement that `out` holds.

    Args:
        start: Where to start: a network that `train` made.
        recipe: Groups to train; episodes take them in turn, in a random order.
        config: How.
        out: Folder of the checkpoint, the state to resume from and the TensorBoard logs.
        data: Folder of the data files.
        device: ``cpu`` or ``cuda``.
        workers: Processes that train the episodes; their number does not change the result.
        compiled: See `loss_gradients`; it changes the result by rounding.
        save_every: Updates between saves.
        on_update: Called with the update and, by kind of network, what jumping farther would have done to the loss, see
            `lesson`: below zero where nowcasts are too short.
        stop_after: Stop at this update of the schedule (to be continued later).

    Returns:
        The values of the last update.

    Raises:
        InvalidRecipe: A group is held out for evaluation, or a period is no multiple of five.
        InvalidCheckpoint: The network cannot be trained.
        InvalidTrajectories: `out` holds a refinement of something else.
        Unavailable: A process that trains has died.
    """
    check_trainable(start.config)
    if any(period < CONTEXT or period % CONTEXT for period in config.periods):
        raise InvalidRecipe(f"periods {config.periods}", expected=f"multiples of {CONTEXT} steps")
    for group in recipe.groups:
        refuse_held_out(group.arch, group.source)
    where = torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    change = basis(CONTEXT, config.magnify, where)
    twin = imported(start, change).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    identity = {
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "recipe": recipe.model_dump_json(exclude_defaults=True),
        "start": start.digest,
        "start_metadata": json.dumps(dict(start.metadata), sort_keys=True),
    }
    saved = read_state(out / STATE, where, "episodes", "average")
    update, episodes = 0, cast(list[dict[str, Any] | None], [None] * config.episodes)
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    if saved is not None:
        update, episodes = resume(out / STATE, saved, twin, optimizer, identity), saved["episodes"]
        averaged.load_state_dict(saved["average"])
    values: dict[str, float] = {}
    seconds = [0.0] * config.episodes
    end = config.updates if stop_after is None else min(stop_after, config.updates)
    setup = (start.config, recipe, config, data, device, compiled)
    with SummaryWriter(str(out / "logs"), purge_step=update) as writer, teachers(workers, *setup) as teach:
        while update < end:
            for parameters in optimizer.param_groups:
                parameters["lr"] = config.lr * learning_rate("cosine", update, config.updates, config.warmup)
            optimizer.zero_grad(set_to_none=True)
            measured: dict[str, list[float]] = {}
            network = twin.state_dict()
            jobs = [Job(slot, update, network, episode) for slot, episode in enumerate(episodes)]
            # The longest first, so that the processes end together; summed up in the slots' order, whatever that was.
            order = sorted(range(len(jobs)), key=lambda slot: -seconds[slot])
            lessons = dict(zip(order, teach([jobs[slot] for slot in order]), strict=True))
            for slot, given in sorted(lessons.items()):
                episodes[slot], seconds[slot] = given.episode, given.seconds
                for parameter, gradient in zip(twin.parameters(), given.gradients, strict=True):
                    if gradient is not None:
                        share = gradient / len(jobs)
                        parameter.grad = share if parameter.grad is None else parameter.grad + share
                measured.setdefault(f"pairs/{given.kind}", []).append(given.paired)
                measured.setdefault(f"gradients/{given.kind}", []).append(given.first_order)
            norm = nn.utils.clip_grad_norm_(twin.parameters(), config.grad_clip)
            if bool(norm.isfinite()):
                optimizer.step()
                averaged.update_parameters(twin)
            else:
                log.warning("update %d is left out: its gradient is not finite", update)
            update += 1
            values = {name: sum(each) / len(each) for name, each in measured.items()}
            on_update(update, values)
            writer.add_scalar("gradient norm", float(norm), update)
            for name, number in values.items():
                writer.add_scalar(name, number, update)
            if update % save_every == 0 or update == end:
                more = {"episodes": episodes, "average": averaged.state_dict()}
                smooth = cast(NiNoTwin, averaged.module)
                save(out, update, twin, change, optimizer, identity, values, more, checkpoint_of=smooth)
    return values
