"""The reference twin: NiNo and WNN+ as plain `torch_geometric` message passing.

Slow and obvious on purpose. It holds a hidden vector for every edge, which the exact engine never does; it is
differentiable, takes batches of graphs, and is what meta-training trains and what the engine is tested against.

Tensor names are those of the published checkpoints, so that a file is loaded without any translation.

NiNo paper (Knyazev et al., ICLR 2025), section 3.2; the message passing is the edge-modulated PNA of Kofinas et al.
(Graph Neural Networks for Learning Equivariant Representations of Neural Networks, ICLR 2024).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidCheckpoint, InvalidSnapshot
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing

from nowcast_service.nino.config import NiNoConfig

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
EDGEWISE_MAPS = 4
"""Linear maps of the edge-wise network after its input map (paper, section 4.1, WNN+)."""
INIT_STD = 0.02


class Embeddings(NamedTuple):
    """Hidden vectors after the last layer: ``nodes`` (n_nodes, hidden), ``edges`` (n_edges, hidden)."""

    nodes: Tensor
    edges: Tensor


class MLP(nn.Module):
    """Linear maps with an activation between them, kept under ``fc`` as in the published files."""

    def __init__(self, sizes: Sequence[int], act: str) -> None:
        super().__init__()
        maps: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            maps += [nn.Linear(n_in, n_out), _ACTIVATIONS[act]()]
        self.fc = nn.Sequential(*maps[:-1])

    def forward(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Apply the maps.

        Args:
            x: (..., n_in). Fewer columns than the first map has are taken as its leading ones, the rest as zero.
            outputs: Rows of the last map to evaluate; all where None.

        Returns:
            (..., n_out), or (..., len(outputs)).
        """
        for number, module in enumerate(self.fc):
            if not isinstance(module, nn.Linear):
                x = module(x)
                continue
            weight: Tensor = module.weight
            bias: Tensor = module.bias
            if number == 0:
                weight = weight[:, : x.shape[-1]]
            if outputs is not None and number == len(self.fc) - 1:
                weight, bias = weight[outputs], bias[outputs]
            x = nn.functional.linear(x, weight, bias)
        return x


class ModulatedConv(MessagePassing):  # type: ignore[misc]  # torch_geometric has no types
    """Node update from incoming messages ``scale(e) * pre([x_target; x_source]) + shift(e)``, averaged.

    Nodes are split into ``towers`` slices with maps of their own; all towers share the edge's scale and shift.
    """

    def __init__(self, hidden: int, towers: int) -> None:
        super().__init__(aggr="mean", node_dim=0)
        self.towers = towers
        width = hidden // towers
        self.edge_encoder = nn.Linear(hidden, 2 * width)
        self.pre_nns = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width)) for _ in range(towers))
        self.post_nns = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width)) for _ in range(towers))
        self.lin = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor) -> Tensor:
        """(n_nodes, hidden), (2, n_edges), (n_edges, hidden) -> (n_nodes, hidden), before the activation."""
        scale, shift = self.edge_encoder(edges).chunk(2, dim=-1)  # (E, width) each
        updated = []
        for part, pre, post in zip(x.chunk(self.towers, dim=-1), self.pre_nns, self.post_nns, strict=True):
            # `pre` is one linear map, so its two halves act on nodes, and only their sum is formed per edge.
            for_target, for_source = pre.get_parameter("0.weight").chunk(2, dim=1)
            mean = self.propagate(
                edge_index,
                y=(
                    nn.functional.linear(part, for_source),
                    nn.functional.linear(part, for_target, pre.get_parameter("0.bias")),
                ),
                scale=scale,
                shift=shift,
                size=(len(x), len(x)),
            )
            updated.append(post(torch.cat((part, mean), dim=-1)))
        out: Tensor = self.lin(torch.cat(updated, dim=-1))
        return out

    def message(self, y_i: Tensor, y_j: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return scale * (y_i + y_j) + shift  # (E, width); i is the target, j the source


class EdgeUpdate(nn.Module):
    """Edge update from the edge and both of its (already updated) nodes."""

    def __init__(self, hidden: int, act: str) -> None:
        super().__init__()
        self.lin_e = nn.Linear(hidden, hidden)
        self.lin_s = nn.Linear(hidden, hidden)
        self.lin_t = nn.Linear(hidden, hidden)
        self.lin1 = nn.Linear(hidden, hidden)
        self.act = _ACTIVATIONS[act]()

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor) -> Tensor:
        source, target = edge_index
        hidden = self.act(self.lin_e(edges) + self.lin_s(x)[source] + self.lin_t(x)[target])
        out: Tensor = self.lin1(hidden)
        return out


class GraphNetwork(nn.Module):
    """Alternating node and edge updates."""

    def __init__(self, config: NiNoConfig) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ModulatedConv(config.hidden, config.towers) for _ in range(config.layers))
        self.edge_update = nn.ModuleList(EdgeUpdate(config.hidden, config.act) for _ in range(config.edge_updates))
        self.act = _ACTIVATIONS[config.act]()

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor, *, nodes: bool) -> tuple[Tensor, Tensor]:
        """Updated nodes and edges.

        Args:
            x: (n_nodes, hidden).
            edge_index: (2, n_edges).
            edges: (n_edges, hidden).
            nodes: Whether the nodes are wanted. Where no edge update follows the last convolution, edges do not depend
                on it, and it is left out.
        """
        for number, conv in enumerate(self.convs):
            updates_edges = number < len(self.edge_update)
            if not updates_edges and not nodes:
                break
            x = conv(x, edge_index, edges)
            if updates_edges:
                x = self.act(x)
                edges = self.edge_update[number](x, edge_index, edges)
        return x, edges


class NiNoTwin(nn.Module):
    """NiNo (``config.gnn``) or WNN+, for one graph or a PyG batch of them.

    A graph is a PyG `Data` (or any object with these attributes):

    * ``edge_attr`` (n_edges, features * context) scaled parameters, column ``context * position + snapshot``, oldest
      snapshot first; features may be anything up to ``max_features``, positions that are absent count as zero;
    * ``edge_type`` (n_edges,) integer;
    * ``edge_index`` (2, n_edges) source and target; ``pos`` (n_nodes, lpe) positional encoding; ``pos_w`` (n_nodes,)
      token-position index, 0 for nodes that are not vocabulary rows. The edge-wise network reads none of these three,
      ``pos`` and ``pos_w`` may be absent where the config has no use for them.
    """

    def __init__(self, config: NiNoConfig) -> None:
        super().__init__()
        self.config = config
        hidden, act = config.hidden, config.act
        wide = (hidden,) if config.input_layer == "linear" else (hidden, hidden)
        if config.edge_types:
            self.layer_embed = nn.Embedding(config.edge_types, hidden)
        self.edge_proj = MLP((config.inputs, *wide), act)
        if config.gnn:
            if config.token_positions:
                self.wte_pos_enc_layer = nn.Embedding(config.vocab_size + 1, hidden)
            if config.lpe:
                self.node_proj = MLP((config.lpe, *wide), act)
            self.gnn = GraphNetwork(config)
            self.edge_out = MLP((hidden, hidden, config.max_features * config.seq_len), act)
        else:
            self.edge_mlp = MLP((*[hidden] * EDGEWISE_MAPS, config.seq_len), act)
        self.apply(_initialise)

    def forward(self, graph: Data, ks: int | Sequence[int] | None = None) -> Tensor:
        """Scaled parameters at the asked horizons.

        Args:
            graph: One graph or a batch; left as it is.
            ks: A horizon in strides, 1 … seq_len, several, or None for all of them.

        Returns:
            (n_edges, features) for a single horizon, else (n_edges, features, horizons).

        Raises:
            HorizonOutOfRange: A horizon is not among those the network predicts.
            InvalidSnapshot: ``edge_attr`` does not fit the network.
            InvalidCheckpoint: More token positions than the network has embeddings for.
        """
        config = self.config
        wanted = range(1, config.seq_len + 1) if ks is None else ((ks,) if isinstance(ks, int) else tuple(ks))
        for k in wanted:
            if not 1 <= k <= config.seq_len:
                raise HorizonOutOfRange(f"horizon k={k}", expected=f"1 to {config.seq_len}")
        inputs = self._inputs(graph)  # (E, features, context)
        features = inputs.shape[1]
        steps = torch.tensor([k - 1 for k in wanted], device=inputs.device)  # (K,)
        if config.gnn:
            edges = self._hidden(graph, inputs, nodes=False)[1]
            # Row of position f, horizon k is seq_len * f + k - 1.
            rows = (torch.arange(features, device=steps.device)[:, None] * config.seq_len + steps).flatten()
            out: Tensor = self.edge_out(edges, rows).unflatten(-1, (features, len(steps)))  # (E, features, K)
        else:
            hidden = self.edge_proj(inputs)  # (E, features, d): every kernel position for itself
            if config.edge_types:
                hidden = hidden + self.layer_embed(graph.edge_type.long())[:, None]
            out = self.edge_mlp(hidden, steps)
        if config.residual:
            out = inputs[..., -1:] + config.update_scale * out
        return out[..., 0] if isinstance(ks, int) else out

    def embed(self, graph: Data) -> Embeddings:
        """Hidden vectors of nodes and edges after the last layer (graph networks only).

        Raises:
            InvalidCheckpoint: The network is edge-wise.
        """
        if not self.config.gnn:
            raise InvalidCheckpoint(
                "the edge-wise network has no graph embeddings", expected="a checkpoint of a graph network"
            )
        return Embeddings(*self._hidden(graph, self._inputs(graph), nodes=True))

    def _inputs(self, graph: Data) -> Tensor:
        """(n_edges, features, context) raw inputs."""
        context, attr = self.config.context, graph.edge_attr
        if attr.dim() != 2 or attr.shape[1] % context:
            raise InvalidSnapshot(
                f"edge_attr has shape {list(attr.shape)}", expected=f"(n_edges, a multiple of context={context})"
            )
        features = attr.shape[1] // context
        if self.config.gnn and features > self.config.max_features:
            raise InvalidSnapshot(
                f"edges have {features} kernel positions",
                expected=f"at most {self.config.max_features}",
                remedy="leave such kernels out of the graph or send them to the edge-wise predictor",
            )
        inputs: Tensor = attr.unflatten(1, (features, context))
        return inputs

    def _hidden(self, graph: Data, inputs: Tensor, *, nodes: bool) -> tuple[Tensor, Tensor]:
        """Nodes and edges after the graph network."""
        config = self.config
        x: Tensor | None = None
        if config.lpe:
            x = self.node_proj(graph.pos.to(inputs.dtype)[:, : config.lpe])  # (N, d)
        if config.token_positions:
            if int(graph.pos_w.max()) > config.vocab_size:
                raise InvalidCheckpoint(
                    f"the checkpoint has token-position embeddings for {config.vocab_size} tokens",
                    expected=f"at least {int(graph.pos_w.max())}, the vocabulary of the model",
                    remedy="use a checkpoint without token-position embeddings",
                )
            tokens = self.wte_pos_enc_layer(graph.pos_w.long())
            x = tokens if x is None else x + tokens
        edges = self.edge_proj(inputs.flatten(1))  # (E, d)
        if config.edge_types:
            edges = edges + self.layer_embed(graph.edge_type.long())
        hidden: tuple[Tensor, Tensor] = self.gnn(x, graph.edge_index.long(), edges, nodes=nodes)
        return hidden


def _initialise(module: nn.Module) -> None:
    """Small normal weights and zero biases, the published initialisation."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
