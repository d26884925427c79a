"""The weights of a NiNo network with consecutive linear maps fused, as the exact engine reads them.

Notation. An edge (source i, target j) has raw inputs h (features * context) and, at depth n, a hidden vector e_n:

    e_0     = P f_0 + p + type              f_0 = h, or act(P' h + p') where the input layer has two maps
    e_{n+1} = W1_n f_{n+1} + b1_n           f_{n+1} = act(L_n e_n + S_n x_i + T_n x_j + biases)

so whatever reads an edge reads the *feature* f below it through one fused matrix, and e_n is never formed. A
convolution (NiNo paper, section 3.2; modulation after Kofinas et al., 2024) is

    x_j <- act(lin(post([x_j; mean_i (scale(e) * (A x_j + B x_i + b) + shift(e))])))

with ``scale`` and ``shift`` affine in f. Products are formed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nowcast_service.nino.config import NiNoConfig


@dataclass(frozen=True, slots=True)
class Level:
    """One activation of the edge chain: f = act(below @ weight + x_i @ source + x_j @ target + const[type]).

    Attributes:
        weight: (width below, d).
        const: (types, d) where it depends on the edge type, else (1, d).
        source: (d, d) for the source node's vector, or None where nodes play no part.
        target: (d, d) for the target node's vector, or None.
        nodes: Which node vectors: those after convolution ``nodes`` (0 is the first).
    """

    weight: Tensor
    const: Tensor
    source: Tensor | None = None
    target: Tensor | None = None
    nodes: int = -1


@dataclass(frozen=True, slots=True)
class Convolution:
    """One node update.

    Attributes:
        level: The feature it reads: the activation of ``levels[level]``, or the raw inputs for -1.
        scale: (width, d), with constant ``scale_const`` (types or 1, d).
        shift: (width, d), with constant ``shift_const`` (types or 1, d).
        target, source, bias: A (d, d), B (d, d) and b (d,) of the message.
        keep, mean, const: (d, d), (d, d), (d,) of the node update, applied to x and to the mean message.
    """

    level: int
    scale: Tensor
    scale_const: Tensor
    shift: Tensor
    shift_const: Tensor
    target: Tensor
    source: Tensor
    bias: Tensor
    keep: Tensor
    mean: Tensor
    const: Tensor


@dataclass(frozen=True)
class Weights:
    """All fused weights, every matrix oriented to be multiplied from the right.

    Attributes:
        nodes: (weight, bias) maps from the positional encoding to node inputs, an activation between them.
        tokens: (vocab + 1, d) token-position embedding, or None.
        levels: Activations of the edge chain, the last one being the hidden layer of the output.
        convolutions: Those the output depends on; a last one without an edge update after it is left out.
        out_weight: (positions, horizons, d).
        out_bias: (positions, horizons).
    """

    config: NiNoConfig
    nodes: tuple[tuple[Tensor, Tensor], ...]
    tokens: Tensor | None
    levels: tuple[Level, ...]
    convolutions: tuple[Convolution, ...]
    out_weight: Tensor
    out_bias: Tensor

    @classmethod
    def fuse(cls, config: NiNoConfig, state: Mapping[str, Tensor], device: torch.device) -> Weights:
        """Fuse the tensors of a graph network.

        Args:
            config: A graph network's config.
            state: Tensors under the published names.
            device: Where the result lives, as float32.
        """

        def get(name: str) -> tuple[Tensor, Tensor]:
            """Weight (in, out) and bias of a linear map."""
            return state[f"{name}.weight"].double().t(), state[f"{name}.bias"].double()

        def put(tensor: Tensor) -> Tensor:
            return tensor.float().contiguous().to(device)

        types = state["layer_embed.weight"].double() if config.edge_types else 0.0
        levels: list[Level] = []
        below_w, below_c = get("edge_proj.fc.0")
        if config.input_layer != "linear":
            levels.append(Level(put(below_w), put(below_c[None])))
            below_w, below_c = get("edge_proj.fc.2")
        below_c = torch.atleast_2d(below_c + types)  # e_0 = f_0 @ below_w + below_c[type]

        convolutions: list[Convolution] = []
        for n in range(config.edge_updates):
            convolutions.append(_convolution(config, get, put, n, len(levels) - 1, below_w, below_c))
            w_e, b_e = get(f"gnn.edge_update.{n}.lin_e")
            w_s, b_s = get(f"gnn.edge_update.{n}.lin_s")
            w_t, b_t = get(f"gnn.edge_update.{n}.lin_t")
            levels.append(Level(put(below_w @ w_e), put(below_c @ w_e + b_e + b_s + b_t), put(w_s), put(w_t), nodes=n))
            below_w, below_c = get(f"gnn.edge_update.{n}.lin1")
            below_c = below_c[None]

        w_z, b_z = get("edge_out.fc.0")
        levels.append(Level(put(below_w @ w_z), put(below_c @ w_z + b_z)))
        w_o, b_o = get("edge_out.fc.2")
        maps = [n for n in ("node_proj.fc.0", "node_proj.fc.2") if f"{n}.weight" in state]
        return cls(
            config=config,
            nodes=tuple((put(weight), put(bias)) for weight, bias in map(get, maps)),
            tokens=put(state["wte_pos_enc_layer.weight"]) if config.token_positions else None,
            levels=tuple(levels),
            convolutions=tuple(convolutions),
            out_weight=put(w_o.t().unflatten(0, (config.max_features, config.seq_len))),
            out_bias=put(b_o.unflatten(0, (config.max_features, config.seq_len))),
        )

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        tensors = [self.out_weight, self.out_bias, *(t for pair in self.nodes for t in pair)]
        parts: tuple[Level | Convolution, ...] = (*self.levels, *self.convolutions)
        for part in parts:
            values = (getattr(part, field.name) for field in fields(part))
            tensors += [value for value in values if isinstance(value, Tensor)]
        if self.tokens is not None:
            tensors.append(self.tokens)
        return sum(t.numel() * t.element_size() for t in tensors)


def _convolution(
    config: NiNoConfig,
    get: Callable[[str], tuple[Tensor, Tensor]],
    put: Callable[[Tensor], Tensor],
    n: int,
    level: int,
    below_w: Tensor,
    below_c: Tensor,
) -> Convolution:
    """Fuse convolution n, whose edges are ``below @ below_w + below_c[type]``."""
    d, towers = config.hidden, config.towers
    width = d // towers
    name = f"gnn.convs.{n}"
    w_enc, b_enc = get(f"{name}.edge_encoder")  # (d, 2 width): scale, then shift
    # All towers share scale and shift, so side by side they repeat; the maps of a tower see only its own slice.
    scale, shift = ((below_w @ w).repeat(1, towers) for w in w_enc.split(width, dim=1))
    scale_c, shift_c = (
        (below_c @ w + b).repeat(1, towers) for w, b in zip(w_enc.split(width, 1), b_enc.split(width), strict=True)
    )
    pre = [get(f"{name}.pre_nns.{t}.0") for t in range(towers)]  # (2 width, width): target half, source half
    post = [get(f"{name}.post_nns.{t}.0") for t in range(towers)]  # (2 width, width): own vector, mean message
    w_lin, b_lin = get(f"{name}.lin")
    return Convolution(
        level=level,
        scale=put(scale),
        scale_const=put(scale_c),
        shift=put(shift),
        shift_const=put(shift_c),
        target=put(torch.block_diag(*(w[:width] for w, _ in pre))),
        source=put(torch.block_diag(*(w[width:] for w, _ in pre))),
        bias=put(torch.cat([b for _, b in pre])),
        keep=put(torch.block_diag(*(w[:width] for w, _ in post)) @ w_lin),
        mean=put(torch.block_diag(*(w[width:] for w, _ in post)) @ w_lin),
        const=put(torch.cat([b for _, b in post]) @ w_lin + b_lin),
    )
