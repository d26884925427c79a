"""Nowcasts from a running server: an evaluation then counts the wire, the queue and the engine as users meet them."""

from __future__ import annotations

import httpx
import numpy as np
import torch
from nowcast_proto.arrays import float32_of, frame_of
from nowcast_proto.errors import ErrorBody, NowcastError, Unavailable
from nowcast_proto.messages import NowcastRequest
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Encoder
from nowcast_proto.version import MEDIA_TYPE, ROUTE_NOWCAST
from nowcast_service.predictors.base import State
from pydantic import ValidationError
from torch import Tensor


class Remote:
    """``POST /nowcast`` for every nowcast. Predictors that carry a state between calls cannot be asked this way.

    Args:
        url: Address of the server.
        predictor: Predictor to ask for.
        checkpoint: Registered name, the server's default when None.
        update_scale: Factor on the displacement.
        timeout: Seconds a nowcast may take.
    """

    def __init__(
        self, url: str, predictor: str, checkpoint: str | None, *, update_scale: float = 1.0, timeout: float = 600.0
    ) -> None:
        self.identity = url
        self._client = httpx.Client(base_url=url, timeout=timeout)
        self._fields = {"predictor": predictor, "checkpoint": checkpoint, "update_scale": update_scale}

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: State
    ) -> tuple[dict[str, Tensor], State]:
        message = NowcastRequest.model_validate({"spec": spec, "k": k, **self._fields})
        frames = [
            frame_of(name, np.asarray(snapshot[name].cpu()), snapshot=number)
            for number, snapshot in enumerate(snapshots)
            for name in spec.shapes()
        ]
        encoder = Encoder(NowcastRequest.KIND, message, frames)
        headers = {"content-type": MEDIA_TYPE, "content-length": str(encoder.content_length)}
        decoder = Decoder()
        try:
            with self._client.stream("POST", ROUTE_NOWCAST, content=encoder.chunks(), headers=headers) as reply:
                if reply.status_code != 200:
                    raise _error(reply.read(), reply.status_code)
                for chunk in reply.iter_bytes():
                    decoder.feed(chunk)
        except httpx.HTTPError as exc:
            raise Unavailable(f"the server did not answer: {exc!r}", remedy="check --url") from exc
        decoder.finish()
        device = next(iter(snapshots[-1].values())).device
        return {frame.name: torch.tensor(float32_of(frame)).to(device) for frame in decoder.frames}, {}


def _error(body: bytes, status: int) -> NowcastError:
    try:
        return NowcastError.from_body(ErrorBody.model_validate_json(body))
    except ValidationError:
        return Unavailable(f"the server answered {status} with {body[:100]!r}")
