"""From a history to the tensors of an answer: one nowcast from start to end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nowcast_proto.messages import CoverageReport, OutsideGraph, PredictionFields
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.tensors import TensorFrame, seal
from torch import Tensor

from nowcast_service.history import History
from nowcast_service.predictors.base import Predictor, State, move
from nowcast_service.runtime.arrival import TORCH_DTYPES

SHOWN_OUTSIDE = 32
"""Parameters outside the graph that a reply names; the others are counted."""


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
    snapshots: list[Mapping[str, Tensor]],
    request: PredictionFields,
    state: State | None = None,
) -> Prediction:
    """Make one nowcast.

    Args:
        predictor: What predicts.
        spec: The architecture of the snapshots.
        snapshots: Oldest first, already known to be finite.
        request: Horizon, scale and form of the answer.
        state: What the predictor returned at the session's previous nowcast.

    Raises:
        NowcastError: Whatever the predictor raises.
    """
    began = time.perf_counter()
    history = History.of(spec, snapshots, check_finite=False)
    parameters, state = predictor.predict(history, request.k, state)
    computed = time.perf_counter()
    frames = []
    for name, shape in spec.shapes().items():
        newest = history.newest(name)
        # Taken out of the mapping, so that float32 originals go as their casts come.
        target = move(newest, parameters.pop(name), request.update_scale)
        if request.reply == "delta":
            target = target - newest.to(target)
        frames.append(frame_of(name, shape, target, request.reply_dtype))
    seal(frames, torch.get_num_threads())
    output = time.perf_counter() - computed
    return Prediction(tuple(frames), state, computed - began, output, coverage_report(predictor, spec))


def coverage_report(predictor: Predictor, spec: ArchitectureSpec) -> CoverageReport | None:
    """What a predictor does with each parameter, counted; None where it needs no graph."""
    entries = predictor.coverage(spec)
    if not entries:
        return None
    sizes = {parameter.name: parameter.numel for parameter in spec.parameters}
    elements: Counter[str] = Counter()
    for entry in entries:
        elements[entry.rule] += sizes[entry.parameter]
    outside = [entry for entry in entries if entry.rule != "graph"]
    return CoverageReport(
        parameters=Counter(entry.rule for entry in entries),
        elements=elements,
        outside=tuple(
            OutsideGraph(parameter=entry.parameter, rule=entry.rule, reason=entry.reason)
            for entry in outside[:SHOWN_OUTSIDE]
        ),
    )


def frame_of(name: str, shape: tuple[int, ...], tensor: Tensor, dtype: str) -> TensorFrame:
    """A frame over a tensor's memory, cast to the wire dtype where it differs."""
    wire = tensor.to("cpu", TORCH_DTYPES[dtype]).contiguous().reshape(-1)
    return TensorFrame(name, dtype, shape, memoryview(wire.view(torch.uint8).numpy()))


def probe(predictor: Predictor) -> Any:
    """A real, tiny forward pass: a network of two layers through the predictor."""
    spec = ArchitectureSpec.model_validate(
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
    generator = torch.Generator().manual_seed(0)
    snapshots = [
        {p.name: torch.randn(p.shape, generator=generator) for p in spec.parameters}
        for _ in range(predictor.context or 2)
    ]
    return predict(predictor, spec, snapshots, PredictionFields(k=1))
