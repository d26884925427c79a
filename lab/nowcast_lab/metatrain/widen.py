"""Give a trained network more hidden units without changing what it computes.

New units read everything, old ones do not read them yet: training starts from the function that was there (in the
spirit of Net2Net, Chen et al., ICLR 2016, which copies units instead).
"""

from __future__ import annotations

import dataclasses
import json

import torch
from nowcast_proto.errors import InvalidCheckpoint
from nowcast_service.nino.checkpoint import Checkpoint, expected_shapes
from nowcast_service.nino.model import NiNoTwin
from torch import Tensor

from nowcast_lab.metatrain.forward import check_trainable
from nowcast_lab.metatrain.train import basis, exported, imported

GAIN = 0.6
"""Of the maps to new units: what reads them then has gradients as large as what reads the old; at 1, five times."""


def widen(start: Checkpoint, hidden: int, *, seed: int = 0, magnify: float = 15.0) -> Checkpoint:
    """A wider network that computes the same.

    Args:
        start: A network that `train` or `refine` made.
        hidden: New width of node and edge vectors.
        seed: Of the maps to new units.
        magnify: Coordinates the network is trained in, see `basis`.

    Raises:
        InvalidCheckpoint: The network cannot be trained, or is not narrower.
    """
    check_trainable(start.config)
    old = start.config.hidden
    if hidden <= old:
        raise InvalidCheckpoint(f"{start.source} is {old} wide", expected=f"a network narrower than {hidden}")
    config = dataclasses.replace(start.config, hidden=hidden)
    change = basis(config.context, magnify, torch.device("cpu"))
    narrow = imported(start, change).state_dict()
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in expected_shapes(config).items():
        tensor = narrow[name]
        rows = _kept(tensor.shape[0], shape[0], old, hidden)
        if tensor.ndim == 1:
            state[name] = tensor.new_zeros(shape).index_copy(0, rows, tensor)
            continue
        columns = _kept(tensor.shape[1], shape[1], old, hidden)
        wide = torch.randn(shape, generator=draw) * (GAIN * shape[1] ** -0.5)
        wide[rows] = 0.0  # an old unit reads no new one, and edge types tell the new ones nothing yet
        wide[rows[:, None], columns] = tensor
        state[name] = wide
    twin = NiNoTwin(config)
    twin.load_state_dict(state)
    metadata = {"widened_from": start.digest, "start_metadata": json.dumps(dict(start.metadata), sort_keys=True)}
    return Checkpoint.of(config, exported(twin, change), source=f"{start.source}, {hidden} wide", metadata=metadata)


def _kept(before: int, now: int, old: int, hidden: int) -> Tensor:
    """Where the old units of a dimension lie in the wider one; it may hold several vectors one after another, as
    scale and shift do, or target and source."""
    if before == now:
        return torch.arange(now)
    units = torch.arange(old)
    return torch.cat([units + vector * hidden for vector in range(before // old)])
