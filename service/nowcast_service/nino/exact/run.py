"""One prediction of the exact engine: the passes over a graph, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from nowcast_proto.errors import InvalidRequest
from torch import Tensor

from nowcast_service.graph.blocks import NeuralGraph, View
from nowcast_service.history import History
from nowcast_service.nino.exact.dense import Dense
from nowcast_service.nino.exact.listed import Listed, add_rows
from nowcast_service.nino.exact.network import Network
from nowcast_service.nino.exact.plan import Plan, spans
from nowcast_service.nino.exact.stream import Reader, Writer
from nowcast_service.nino.exact.weights import Convolution
from nowcast_service.nino.exact.workers import Workers
from nowcast_service.nino.scaling import scale_of

_NODE_ROWS = 4096

Progress = Callable[[int, int], None]


class Run:
    """One prediction: the passes over the graph, and the buffers they share."""

    def __init__(
        self,
        network: Network,
        graph: NeuralGraph,
        history: History,
        plan: Plan,
        ks: tuple[int, ...],
        workers: Workers,
        progress: Progress | None,
        timings: dict[str, float],
    ) -> None:
        self.network = network
        self.graph = graph
        self.history = history
        self.plan = plan
        self.ks = ks
        self.workers = workers
        self.timings = timings
        self._progress = progress
        self._done = 0
        self._total = graph.n_edges * (1 + len(network.weights.convolutions))
        self.degree = graph.in_degree.to(network.device).clamp(min=1)[:, None]  # (N, 1)
        self.x: list[Tensor] = []  # node vectors after each convolution, (N, d)

    def predict(self, positions: Tensor | None, update_scale: float) -> list[dict[str, Tensor]]:
        with self._phase("scale"):
            names = sorted({view.parameter for _, view in self.graph.weighted()})
            scales = {name: scale_of(self.history.flat(name)) for name in names}
            reader = Reader(self.history, scales, self.network.device)
        with self._phase("nodes"):
            self.dense = Dense(self.network, self.plan, reader, self.x)
            self.groups = [Listed(self.network, blocks, reader, self.x) for blocks in self.plan.groups]
            x = self._node_inputs(positions)
        for number, conv in enumerate(self.network.weights.convolutions):
            with self._phase(f"convolution {number + 1}"):
                x = self._convolve(number, conv, x)
                self.x.append(x)
        del x
        with self._phase("output"):
            results = [
                {name: self.history.newest(name).to(torch.float32, copy=True) for name in self.graph.spec.shapes()}
                for _ in self.ks
            ]
            writer = Writer(results, scales, residual=self.network.config.residual, update_scale=update_scale)
            self._output(writer)
            writer.finish()
        return results

    def _node_inputs(self, positions: Tensor | None) -> Tensor:
        """(N, d) node vectors before the first convolution."""
        n, d = self.graph.n_nodes, self.network.config.hidden
        x = torch.zeros(n, d, device=self.network.device)
        if self.network.weights.nodes:
            with self._phase("positions"):
                positions = _positions(self.graph) if positions is None else positions
            if positions.ndim != 2 or positions.shape[0] != n or positions.shape[1] < self.network.config.lpe:
                raise InvalidRequest(
                    f"positions have shape {list(positions.shape)}",
                    expected=f"[{n}, {max(8, self.network.config.lpe)}]",
                )
            for a, b in spans(n, _NODE_ROWS):
                part = positions[a:b, : self.network.config.lpe].to(self.network.device, torch.float32)
                for number, (weight, bias) in enumerate(self.network.weights.nodes):
                    if number:
                        self.network.activate(part)
                    part = torch.addmm(bias, part, weight)
                x[a:b] = part
        if self.network.weights.tokens is not None:
            table, end = self.network.weights.tokens, 0
            for first, rows in self.graph.vocabularies:
                x[end:first] += table[0]
                end = first + rows
                x[first:end] += table[1 : rows + 1]
            x[end:] += table[0]
        return x

    def _convolve(self, number: int, conv: Convolution, x: Tensor) -> Tensor:
        """Node vectors after one convolution and the activation that follows it."""
        total = torch.zeros_like(x)

        def dense() -> Iterator[Callable[[], tuple[int, slice, Tensor]]]:
            for block in self.plan.dense:
                for region in self.plan.regions(block):
                    yield partial(self.dense.messages, block, region, number, x)

        def listed() -> Iterator[Callable[[], tuple[int, Tensor, Tensor]]]:
            for group in self.groups:
                for a, b in spans(len(group.source), self._listed_rows):
                    yield partial(group.messages, a, b, conv, x)

        # Results come in the order of the tasks, whoever is done first: the sums do not depend on luck.
        for edges, targets, messages in self.workers.run(dense()):
            total[targets] += messages
            self._advance(edges)
        for edges, index, messages in self.workers.run(listed()):
            add_rows(total, index, messages)
            self._advance(edges)
        for a, b in spans(len(x), _NODE_ROWS):
            mean = total[a:b].div_(self.degree[a:b])
            new = torch.addmm(conv.const, x[a:b], conv.keep).addmm_(mean, conv.mean)
            self.network.activate(new)
            total[a:b] = new
        return total

    def _output_listed(self, listed: Listed, writer: Writer, out_w: Tensor, out_b: Tensor) -> None:
        y = torch.empty(len(listed.source), out_w.shape[1], device=self.network.device)

        def rows(a: int, b: int) -> int:
            torch.addmm(out_b, listed.climb(self.network.weights.levels, a, b), out_w, out=y[a:b])
            return b - a

        for edges in self.workers.run(partial(rows, a, b) for a, b in spans(len(y), self._listed_rows)):
            self._advance(edges)
        for block, part, owned in listed.pieces():
            results = writer.open(block)
            if results is not None:
                writer.write(results, block, part, listed.inputs[owned], y[owned])

    @property
    def _listed_rows(self) -> int:
        return max(1, self.plan.tiling.rows // 2)

    def _output(self, writer: Writer) -> None:
        columns = [k - 1 for k in self.ks]
        heads: dict[int, tuple[Tensor, Tensor]] = {}

        def head(features: int) -> tuple[Tensor, Tensor]:
            """(d, K f) and (K f,): one column per horizon and kernel position."""
            if features not in heads:
                weight = self.network.weights.out_weight[:features, columns]  # (f, K, d)
                bias = self.network.weights.out_bias[:features, columns]
                heads[features] = (weight.permute(2, 1, 0).flatten(1).contiguous(), bias.t().flatten().contiguous())
            return heads[features]

        def dense() -> Iterator[Callable[[], int]]:
            for block in self.plan.dense:
                results = writer.open(block)
                if results is None:
                    yield partial(int, block.n_edges)
                    continue
                for region in self.plan.regions(block):
                    yield partial(self.dense.outputs, block, region, results, writer, *head(block.features))

        for edges in self.workers.run(dense()):
            self._advance(edges)
        for listed in self.groups:
            if isinstance(listed.blocks[0].values, View):
                self._output_listed(listed, writer, *head(listed.blocks[0].features))
            else:
                self._advance(len(listed.source))

    def _advance(self, edges: int) -> None:
        self._done += edges
        if self._progress is not None:
            self._progress(self._done, self._total)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.network.device.type == "cuda":
                torch.cuda.synchronize(self.network.device)
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


def _positions(graph: NeuralGraph) -> Tensor:
    """The graph's own positional encoding."""
    from nowcast_service.graph.positional import positional_encoding

    return positional_encoding(graph)
