"""WNN+: the edge-wise network, every weight predicted from its own past alone (NiNo paper, section 4.1).

The network is applied to every element of a tensor, kernels position by position; it needs of the graph only which
type of edge a weight is. Tensors are streamed in chunks, so that memory does not grow with the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from nowcast_proto.errors import InvalidCheckpoint, InvalidRequest
from torch import Tensor

from nowcast_service.graph.blocks import EdgeType, NeuralGraph, View
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.scaling import Scale, scale_of
from nowcast_service.predictors.base import Check, State, check_count, check_horizon, unasked
from nowcast_service.predictors.graphs import Graphs, Needs, check_fit
from nowcast_service.predictors.options import Options

CHUNK = {"cpu": 1 << 13, "cuda": 1 << 20}
"""Weights per pass; on a CPU a chunk's hidden vectors (4 MiB at width 128) stay in the cache."""
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: torch.nn.functional.silu(x, inplace=True),
    "relu": torch.relu_,
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh_,
}
ANY_KERNEL = 1 << 31
"""Limit on kernel positions of the graph the types of edges come from: none, positions are predicted one by one."""
TYPES = Needs(ANY_KERNEL, uncovered=None)
"""The graph that only the types of edges are read from."""
Progress = Callable[[int, int], None]
"""Called with (done, total), in weights or edges."""


def checked(check: Check, progress: Progress | None = None) -> Progress:
    """Progress that also asks whether the answer is still wanted: it is told of every tile."""

    def report(done: int, total: int) -> None:
        check()
        if progress is not None:
            progress(done, total)

    return report


class EdgewiseNetwork:
    """The trained edge-wise network, with neighbouring linear maps fused.

    Args:
        checkpoint: Of an edge-wise network.
        device: Where to compute.

    Raises:
        InvalidCheckpoint: The checkpoint is of a graph network.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        config, state = checkpoint.config, checkpoint.state
        if config.gnn:
            raise InvalidCheckpoint(
                f"{checkpoint.source} is a graph network",
                expected="an edge-wise network (WNN+)",
                remedy="use predictor nino with it",
            )
        self.config = config
        self.device = torch.device(device)
        self._activate = _ACTIVATIONS[config.act]
        embed = state["layer_embed.weight"].double() if config.edge_types else torch.zeros(1, config.hidden).double()
        entry = [(_weight(state, f"edge_proj.fc.{i}"), _bias(state, f"edge_proj.fc.{i}")) for i in self._entry()]
        body = [(_weight(state, f"edge_mlp.fc.{i}"), _bias(state, f"edge_mlp.fc.{i}")) for i in (0, 2, 4, 6)]
        # No activation between the last input map and the first hidden one: one map, with a bias per edge type.
        (last, last_bias), (first, first_bias) = entry[-1], body[0]
        self._before = [self._place(pair) for pair in entry[:-1]]
        self._joint = (first @ last).float().to(self.device)
        self._type_bias = (first_bias + (embed + last_bias) @ first.T).float().to(self.device)  # (types, d)
        self._hidden = [self._place(pair) for pair in body[1:-1]]
        self._out, self._out_bias = self._place(body[-1])

    def _entry(self) -> tuple[int, ...]:
        return (0,) if self.config.input_layer == "linear" else (0, 2)

    def _place(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].float().to(self.device), pair[1].float().to(self.device)

    def __call__(self, x: Tensor, edge_type: int, k: int) -> Tensor:
        """Scaled prediction.

        Args:
            x: (n, context) scaled weights, oldest snapshot first.
            edge_type: Type of all n edges.
            k: Horizon in strides.

        Returns:
            (n,) the network's output, without the newest snapshot added.
        """
        for weight, bias in self._before:
            x = self._activate(torch.addmm(bias, x, weight.T))
        x = self._activate(torch.addmm(self._type_bias[edge_type if self.config.edge_types else 0], x, self._joint.T))
        for weight, bias in self._hidden:
            x = self._activate(torch.addmm(bias, x, weight.T))
        return torch.addmv(self._out_bias[k - 1], x, self._out[k - 1])


class Wnn:
    """Predictor around `EdgewiseNetwork`.

    Args:
        options: How it is made; ``progress`` is told of weights.

    Raises:
        InvalidCheckpoint: The checkpoint is of a graph network.
        InvalidRequest: The precision is not available.
    """

    name = "wnn"
    needs: Sequence[Needs] = (TYPES,)

    def __init__(self, options: Options) -> None:
        checkpoint = options.network
        if options.precision != "float32":
            raise InvalidRequest(
                f"precision {options.precision!r} is not available for predictor wnn", expected="float32"
            )
        self.network = EdgewiseNetwork(checkpoint, options.device)
        self.context = checkpoint.config.context
        self.farthest = checkpoint.config.seq_len
        self._graphs = options.graphs or Graphs()
        self._progress = options.progress
        self._timings = options.timings

    def predict(
        self, history: History, k: int, state: State | None = None, *, check: Check = unasked
    ) -> tuple[dict[str, Tensor], State]:
        """See `Predictor.predict`."""
        check_count(len(history), self.context, "the checkpoint")
        check_horizon(k, self.network.config.seq_len)
        graph = self._graphs.prepared(history.spec, TYPES).graph
        check_fit(graph, self.network.config)
        start = time.perf_counter()
        displacement = predict_edgewise(
            self.network, history, k, segments(graph), progress=checked(check, self._progress)
        )
        if self._timings is not None:
            self._timings["network"] = self._timings.get("network", 0.0) + time.perf_counter() - start
        return displacement, {}


Segment = tuple[EdgeType, View | None, tuple[int, ...]]
"""Edge type, where the elements lie in the flattened tensor (None for all of it), and the shape of that view."""


def segments(graph: NeuralGraph) -> dict[str, list[Segment]]:
    """Which elements of every tensor are edges of which type.

    Tensors outside the graph get the type that their shape suggests: kernels, matrices, everything else.
    """
    found: dict[str, list[Segment]] = {}
    for block in (*graph.blocks, *graph.beside):
        if isinstance(view := block.values, View) and block.writes:
            shape = (block.n_sources, 1 if block.diagonal else block.n_targets, view.features)
            found.setdefault(view.parameter, []).append((block.edge_type, view, shape))
    for parameter in graph.spec.parameters:
        if parameter.name not in found:
            found[parameter.name] = [(type_of_shape(parameter.shape), None, (parameter.numel, 1, 1))]
    return found


def type_of_shape(shape: tuple[int, ...]) -> EdgeType:
    """Edge type of a tensor of no known role."""
    if len(shape) < 2:
        return EdgeType.OTHER
    return EdgeType.LINEAR if len(shape) == 2 else EdgeType.CONV


def predict_edgewise(
    network: EdgewiseNetwork,
    history: History,
    k: int,
    tensors: Mapping[str, list[Segment]],
    *,
    scales: Mapping[str, Scale] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Predict some tensors of a history, chunk by chunk.

    Args:
        network: The network.
        history: As many snapshots as its context.
        k: Horizon in strides.
        tensors: Which tensors, in which segments.
        scales: Scales where they are known already.
        progress: Called with (weights done, weights in all).

    Returns:
        Name -> float32 displacement from the newest snapshot, on the device of the history.
    """
    shapes = history.spec.shapes()
    factor = network.config.update_scale
    total = sum(history.newest(name).numel() for name in tensors)
    done = 0
    found = {}
    for name, parts in tensors.items():
        flats = history.flat(name)
        scale = scales[name] if scales else scale_of(flats)
        # Elements that are no edge do not move; nor does a constant tensor, as a whole.
        moved = torch.zeros_like(flats[-1], dtype=torch.float32)
        if not scale.constant:
            for edge_type, view, shape in parts:
                for tile in _tiles(view, shape, CHUNK.get(network.device.type, CHUNK["cuda"])):
                    if progress:
                        progress(done, total)
                    x = torch.stack([tile(flat).reshape(-1).to(network.device) for flat in flats], dim=1)
                    x = scale.apply(x)  # (n, context)
                    y = network(x, int(edge_type), k).mul_(factor)
                    if network.config.residual:
                        y += x[:, -1]
                    target = tile(moved)
                    target.copy_(scale.invert(y).to(target.device).view(target.shape)).sub_(tile(flats[-1]))
        found[name] = moved.view(shapes[name])
        done += moved.numel()
        if progress:
            progress(done, total)
    return found


def _tiles(view: View | None, shape: tuple[int, ...], limit: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Cut a segment into tiles of at most ``limit`` elements, each a function flat tensor -> strided view of the tile.

    The axes are walked by falling stride, so that a tile reads memory in order whichever way the tensor is wired.
    """
    if view is None:
        strides, offset = (1, 1, 1), 0
    else:
        strides, offset = (view.source_stride, view.target_stride, view.feature_stride), view.offset
    axes = sorted(range(3), key=lambda axis: (shape[axis] > 1, abs(strides[axis])), reverse=True)
    sizes, steps = [shape[a] for a in axes], [strides[a] for a in axes]
    inner = min(sizes[1], max(1, limit // sizes[2]))
    outer = max(1, limit // (inner * sizes[2]))
    for i in range(0, sizes[0], outer):
        for j in range(0, sizes[1], inner):
            size = (min(outer, sizes[0] - i), min(inner, sizes[1] - j), sizes[2])
            start = offset + i * steps[0] + j * steps[1]

            def tile(flat: Tensor, size: tuple[int, ...] = size, start: int = start) -> Tensor:
                return flat.as_strided(size, steps, flat.storage_offset() + start)

            yield tile


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    return state[f"{name}.weight"].double()


def _bias(state: Mapping[str, Tensor], name: str) -> Tensor:
    return state[f"{name}.bias"].double()
