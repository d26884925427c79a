"""NiNo: the graph network, evaluated by the exact engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from nowcast_proto.errors import InvalidCheckpoint, InvalidRequest
from torch import Tensor

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.scaling import scale_snapshots, scales_of
from nowcast_service.predictors.base import Check, State, check_count, check_finite, check_horizon, move, unasked
from nowcast_service.predictors.graphs import Graphs, Needs, Source, Uncovered, check_fit, check_positions
from nowcast_service.predictors.wnn import TYPES, EdgewiseNetwork, Progress, checked, predict_edgewise, segments

log = logging.getLogger(__name__)


class NiNo:
    """Predictor around a trained graph network.

    Args:
        checkpoint: Of a graph network.
        positions: (n_nodes, 8) positional encoding to use instead of the graph's own.
        update_scale: Factor on the update.
        uncovered: What becomes of tensors the graph does not cover.
        edgewise: Edge-wise network for them; needed for ``uncovered="edgewise"``.
        device: Where to compute; snapshots are streamed there.
        precision: Of matrix products; see `ExactEngine`.
        memory_budget: Bytes the engine may use beyond the snapshots, or None for its default.
        threads: CPU threads, or None for all.
        graphs: Where graphs and positional encodings come from; computed on the spot when None.
        reference: Use the reference twin instead of the engine.
        progress: Called with (edges done, edges in all).
        timings: Filled with seconds by phase.

    Raises:
        InvalidCheckpoint: The checkpoint is of another kind, or an edge-wise one is missing.
        InvalidRequest: The precision is not available.
    """

    name = "nino"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        positions: Tensor | None = None,
        update_scale: float = 1.0,
        uncovered: Uncovered = "left",
        edgewise: Checkpoint | None = None,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        memory_budget: int | None = None,
        threads: int | None = None,
        graphs: Source | None = None,
        reference: bool = False,
        progress: Progress | None = None,
        timings: dict[str, float] | None = None,
    ) -> None:
        from nowcast_service.nino.exact.engine import ExactEngine

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
        self._positions = positions
        self._update_scale = update_scale
        self._uncovered = uncovered
        self._edgewise = EdgewiseNetwork(edgewise, device) if uncovered == "edgewise" and edgewise else None
        if self._edgewise and self._edgewise.config.context != self.context:
            raise InvalidCheckpoint(
                f"the edge-wise checkpoint reads {self._edgewise.config.context} snapshots",
                expected=f"{self.context}, as the graph network does",
            )
        self._graphs = graphs or Graphs()
        self._graph = Needs(config.max_features, uncovered, positions=config.lpe > 0 and positions is None)
        self.needs = (self._graph, TYPES) if self._edgewise else (self._graph,)
        self._progress = progress
        self._timings = timings
        self._twin = checkpoint.twin().to(device) if reference else None
        if self._twin is None:
            extra = {} if memory_budget is None else {"memory_budget": memory_budget}
            self._engine = ExactEngine(checkpoint, device=device, precision=precision, threads=threads, **extra)
        elif precision != "float32":
            raise InvalidRequest(f"precision {precision!r} is not available for the reference twin", expected="float32")

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
            For each horizon, name -> float32 tensor of future parameters.

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
                predictions = self._by_twin(graph, history, ks, positions)
        else:
            predictions = self._engine.predict(
                graph,
                history,
                ks,
                positions=positions,
                update_scale=self._update_scale,
                progress=progress,
                timings=self._timings,
            )
        outside = [entry.parameter for entry in graph.coverage if entry.rule != "graph"]
        if outside:
            log.info("%d of %d tensors are outside the graph: %s", len(outside), len(graph.coverage), self._uncovered)
        if self._edgewise and outside:
            with self._phase("edgewise"):
                types = segments(self._graphs.prepared(history.spec, TYPES).graph)
                for k, prediction in zip(ks, predictions, strict=True):
                    chosen = {name: types[name] for name in outside}
                    prediction.update(
                        predict_edgewise(
                            self._edgewise,
                            history,
                            k,
                            chosen,
                            update_scale=self._update_scale,
                            progress=checked(check),
                        )
                    )
        names = history.spec.shapes()
        for number, prediction in enumerate(predictions):
            for name in outside:
                prediction.setdefault(name, history.newest(name).to(torch.float32, copy=True))
            check_finite(prediction, self.name)
            predictions[number] = {name: prediction[name] for name in names}
        return predictions

    def _by_twin(
        self, graph: NeuralGraph, history: History, ks: Sequence[int], positions: Tensor | None
    ) -> list[dict[str, Tensor]]:
        from nowcast_service.graph.pyg import scatter, to_pyg

        scales = scales_of(history)
        scaled = scale_snapshots(history, scales)
        data = to_pyg(graph, scaled, max_features=graph.features, positions=positions)
        device = next(self._twin.parameters()).device
        with torch.inference_mode():
            out = self._twin(data.to(device), list(ks)).cpu()  # (E, features, horizons)
        predictions = []
        for number in range(len(ks)):
            prediction = {}
            for name, future in scatter(graph, out[..., number]).items():
                scale = scales[name]
                newest = history.newest(name)
                if scale.constant:
                    prediction[name] = newest.to(torch.float32, copy=True)
                else:  # the factor belongs to the network's output, before scaling is undone
                    future = move(scaled[-1][name], future.to(newest.device), self._update_scale)
                    prediction[name] = scale.invert(future)
            predictions.append(prediction)
        return predictions

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._timings is not None:
            self._timings[name] = self._timings.get(name, 0.0) + time.perf_counter() - start
