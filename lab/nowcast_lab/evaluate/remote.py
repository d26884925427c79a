"""Nowcasts from a running server: an evaluation then counts the wire, the queue and the engine as users meet them."""

from __future__ import annotations

from nowcast_client import NowcastClient
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.predictors.base import State
from torch import Tensor


class Remote:
    """A one-shot call for every nowcast. Predictors that carry a state between calls cannot be asked this way.

    Args:
        url: Address of the server; its key is taken from ``NOWCAST_API_KEY``.
        predictor: Predictor to ask for.
        checkpoint: Registered name, the server's default when None.
        update_scale: Factor on the displacement.
        timeout: Seconds a nowcast may take.

    Raises:
        AttachError: The url, the key or what the environment says of the way there cannot work.
    """

    def __init__(
        self, url: str, predictor: str, checkpoint: str | None, *, update_scale: float = 1.0, timeout: float = 600.0
    ) -> None:
        self.identity = url
        self._client = NowcastClient(url)
        self._predictor, self._checkpoint = predictor, checkpoint
        self._update_scale, self._timeout = update_scale, timeout

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: State
    ) -> tuple[dict[str, Tensor], State]:
        found = self._client.nowcast(
            spec,
            snapshots,
            k,
            predictor=self._predictor,
            checkpoint=self._checkpoint,
            update_scale=self._update_scale,
            deadline=self._timeout,
        )
        device = next(iter(snapshots[-1].values())).device
        return {name: tensor.to(device) for name, tensor in found.items()}, {}
