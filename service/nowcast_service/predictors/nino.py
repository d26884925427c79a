"""NiNo: the graph network, evaluated by the exact engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from nowcast_proto.errors import InvalidCheckpoint, InvalidRequest
from torch import Tensor

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.history import History
from nowcast_service.nino.scaling import scale_snapshots, scales_of
from nowcast_service.predictors.base import Check, State, check_count, check_horizon, unasked
from nowcast_service.predictors.graphs import Graphs, Needs, check_fit, check_positions
from nowcast_service.predictors.options import Options
from nowcast_service.predictors.wnn import TYPES, EdgewiseNetwork, checked, predict_edgewise, segments

if TYPE_CHECKING:
    from nowcast_service.nino.model import NiNoTwin

log = logging.getLogger(__name__)


class NiNo:
    """Predictor around a trained graph network.

    Args:
        options: How it is made; ``progress`` is told of edges, ``edgewise`` is needed for ``uncovered="edgewise"``.

    Raises:
        InvalidCheckpoint: The checkpoint is of another kind, or an edge-wise one is missing.
        InvalidRequest: The precision is not available.
    """

    name = "nino"

    def __init__(self, options: Options) -> None:
        from nowcast_service.nino.exact.engine import DEFAULT_BUDGET, ExactEngine

        checkpoint, edgewise, uncovered = options.network, options.edgewise, options.uncovered
        if uncovered not in ("left", "edgewise"):
            raise InvalidRequest(f"uncovered={uncovered!r}", expected="left or edgewise")
        config = checkpoint.config
        if not config.gnn:
            raise InvalidCheckpoint(
                f"{checkpoint.source} is an edge-wise network (WNN+)",
                expected="a graph network",
                remedy="use predictor wnn with it",
            )
        if uncovered == "edgewise" and edgewise is None:
            raise InvalidCheckpoint(
                "tensors outside the graph are to be predicted edge-wise, but no edge-wise checkpoint is given",
                expected="the checkpoint of an edge-wise network (WNN+)",
            )
        self.config = config
        self.context = config.context
        self.farthest = config.seq_len
        self._positions = options.positions
        self._uncovered = uncovered
        self._edgewise = EdgewiseNetwork(edgewise, options.device) if uncovered == "edgewise" and edgewise else None
        if self._edgewise and self._edgewise.config.context != self.context:
            raise InvalidCheckpoint(
                f"the edge-wise checkpoint reads {self._edgewise.config.context} snapshots",
                expected=f"{self.context}, as the graph network does",
            )
        self._graphs = options.graphs or Graphs()
        self._graph = Needs(config.max_features, uncovered, positions=config.lpe > 0 and self._positions is None)
        self.needs: Sequence[Needs] = (self._graph, TYPES) if self._edgewise else (self._graph,)
        self._progress = options.progress
        self._timings = options.timings
        self._twin = checkpoint.twin().to(options.device) if options.reference else None
        if self._twin is None:
            self._engine = ExactEngine(
                checkpoint,
                device=options.device,
                precision=options.precision,
                memory_budget=options.memory_budget or DEFAULT_BUDGET,
                threads=options.threads,
            )
        elif options.precision != "float32":
            raise InvalidRequest(
                f"precision {options.precision!r} is not available for the reference twin", expected="float32"
            )

    def predict(
        self, history: History, k: int, state: State | None = None, *, check: Check = unasked
    ) -> tuple[dict[str, Tensor], State]:
        """See `Predictor.predict`."""
        return self.predict_many(history, (k,), check=check)[0], {}

    def predict_many(self, history: History, ks: Sequence[int], *, check: Check = unasked) -> list[dict[str, Tensor]]:
        """Predict at several horizons in one pass, at little more than the cost of one.

        Args:
            history: As many snapshots as the checkpoint's context.
            ks: Horizons in strides.
            check: See `Predictor.predict`.

        Returns:
            For each horizon, name -> float32 tensor of displacement from the newest snapshot.

        Raises:
            InvalidSnapshot, HorizonOutOfRange, InvalidCheckpoint, UnsupportedArchitecture, TooLarge: As named.
        """
        check_count(len(history), self.context, "the checkpoint")
        check_horizon(ks, self.config.seq_len)
        with self._phase("graph"):
            prepared = self._graphs.prepared(history.spec, self._graph)
            graph = prepared.graph
            check_fit(graph, self.config)
            if self._positions is not None:
                check_positions(self._positions, graph)
        positions = prepared.positions if self._positions is None else self._positions
        progress = checked(check, self._progress)
        if self._twin is not None:
            with self._phase("network"):
                predictions = self._by_twin(self._twin, graph, history, ks, positions)
        else:
            predictions = self._engine.predict(
                graph,
                history,
                ks,
                positions=positions,
                progress=progress,
                timings=self._timings,
            )
        outside = [entry.parameter for entry in graph.coverage if entry.rule != "graph"]
        if outside:
            log.info("%d of %d tensors are outside the graph: %s", len(outside), len(graph.coverage), self._uncovered)
        names = history.spec.shapes()
        for number, prediction in enumerate(predictions):
            for name in set(names) - set(outside):
                newest = history.newest(name)
                prediction[name].sub_(newest.to(prediction[name]))
            for name in outside:
                prediction[name] = torch.zeros_like(history.newest(name), dtype=torch.float32)
            predictions[number] = {name: prediction[name] for name in names}
        if self._edgewise and outside:
            with self._phase("edgewise"):
                types = segments(self._graphs.prepared(history.spec, TYPES).graph)
                chosen = {name: types[name] for name in outside}
                for k, prediction in zip(ks, predictions, strict=True):
                    prediction.update(predict_edgewise(self._edgewise, history, k, chosen, progress=checked(check)))
        return predictions

    def _by_twin(
        self, twin: NiNoTwin, graph: NeuralGraph, history: History, ks: Sequence[int], positions: Tensor | None
    ) -> list[dict[str, Tensor]]:
        from nowcast_service.graph.pyg import scatter, to_pyg

        scales = scales_of(history)
        scaled = scale_snapshots(history, scales)
        data = to_pyg(graph, scaled, max_features=graph.features, positions=positions)
        device = next(twin.parameters()).device
        with torch.inference_mode():
            out: Tensor = twin(data.to(device), list(ks)).cpu()  # (E, features, horizons)
        predictions = []
        for number in range(len(ks)):
            prediction = {}
            for name, future in scatter(graph, out[..., number]).items():
                scale = scales[name]
                newest = history.newest(name)
                if scale.constant:
                    prediction[name] = newest.to(torch.float32, copy=True)
                else:
                    prediction[name] = scale.invert(future.to(newest.device))
            predictions.append(prediction)
        return predictions

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._timings is not None:
            self._timings[name] = self._timings.get(name, 0.0) + time.perf_counter() - start
