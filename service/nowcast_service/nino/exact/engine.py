"""The exact engine: NiNo on a neural graph of any size, without a hidden vector per edge.

The published implementation forms several vectors of size d for every edge. Here edges exist only inside a tile that
fits a cache. The network is evaluated in streaming passes over the snapshots, one per convolution and one for the
output (NiNo paper, section 3; notation in `engine_weights`):

* A convolution needs, for target j, the sum over sources i of ``scale(e_ij) * (A x_j + B x_i + b) + shift(e_ij)`` with
  scale and shift affine in the feature f_ij below. All but one term need ``sum_i f_ij`` only. The cross term
  ``sum_i (Q f_ij) * (B x_i)`` is, component by component, ``sum_c Q_kc (sum_i f_ijc (B x_i)_k)``: one product
  ``f_j^T @ (B X)`` per target, contracted with Q once. For the first convolution f is the raw input, and no hidden
  vector is formed at all.
* Every pass recomputes the features it needs from the raw inputs. Keeping them instead would take 4 d bytes per edge
  (57 GB for 111 M edges at d = 128) to save d^2 multiply-adds and d activations per level and pass: a tenth of the
  work of the published three layers, half of it only from six layers on, which no published checkpoint has. So
  nothing is kept.

Work is linear in the edges: per edge of a three-layer network 3 d^2 multiply-adds and 4 d activations. Memory is two
vectors per node (one more per layer beyond three) plus tiles.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidCheckpoint, InvalidRequest, InvalidSnapshot
from torch import Tensor
from torch.nn import functional

from nowcast_service.graph.blocks import Block, NeuralGraph, View
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.exact.plan import AHEAD, OUTER, READ, Part, Plan, endpoints, spans
from nowcast_service.nino.exact.products import Precision, Products
from nowcast_service.nino.exact.stream import Access, Reader, Writer
from nowcast_service.nino.exact.weights import Convolution, Level, Weights
from nowcast_service.nino.exact.workers import Workers
from nowcast_service.nino.scaling import scale_of

DEFAULT_BUDGET = 1 << 30
_ROWS_ON_CPU = 2048
"""Edges per tile and CPU thread: at d = 128 1 MiB per vector, a few of which stay in cache."""
_ROWS_ON_DEVICE = 1 << 17
_NODE_ROWS = 4096

Progress = Callable[[int, int], None]
_LOG = logging.getLogger(__name__)


def _activate(name: str, x: Tensor) -> None:
    """Apply an activation in place."""
    if name == "silu":
        functional.silu(x, inplace=True)
    elif name == "relu":
        x.relu_()
    elif name == "tanh":
        x.tanh_()
    else:
        torch.ops.aten.gelu_(x)


@cache
def _add_silu() -> Callable[..., None] | None:
    """The compiled kernel (see `engine_kernels`), or None where it cannot be had: PyTorch does the same, slower."""
    try:
        from nowcast_service.nino.exact.kernels import add_silu
    except Exception as error:
        _LOG.debug("no compiled kernel, PyTorch is used instead: %s", error)
        return None
    return add_silu


class ExactEngine:
    """Evaluates one checkpoint exactly, on CPU or CUDA, within a stated amount of memory.

    Args:
        checkpoint: A graph network's checkpoint.
        device: Where to compute. Snapshots and results may be elsewhere; they are streamed in tiles.
        precision: Of the wide matrix products: ``float32``, ``tf32`` (CUDA; on a CPU it is float32) or ``bf16``.
        memory_budget: Bytes for everything the engine allocates during a prediction on top of snapshots, fused
            weights and returned parameters: node vectors, listed edges and tiles.
        threads: CPU threads while predicting; torch's setting when None.

    Raises:
        InvalidCheckpoint: The checkpoint is not one the engine can evaluate.
        InvalidRequest: Unknown precision, or a budget or number of threads that is not positive.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
        memory_budget: int = DEFAULT_BUDGET,
        threads: int | None = None,
    ) -> None:
        lacking = self.supports(checkpoint.config)
        if lacking is not None:
            raise InvalidCheckpoint(
                f"the exact engine cannot evaluate {checkpoint.source}: {lacking}",
                expected="a checkpoint of a graph network",
                remedy="use the edge-wise predictor",
            )
        if memory_budget < 1:
            raise InvalidRequest(f"memory budget of {memory_budget} bytes", expected="a positive number of bytes")
        if threads is not None and threads < 1:
            raise InvalidRequest(f"{threads} threads", expected="at least 1")
        self.config: NiNoConfig = checkpoint.config
        self.device = torch.device(device)
        self.memory_budget = memory_budget
        self._threads = threads
        self._products = Products(self.device, precision)
        self._add_silu = _add_silu() if self.device.type == "cpu" and self.config.act == "silu" else None
        with torch.no_grad():
            self._weights = Weights.fuse(checkpoint.config, checkpoint.state, self.device)
            first = 0 if checkpoint.config.input_layer == "linear" else 1
            # Raw inputs are multiplied in float32 always: they are few columns, and everything depends on them.
            self._level_weights = [
                level.weight if n <= first else self._products.weight(level.weight)
                for n, level in enumerate(self._weights.levels)
            ]
            self._scale_weights = [self._products.weight(conv.scale) for conv in self._weights.convolutions]

    @staticmethod
    def supports(config: NiNoConfig) -> str | None:
        """What the engine lacks for a checkpoint of this config; None where it lacks nothing."""
        return None if config.gnn else "it is an edge-wise network, which has no graph"

    def plan(self, graph: NeuralGraph, horizons: int = 1) -> Plan:
        """Tiles for a graph.

        Raises:
            TooLarge: The memory budget is too small for it.
        """
        on_cpu = self.device.type == "cpu"
        return Plan.make(
            graph,
            width=self.config.hidden,
            context=self.config.context,
            node_vectors=max(2, len(self._weights.convolutions)),
            levels=len(self._weights.levels),
            horizons=horizons,
            workers=(self._threads or torch.get_num_threads()) if on_cpu else 1,
            rows=_ROWS_ON_CPU if on_cpu else _ROWS_ON_DEVICE,
            budget=self.memory_budget,
        )

    def predict(
        self,
        graph: NeuralGraph,
        history: History,
        ks: Sequence[int],
        *,
        positions: Tensor | None = None,
        update_scale: float = 1.0,
        progress: Progress | None = None,
        timings: dict[str, float] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Future parameters at several horizons, from one evaluation of the network.

        Args:
            graph: Neural graph of the history's architecture.
            history: As many snapshots as the checkpoint reads.
            ks: Horizons in strides.
            positions: (n_nodes, >= lpe) positional encoding to use instead of the graph's own.
            update_scale: Factor on the predicted change, on top of the checkpoint's own.
            progress: Called with edges done and edges in all; edges count once per pass.
            timings: Filled with seconds per phase.

        Returns:
            Per horizon: name -> float32 tensor of every parameter, un-scaled, on the device of the newest snapshot.
            Parameters the graph does not cover, and those without variance, are the newest snapshot's.

        Raises:
            HorizonOutOfRange: A horizon the checkpoint does not predict.
            InvalidSnapshot: The history is not of the graph's architecture or of the wrong length.
            InvalidCheckpoint: The checkpoint has too few kernel positions or token positions for the graph.
            InvalidRequest: ``positions`` has the wrong shape.
            TooLarge: The memory budget is too small.
        """
        self._check(graph, history, ks)
        plan = self.plan(graph, len(ks))
        with torch.no_grad(), Workers(plan.workers, ahead=AHEAD, inline=self.device.type != "cpu") as workers:
            run = _Run(self, graph, history, plan, tuple(ks), workers, progress, {} if timings is None else timings)
            return run.predict(positions, self.config.update_scale * update_scale)

    def _check(self, graph: NeuralGraph, history: History, ks: Sequence[int]) -> None:
        config = self.config
        if not ks:
            raise HorizonOutOfRange("no horizon was asked for", expected=f"1 to {config.seq_len} strides")
        for k in ks:
            if not 1 <= k <= config.seq_len:
                raise HorizonOutOfRange(f"horizon k={k}", expected=f"1 to {config.seq_len} strides")
        if len(history) != config.context:
            raise InvalidSnapshot(
                f"{len(history)} snapshots", expected=f"{config.context}, what the checkpoint was trained on"
            )
        if history.spec.shapes() != graph.spec.shapes():
            raise InvalidSnapshot("the snapshots are not of the architecture the graph was built from")
        if graph.features > config.max_features:
            raise InvalidCheckpoint(
                f"the graph has edges with {graph.features} kernel positions",
                expected=f"at most {config.max_features}, what the checkpoint was trained on",
                remedy="leave such kernels out of the graph",
            )
        if config.token_positions and graph.n_tokens > config.vocab_size:
            raise InvalidCheckpoint(
                f"the checkpoint has token-position embeddings for {config.vocab_size} tokens",
                expected=f"at least {graph.n_tokens}, the vocabulary of the model",
                remedy="use a checkpoint without token-position embeddings",
            )


class _Run:
    """One prediction: the passes over the graph, and the buffers they share."""

    def __init__(
        self,
        engine: ExactEngine,
        graph: NeuralGraph,
        history: History,
        plan: Plan,
        ks: tuple[int, ...],
        workers: Workers,
        progress: Progress | None,
        timings: dict[str, float],
    ) -> None:
        self.config = engine.config
        self.weights = engine._weights
        self.level_weights = engine._level_weights
        self.scale_weights = engine._scale_weights
        self.products = engine._products
        self.device = engine.device
        self.add_silu = engine._add_silu
        self.nothing = torch.zeros(1, engine.config.hidden)
        self.graph = graph
        self.history = history
        self.plan = plan
        self.ks = ks
        self.workers = workers
        self.timings = timings
        self._progress = progress
        self._done = 0
        self._total = graph.n_edges * (1 + len(self.weights.convolutions))
        self.degree = graph.in_degree.to(self.device).clamp(min=1)[:, None]  # (N, 1)
        self.spaces = [_Space(self.device) for _ in range(plan.workers)]
        self.x: list[Tensor] = []  # node vectors after each convolution, (N, d)

    # -- the whole ---------------------------------------------------------------------------------------------------

    def predict(self, positions: Tensor | None, update_scale: float) -> list[dict[str, Tensor]]:
        with self._phase("scale"):
            names = sorted({view.parameter for _, view in self.graph.weighted()})
            scales = {name: scale_of(self.history.flat(name)) for name in names}
            self.reader = Reader(self.history, scales, self.device)
        with self._phase("nodes"):
            self.groups = [_Listed(blocks, self.reader, self.history, self.device) for blocks in self.plan.groups]
            x = self._node_inputs(positions)
        for number, conv in enumerate(self.weights.convolutions):
            with self._phase(f"convolution {number + 1}"):
                x = self._convolve(number, conv, x)
                self.x.append(x)
        del x
        with self._phase("output"):
            results = [
                {name: self.history.newest(name).to(torch.float32, copy=True) for name in self.graph.spec.shapes()}
                for _ in self.ks
            ]
            writer = Writer(results, scales, residual=self.config.residual, update_scale=update_scale)
            self._output(writer)
            writer.finish()
        return results

    def _node_inputs(self, positions: Tensor | None) -> Tensor:
        """(N, d) node vectors before the first convolution."""
        n, d = self.graph.n_nodes, self.config.hidden
        x = torch.zeros(n, d, device=self.device)
        if self.weights.nodes:
            with self._phase("positions"):
                positions = _positions(self.graph) if positions is None else positions
            if positions.ndim != 2 or positions.shape[0] != n or positions.shape[1] < self.config.lpe:
                raise InvalidRequest(
                    f"positions have shape {list(positions.shape)}", expected=f"[{n}, {max(8, self.config.lpe)}]"
                )
            for a, b in spans(n, _NODE_ROWS):
                part = positions[a:b, : self.config.lpe].to(self.device, torch.float32)
                for number, (weight, bias) in enumerate(self.weights.nodes):
                    if number:
                        _activate(self.config.act, part)
                    part = torch.addmm(bias, part, weight)
                x[a:b] = part
        if self.weights.tokens is not None:
            table, end = self.weights.tokens, 0
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
                    yield partial(self._messages_dense, block, region, number, conv, x)

        def listed() -> Iterator[Callable[[], tuple[int, Tensor, Tensor]]]:
            for group in self.groups:
                for a, b in spans(len(group.source), self._listed_rows):
                    yield partial(self._messages_listed, group, a, b, conv, x)

        # Results come in the order of the tasks, whoever is done first: the sums do not depend on luck.
        for edges, targets, messages in self.workers.run(dense()):
            total[targets] += messages
            self._advance(edges)
        for edges, index, messages in self.workers.run(listed()):
            total.scatter_add_(0, index, messages)
            self._advance(edges)
        for a, b in spans(len(x), _NODE_ROWS):
            mean = total[a:b].div_(self.degree[a:b])
            new = torch.addmm(conv.const, x[a:b], conv.keep).addmm_(mean, conv.mean)
            _activate(self.config.act, new)
            total[a:b] = new
        return total

    # -- dense blocks --------------------------------------------------------------------------------------------------

    def _messages_dense(
        self, block: Block, region: Part, number: int, conv: Convolution, x: Tensor
    ) -> tuple[int, slice, Tensor]:
        """Sums of the messages of a region's edges, by targets: (edges, targets, (J, d))."""
        d = self.config.hidden
        width = block.features * self.config.context if conv.level < 0 else d
        scale, shift = conv.scale[:width], conv.shift[:width]
        scale_const, shift_const = _of_type(conv.scale_const, block), _of_type(conv.shift_const, block)
        levels = self.weights.levels[: conv.level + 1]
        n_sources, n_targets = region.i1 - region.i0, region.j1 - region.j0
        chunk, tile = self.plan.tile(block, region, wide=conv.level >= 0)
        single = chunk >= n_sources
        outer = conv.level < 0 or chunk >= OUTER
        values = self.reader.open(block)
        targets = slice(block.target + region.j0, block.target + region.j1)
        terms_t = self._target_terms(levels, block, targets)
        reads = list(_reads(n_targets, tile))
        cut = {j: _cut(terms_t, j, min(j + tile, n_targets)) for j in range(0, n_targets, tile)}
        cross = torch.zeros(n_targets, d, device=self.device)
        sums = torch.zeros(n_targets, width, device=self.device)
        source_sum = torch.zeros(d, device=self.device)
        with self._space() as space:
            # One (width, d) matrix per target; where one chunk is all there is, they live no longer than a tile.
            matrices = space.get("outer", tile if single else n_targets, width, d) if outer else None
            for i0, i1 in spans(n_sources, chunk):
                n = i1 - i0
                sources = slice(block.source + region.i0 + i0, block.source + region.i0 + i1)
                terms_s = self._source_terms(levels, sources)
                bx = x[sources] @ conv.source  # (I, d)
                source_sum += bx.sum(0)
                for r0, r1 in reads:
                    part = Part(region.i0 + i0, region.i0 + i1, region.j0 + r0, region.j0 + r1)
                    inputs = self._read(space, block, values, part, min(tile, r1 - r0))
                    for j0, h in zip(range(r0, r1, tile), inputs, strict=True):  # (I, J, C) each
                        j1 = min(j0 + tile, r1)
                        f = self._climb(space, levels, h, terms_s, cut[j0])
                        sums[j0:j1] += f.sum(0)
                        if matrices is None:
                            q = space.get(f"level {len(levels) % 2}", n * (j1 - j0), d)
                            self.products.into(f.view(-1, d), self.scale_weights[number], q)
                            cross[j0:j1] += q.view(f.shape).mul_(bx[:, None]).sum(0)
                            continue
                        m = matrices[: j1 - j0] if single else matrices[j0:j1]
                        self.products.transposed(
                            f.view(n, -1), bx, m.view(-1, d), accumulate=i0 > 0, exact=conv.level < 0
                        )
                        if i1 == n_sources:
                            cross[j0:j1] = m.mul_(scale).sum(1)
        own = torch.addmm(conv.bias, x[targets], conv.target)
        messages = torch.addmm(scale_const * n_sources, sums, scale).mul_(own)
        messages.add_(cross).add_(scale_const * source_sum).addmm_(sums, shift).add_(shift_const, alpha=n_sources)
        return n_sources * n_targets, targets, messages

    def _output_dense(
        self, block: Block, region: Part, results: Access, writer: Writer, out_w: Tensor, out_b: Tensor
    ) -> int:
        """Predict the parameters on a region's edges; returns how many those are."""
        levels = self.weights.levels
        chunk, tile = self.plan.output_tile(region)
        values = self.reader.open(block)
        terms_t = self._target_terms(levels, block, slice(block.target + region.j0, block.target + region.j1))
        cut = {j: _cut(terms_t, j, min(j + tile, region.j1 - region.j0)) for j in range(0, region.j1 - region.j0, tile)}
        with self._space() as space:
            for i0, i1 in spans(region.i1 - region.i0, READ * chunk):
                sources = slice(block.source + region.i0 + i0, block.source + region.i0 + i1)
                terms_s = self._source_terms(levels, sources)
                for j0, j1 in spans(region.j1 - region.j0, tile):
                    part = Part(region.i0 + i0, region.i0 + i1, region.j0 + j0, region.j0 + j1)
                    inputs = self._read(space, block, values, part, j1 - j0)[0]  # (I, J, C)
                    y = space.get("outputs", part.edges, out_w.shape[1])
                    for a, b in spans(i1 - i0, chunk):
                        terms = [None if t is None else t[a:b] for t in terms_s]
                        z = self._climb(space, levels, inputs[a:b], terms, cut[j0])
                        rows = slice(a * (j1 - j0), b * (j1 - j0))
                        torch.addmm(out_b, z.view(-1, z.shape[-1]), out_w, out=y[rows])  # (I J, K f)
                    self._write(block, results, writer, part, inputs, y)
        return region.edges

    def _write(
        self, block: Block, results: Access, writer: Writer, part: Part, inputs: Tensor, outputs: Tensor
    ) -> None:
        shape = (part.i1 - part.i0, part.j1 - part.j0)
        writer.write(
            results,
            part,
            inputs.view(*shape, block.features, self.config.context),
            outputs.view(*shape, len(self.ks), block.features),
        )

    def _read(self, space: _Space, block: Block, values: Access | float, part: Part, tile: int) -> Tensor:
        """(tiles, I, J, features * context) standardised inputs of tiles side by side, of J = ``tile`` targets each."""
        width = block.features * self.config.context
        inputs = space.get("inputs", (part.j1 - part.j0) // tile, part.i1 - part.i0, tile, width)
        self.reader.read(values, part, inputs)
        return inputs

    def _climb(
        self,
        space: _Space,
        levels: Sequence[Level],
        f: Tensor,
        terms_s: Sequence[Tensor | None],
        terms_t: Sequence[Tensor],
    ) -> Tensor:
        """(I, J, d) feature at the last of some levels, from (I, J, C) raw inputs."""
        d, n = self.config.hidden, f.shape[0] * f.shape[1]
        for number in range(len(levels)):
            # The level below and the one above share the other buffer.
            out = space.get(f"level {number % 2}", n, d)
            if number == 0:
                torch.mm(f.view(n, -1), self.level_weights[0][: f.shape[-1]], out=out)
            else:
                self.products.into(f.view(n, d), self.level_weights[number], out)
            f = out.view(*f.shape[:2], d)
            term_s, term_t = terms_s[number], terms_t[number]
            if self.add_silu is not None:
                self.add_silu(f.numpy(), (self.nothing if term_s is None else term_s).numpy(), term_t.numpy())
                continue
            if term_s is not None:
                f.add_(term_s[:, None])
            f.add_(term_t)
            _activate(self.config.act, out)
        return f

    def _target_terms(self, levels: Sequence[Level], block: Block, targets: slice) -> list[Tensor]:
        """Per level (J, d) or (1, d): what the target node and constants add before the activation."""
        terms: list[Tensor] = []
        for level in levels:
            const = _of_type(level.const, block)
            if level.target is None:
                terms.append(const[None])
            else:
                terms.append(torch.addmm(const, self.x[level.nodes][targets], level.target))
        return terms

    def _source_terms(self, levels: Sequence[Level], sources: slice) -> list[Tensor | None]:
        """Per level (I, d): what the source node adds before the activation."""
        return [None if level.source is None else self.x[level.nodes][sources] @ level.source for level in levels]

    # -- listed edges --------------------------------------------------------------------------------------------------

    def _messages_listed(
        self, listed: _Listed, a: int, b: int, conv: Convolution, x: Tensor
    ) -> tuple[int, Tensor, Tensor]:
        """Messages of listed edges a … b: (edges, index (E, d) of the target rows, (E, d))."""
        block = listed.blocks[0]
        f = self._climb_listed(self.weights.levels[: conv.level + 1], listed, a, b)
        y = conv.bias.repeat(b - a, 1)
        listed.add_terms(y, x, conv.source, conv.target, a, b)
        y.mul_(torch.addmm(_of_type(conv.scale_const, block), f, conv.scale[: f.shape[1]]))
        y.addmm_(f, conv.shift[: f.shape[1]]).add_(_of_type(conv.shift_const, block))
        return b - a, listed.target[a:b, None].expand_as(y), y

    def _output_listed(self, listed: _Listed, writer: Writer, out_w: Tensor, out_b: Tensor) -> None:
        y = torch.empty(len(listed.source), out_w.shape[1], device=self.device)

        def rows(a: int, b: int) -> int:
            torch.addmm(out_b, self._climb_listed(self.weights.levels, listed, a, b), out_w, out=y[a:b])
            return b - a

        for edges in self.workers.run(partial(rows, a, b) for a, b in spans(len(y), self._listed_rows)):
            self._advance(edges)
        for block, part, owned in listed.pieces():
            results = writer.open(block)
            if results is not None:
                self._write(block, results, writer, part, listed.inputs[owned], y[owned])

    def _climb_listed(self, levels: Sequence[Level], listed: _Listed, a: int, b: int) -> Tensor:
        """(E, d) feature of listed edges a … b at the last of some levels, or their (E, C) raw inputs."""
        f = listed.inputs[a:b]
        for level in levels:
            f = torch.addmm(_of_type(level.const, listed.blocks[0]), f, level.weight[: f.shape[1]])
            if level.source is not None and level.target is not None:
                listed.add_terms(f, self.x[level.nodes], level.source, level.target, a, b)
            _activate(self.config.act, f)
        return f

    @property
    def _listed_rows(self) -> int:
        return max(1, self.plan.rows // 2)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _output(self, writer: Writer) -> None:
        columns = [k - 1 for k in self.ks]
        heads: dict[int, tuple[Tensor, Tensor]] = {}

        def head(features: int) -> tuple[Tensor, Tensor]:
            """(d, K f) and (K f,): one column per horizon and kernel position."""
            if features not in heads:
                weight = self.weights.out_weight[:features, columns]  # (f, K, d)
                bias = self.weights.out_bias[:features, columns]
                heads[features] = (weight.permute(2, 1, 0).flatten(1).contiguous(), bias.t().flatten().contiguous())
            return heads[features]

        def dense() -> Iterator[Callable[[], int]]:
            for block in self.plan.dense:
                results = writer.open(block)
                if results is None:
                    yield partial(int, block.n_edges)
                    continue
                for region in self.plan.regions(block):
                    yield partial(self._output_dense, block, region, results, writer, *head(block.features))

        for edges in self.workers.run(dense()):
            self._advance(edges)
        for listed in self.groups:
            if isinstance(listed.blocks[0].values, View):
                self._output_listed(listed, writer, *head(listed.blocks[0].features))
            else:
                self._advance(len(listed.source))

    @contextmanager
    def _space(self) -> Iterator[_Space]:
        """Buffers for one task; there are as many as tasks at a time."""
        space = self.spaces.pop()
        try:
            yield space
        finally:
            self.spaces.append(space)

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
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


class _Space:
    """Buffers of one worker, kept from tile to tile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """A buffer by name; what it held is lost."""
        view = self._views.get((name, shape))
        if view is None:
            numel = math.prod(shape)
            held = self._held.get(name)
            if held is None or held.numel() < numel:
                self._views = {key: v for key, v in self._views.items() if key[0] != name}
                self._held.pop(name, None)
                del held  # free first
                held = self._held[name] = torch.empty(numel, dtype=torch.float32, device=self._device)
            view = self._views[name, shape] = held[:numel].view(shape)
        return view


class _Listed:
    """Edges of small and thin blocks of one type and kernel size, held with their endpoints and inputs."""

    def __init__(self, blocks: tuple[Block, ...], reader: Reader, history: History, device: torch.device) -> None:
        self.blocks = blocks
        self.loops = all(block.diagonal and block.source == block.target for block in blocks)
        self.source, self.target = endpoints(blocks, device)
        width = blocks[0].features * len(history)
        self.inputs = torch.empty(len(self.source), width, device=device)  # (E, C)
        for block, part, edges in self.pieces():
            shape = (part.i1, part.j1, width)
            reader.read(reader.open(block), part, self.inputs[edges].view(1, *shape))

    def add_terms(self, out: Tensor, x: Tensor, source: Tensor, target: Tensor, a: int, b: int) -> None:
        """out += x_i @ source + x_j @ target for edges a … b, out (E, d); a self-loop has i = j."""
        if self.loops:
            out.addmm_(x[self.source[a:b]], source + target)
        else:
            out.addmm_(x[self.source[a:b]], source).addmm_(x[self.target[a:b]], target)

    def pieces(self) -> Iterator[tuple[Block, Part, slice]]:
        """Every block, all of it as a part, and the edges it owns here."""
        start = 0
        for block in self.blocks:
            end = start + block.n_edges
            yield block, Part(0, block.n_sources, 0, 1 if block.diagonal else block.n_targets), slice(start, end)
            start = end


def _reads(n_targets: int, tile: int) -> Iterator[tuple[int, int]]:
    """Runs of targets to read together: a few whole tiles each, what is left over by itself."""
    whole = n_targets - n_targets % tile
    yield from spans(whole, READ * tile)
    if whole < n_targets:
        yield whole, n_targets


def _cut(terms: Sequence[Tensor], j0: int, j1: int) -> list[Tensor]:
    """Terms of targets j0 … j1; those that are the same for all targets as they are."""
    return [term[j0:j1] if len(term) > 1 else term for term in terms]


def _of_type(const: Tensor, block: Block) -> Tensor:
    """(d,) row of a constant that may depend on the edge type."""
    return const[0 if len(const) == 1 else int(block.edge_type)]


def _positions(graph: NeuralGraph) -> Tensor:
    """The graph's own positional encoding."""
    from nowcast_service.graph.positional import positional_encoding

    return positional_encoding(graph)
