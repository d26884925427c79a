"""The network half-way between two, such as before and after refining.

What refining taught about the trainings it saw, and what was known before, mostly live on together in between (WiSE-FT,
Wortsman et al., CVPR 2022), and in one network, where an ensemble would be two.
"""

from __future__ import annotations

import json

from nowcast_proto.errors import InvalidCheckpoint
from nowcast_service.nino.checkpoint import Checkpoint


def average(before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """Average two networks weight by weight.

    Args:
        before: A network.
        after: One that was made from it: units of others would not correspond. The average takes its history over.

    Raises:
        InvalidCheckpoint: They are not of one config.
    """
    if before.config != after.config:
        raise InvalidCheckpoint(
            f"{before.source} and {after.source} are networks of different configs",
            expected="two networks of one config, the second made from the first",
            remedy="widen the narrower one first",
        )
    state = {name: (tensor + after.state[name]) / 2 for name, tensor in before.state.items()}
    metadata = {
        "average_of": json.dumps([before.digest, after.digest]),
        "start_metadata": json.dumps(dict(after.metadata), sort_keys=True),
    }
    return Checkpoint.of(before.config, state, source=f"{before.source} and {after.source}", metadata=metadata)
