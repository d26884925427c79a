"""The predictors and checkpoints a service offers, by name."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nowcast_proto.errors import InvalidCheckpoint, NotFound
from nowcast_proto.messages import ModelInfo, PredictionFields

from nowcast_service.nino.exact.products import Precision
from nowcast_service.predictors import make_predictor, predictor_for
from nowcast_service.predictors.base import Predictor
from nowcast_service.predictors.graphs import Source
from nowcast_service.predictors.registry import entry, weightless
from nowcast_service.runtime.container import device_named
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

Key = tuple[str, str | None]
"""Predictor and checkpoint, both by name."""


@dataclass
class Catalogue:
    """The predictors and checkpoints this service offers, by name. Clients never name files.

    Args:
        device: Where networks are evaluated.
        files: Checkpoint name -> registered name or path to load it from.
        default_checkpoint: Name used when a request names none.
        default_predictor: Predictor used when a request names neither.
        threads: CPU threads of one prediction; None for PyTorch's choice.
        graphs: Where predictors have their graphs from; computed on the spot when None.
        precision: Of wide matrix products.
        memory_budget: Bytes a prediction may take beyond snapshots and answer; None for the engine's own default.
    """

    device: str = "cpu"
    files: Mapping[str, str | Path] = field(default_factory=dict)
    default_checkpoint: str | None = None
    default_predictor: str | None = None
    threads: int | None = None
    graphs: Source | None = None
    precision: Precision = "float32"
    memory_budget: int | None = None
    _made: dict[Key, Predictor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, settings: Settings, graphs: Source | None = None) -> Catalogue:
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
        device = device_named(settings.device, "NOWCAST_DEVICE")
        catalogue = cls(
            device,
            files,
            default,
            settings.predictor,
            settings.threads or None,
            graphs,
            settings.precision,
            settings.engine_memory,
        )
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
        if predictor is not None and not entry(predictor).needs_checkpoint:
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

    def loaded(self, key: Key) -> bool:
        """Whether `predictor` answers at once."""
        return key in self._made

    def resolve_default(self) -> Key:
        """What a request that names nothing means."""
        return self.resolve(PredictionFields(k=1))

    def families(self) -> tuple[str, ...]:
        """Families of architectures a graph can be built for."""
        from nowcast_service.graph.families import families

        return tuple(sorted(families()))

    def predictor(self, key: Key) -> Predictor:
        """The predictor of a key, made on first use.

        Raises:
            InvalidCheckpoint: The checkpoint is not one, or not for this predictor.
        """
        if key in self._made:  # without the lock: another one may just be loading
            return self._made[key]
        with self._lock:
            if key not in self._made:
                name, checkpoint = key
                loaded = None
                if checkpoint is not None:
                    loaded = resolve_checkpoint(self.files[checkpoint], fetch=False)
                    name = name or predictor_for(loaded)
                self._made[key] = make_predictor(
                    name,
                    loaded,
                    device=self.device,
                    threads=self.threads,
                    graphs=self.graphs,
                    precision=self.precision,
                    memory_budget=self.memory_budget,
                )
            return self._made[key]

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
        for name in weightless():
            predictor = self.predictor((name, None))
            chosen = default[0] == name or (default == (None, None) and name == "linear")
            found.append(ModelInfo(name=name, predictor=name, context=predictor.context, default=chosen))
        return tuple(found)


def checkpoint_name(path: Path) -> str:
    """The name clients call a checkpoint file by."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", path.name.removesuffix(path.suffix))[:128]
