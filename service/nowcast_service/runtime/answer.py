"""From a history to the tensors of an answer: one nowcast from start to end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from nowcast_proto.messages import CoverageReport, PredictionFields
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.tensors import TensorFrame, seal
from torch import Tensor

from nowcast_service.graph.coverage import report
from nowcast_service.history import History
from nowcast_service.predictors.base import Check, Predictor, State, moved, taken, unasked
from nowcast_service.predictors.graphs import Source, coverage
from nowcast_service.runtime.arrival import TORCH_DTYPES


@dataclass(frozen=True)
class Prediction:
    """What one nowcast yields.

    Attributes:
        frames: One per parameter, in the spec's order, digests included.
        state: What the predictor wants back at the session's next nowcast.
        compute: Seconds the predictor took.
        output: Seconds scaling, casting and digesting took.
        coverage: What the predictor did with each parameter, counted; None where it needs no graph.
    """

    frames: tuple[TensorFrame, ...]
    state: State
    compute: float
    output: float
    coverage: CoverageReport | None = None


def predict(
    predictor: Predictor,
    spec: ArchitectureSpec,
    snapshots: Sequence[Mapping[str, Tensor]],
    request: PredictionFields,
    state: State | None = None,
    *,
    graphs: Source,
    check: Check = unasked,
) -> Prediction:
    """Make one nowcast.

    Args:
        predictor: What predicts.
        spec: The architecture of the snapshots.
        snapshots: Oldest first, held to the spec and known to be finite as they arrived.
        request: Horizon, scale and form of the answer.
        state: What the predictor returned at the session's previous nowcast.
        graphs: Where the predictor has its graphs from.
        check: See `Predictor.predict`.

    Raises:
        NowcastError: Whatever the predictor raises.
    """
    began = time.perf_counter()
    history = History(spec, tuple(snapshots))
    displacement, state = predictor.predict(history, request.k, state, check=check)
    computed = time.perf_counter()
    frames = []
    for name, shape in spec.shapes().items():
        check()
        newest = history.newest(name)
        target = taken(displacement, name, newest, predictor.name)
        if request.reply == "delta":  # and so not added to anything
            newest = torch.zeros((), device=target.device)
        target = moved(newest, target, request.update_scale, name=name, who=predictor.name)
        frames.append(frame_of(name, shape, target, request.reply_dtype))
    seal(frames, torch.get_num_threads())
    output = time.perf_counter() - computed
    entries = coverage(graphs, spec, predictor.needs)
    return Prediction(tuple(frames), state, computed - began, output, report(entries, spec) if entries else None)


def frame_of(name: str, shape: tuple[int, ...], tensor: Tensor, dtype: str) -> TensorFrame:
    """A frame over a tensor's memory, cast to the wire dtype where it differs."""
    wire = tensor.to("cpu", TORCH_DTYPES[dtype]).contiguous().reshape(-1)
    return TensorFrame(name, dtype, shape, wire.view(torch.uint8).numpy().data)


PROBE = ArchitectureSpec.model_validate(
    {
        "family": "sequential",
        "parameters": [
            {"name": "0.weight", "shape": [4, 3]},
            {"name": "0.bias", "shape": [4]},
            {"name": "2.weight", "shape": [2, 4]},
            {"name": "2.bias", "shape": [2]},
        ],
    }
)


def probe(predictor: Predictor, graphs: Source, check: Check = unasked) -> Prediction:
    """A real, tiny forward pass: a network of two layers, `PROBE`, through the predictor."""
    generator = torch.Generator().manual_seed(0)
    snapshots = [
        {p.name: torch.randn(p.shape, generator=generator) for p in PROBE.parameters}
        for _ in range(predictor.context or 2)
    ]
    return predict(predictor, PROBE, snapshots, PredictionFields(k=1), graphs=graphs, check=check)
