"""Architectures, histories and a checkpoint for the engine's benchmarks; made up, as weights do not change the cost."""

from __future__ import annotations

import torch
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint, expected_shapes
from nowcast_service.nino.config import NiNoConfig
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def gpt2(width: int, layers: int, tokens: int, heads: int) -> ArchitectureSpec:
    """GPT-2 as transformers names it, output tied to the token embedding."""
    shapes: Shapes = {"transformer.wte.weight": (tokens, width), "transformer.wpe.weight": (1024, width)}

    def module(name: str, *weight: int) -> None:
        shapes[f"transformer.{name}.weight"] = weight
        shapes[f"transformer.{name}.bias"] = weight[-1:]

    for layer in range(layers):
        module(f"h.{layer}.ln_1", width)
        module(f"h.{layer}.attn.c_attn", width, 3 * width)
        module(f"h.{layer}.attn.c_proj", width, width)
        module(f"h.{layer}.ln_2", width)
        module(f"h.{layer}.mlp.c_fc", width, 4 * width)
        module(f"h.{layer}.mlp.c_proj", 4 * width, width)
    module("ln_f", width)
    return _spec("gpt2", shapes, num_heads=heads)


def llama(width: int, layers: int, hidden: int, tokens: int, heads: int, kv_heads: int) -> ArchitectureSpec:
    """Llama 3 with grouped queries and an output matrix of its own."""
    size = width // heads
    shapes: Shapes = {"model.embed_tokens.weight": (tokens, width)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes[f"{name}self_attn.q_proj.weight"] = (heads * size, width)
        shapes[f"{name}self_attn.k_proj.weight"] = (kv_heads * size, width)
        shapes[f"{name}self_attn.v_proj.weight"] = (kv_heads * size, width)
        shapes[f"{name}self_attn.o_proj.weight"] = (width, heads * size)
        shapes[f"{name}mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{name}mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{name}mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{name}input_layernorm.weight"] = (width,)
        shapes[f"{name}post_attention_layernorm.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    return _spec("llama", shapes, num_heads=heads, num_kv_heads=kv_heads)


def _spec(family: str, shapes: Shapes, **heads: int) -> ArchitectureSpec:
    parameters = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    return ArchitectureSpec(family=family, parameters=parameters, **heads)


MODELS = {
    "gpt2-24x2-1k": lambda: gpt2(24, 2, 1000, 3),
    "gpt2-24x3-50k": lambda: gpt2(24, 3, 50257, 3),
    "gpt2-64x3-50k": lambda: gpt2(64, 3, 50257, 4),
    "gpt2-192x4-50k": lambda: gpt2(192, 4, 50257, 6),
    "llama-192x6-128k": lambda: llama(192, 6, 768, 128256, 6, 2),
    "llama-384x6-128k": lambda: llama(384, 6, 1536, 128256, 6, 2),
}
"""Name -> spec, from 66 thousand edges to 111 million."""


def history(spec: ArchitectureSpec) -> History:
    """Five snapshots, drifting."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in spec.shapes().items()}
    drift = {name: 1e-3 * torch.randn(shape, generator=draw) for name, shape in spec.shapes().items()}
    snapshots = [weights]
    for _ in range(4):
        snapshots.append(
            {name: w + drift[name] * (0.5 + torch.rand(1, generator=draw)) for name, w in snapshots[-1].items()}
        )
    return History.of(spec, snapshots)


def checkpoint() -> Checkpoint:
    """The size of the published NiNo, d = 128 and three layers, without token positions."""
    config = NiNoConfig(token_positions=False)
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=draw) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in expected_shapes(config).items()
    }
    return Checkpoint.of(config, state)


def graph_and_positions(spec: ArchitectureSpec) -> tuple[NeuralGraph, Tensor]:
    """The neural graph and a positional encoding of the right size (its own is not what is measured here)."""
    graph = build_graph(spec)
    positions = torch.randn(graph.n_nodes, 8, generator=torch.Generator().manual_seed(0))
    return graph, positions / graph.n_nodes**0.5
