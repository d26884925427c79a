"""From a history to the tensors of an answer: which predictors there are, and one nowcast from start to end."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nowcast_proto.errors import InvalidCheckpoint, InvalidRequest, NotFound, NowcastError
from nowcast_proto.messages import CoverageReport, ModelInfo, OutsideGraph, PredictionFields
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.tensors import TensorFrame, seal
from torch import Tensor

from nowcast_service.history import History
from nowcast_service.predictors import BASELINES, NAMES, make_predictor, predictor_for
from nowcast_service.predictors.base import Predictor, State, move
from nowcast_service.runtime.sessions import TORCH_DTYPES, Key
from nowcast_service.settings import Settings
from nowcast_service.weights.registry import (
    DEFAULT,
    PUBLISHED,
    SHIPPED,
    cached_path,
    names,
    pull,
    resolve_checkpoint,
    shipped_path,
)

log = logging.getLogger(__name__)
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


@dataclass
class Catalogue:
    """The predictors and checkpoints this service offers, by name. Clients never name files.

    Args:
        device: Where networks are evaluated.
        files: Checkpoint name -> registered name or path to load it from.
        default_checkpoint: Name used when a request names none.
        default_predictor: Predictor used when a request names neither.
        threads: CPU threads of one prediction; None for PyTorch's choice.
    """

    device: str = "cpu"
    files: Mapping[str, str | Path] = field(default_factory=dict)
    default_checkpoint: str | None = None
    default_predictor: str | None = None
    threads: int | None = None
    _made: dict[Key, Predictor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """The shipped checkpoints, those fetched before, and the one the settings name, which is loaded to see it fits.

        Raises:
            NowcastError: The settings' checkpoint or predictor cannot be used.
        """
        files: dict[str, str | Path] = {name: name for name in SHIPPED if shipped_path(name).exists()}
        files |= {name: name for name in PUBLISHED if cached_path(name).exists()}
        default = DEFAULT if DEFAULT in files else None
        if settings.checkpoint is not None:
            if settings.checkpoint in names():
                default = settings.checkpoint
                if default in PUBLISHED and default not in files:
                    pull(default)
                files[default] = default
            else:
                path = Path(settings.checkpoint)
                default = checkpoint_name(path)
                files[default] = path
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        catalogue = cls(device, files, default, settings.predictor, settings.threads or None)
        catalogue.predictor(catalogue.resolve_default())
        return catalogue

    def resolve(self, request: PredictionFields) -> Key:
        """The predictor and checkpoint a request means; loads nothing.

        Raises:
            InvalidRequest: No such predictor.
            NotFound: No such checkpoint.
            InvalidCheckpoint: The predictor needs a checkpoint and there is none.
        """
        predictor = request.predictor
        if predictor is None and request.checkpoint is None:
            predictor = self.default_predictor
        if predictor is not None and predictor not in NAMES:
            raise InvalidRequest(f"predictor {predictor!r} is not known", expected="one of " + ", ".join(NAMES))
        if predictor in BASELINES:
            return predictor, None
        checkpoint = request.checkpoint or self.default_checkpoint
        if checkpoint is None:
            if predictor is None:
                return "linear", None
            raise InvalidCheckpoint(
                f"predictor {predictor!r} needs a checkpoint and this service has no default one",
                remedy="name one of /v1/models, or start the service with NOWCAST_CHECKPOINT",
            )
        if checkpoint not in self.files:
            raise NotFound(
                f"there is no checkpoint {checkpoint[:80]!r} here",
                expected="one of " + (", ".join(sorted(self.files)) or "none"),
                remedy="see /v1/models",
            )
        return predictor or "", checkpoint

    def resolve_default(self) -> Key:
        """What a request that names nothing means."""
        return self.resolve(PredictionFields(k=1))

    def families(self) -> tuple[str, ...]:
        """Families of architectures a graph can be built for."""
        from nowcast_service.graph.families import FAMILIES

        return tuple(sorted({*FAMILIES, "sequential"}))

    def predictor(self, key: Key) -> Predictor:
        """The predictor of a key, made on first use.

        Raises:
            InvalidCheckpoint: The checkpoint is not one, or not for this predictor.
        """
        with self._lock:
            if key not in self._made:
                name, checkpoint = key
                loaded = None
                if checkpoint is not None:
                    loaded = resolve_checkpoint(self.files[checkpoint], fetch=False)
                    name = name or predictor_for(loaded)
                self._made[key] = make_predictor(name, loaded, device=self.device, threads=self.threads)
            return self._made[key]

    def coverage(self, request: PredictionFields, spec: ArchitectureSpec) -> CoverageReport | None:
        """What the predictor a request means will do with each parameter; None where that cannot be said."""
        try:
            return coverage_report(self.predictor(self.resolve(request)), spec)
        except NowcastError as exc:
            log.debug("no coverage of a %s: %s", spec.family, exc)
            return None

    def models(self) -> tuple[ModelInfo, ...]:
        """Everything a request may name."""
        default = (self.default_predictor, self.default_checkpoint)
        found = []
        for name in sorted(self.files):
            predictor = self.predictor(("", name))
            found.append(
                ModelInfo(
                    name=name,
                    predictor=predictor.name,
                    context=predictor.context,
                    checkpoint=name,
                    default=name == default[1] and default[0] in (None, predictor.name),
                )
            )
        for name in BASELINES:
            predictor = self.predictor((name, None))
            chosen = default[0] == name or (default == (None, None) and name == "linear")
            found.append(ModelInfo(name=name, predictor=name, context=predictor.context, default=chosen))
        return tuple(found)


def checkpoint_name(path: Path) -> str:
    """The name clients call a checkpoint file by."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", path.name.removesuffix(path.suffix))[:128]


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
