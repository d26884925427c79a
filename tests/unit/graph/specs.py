"""Specs made up for tests."""

from __future__ import annotations

from nowcast_proto.spec import ArchitectureSpec, Wiring


def spec_of(family: str, shapes: dict[str, tuple[int, ...]], **fields: object) -> ArchitectureSpec:
    parameters = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    return ArchitectureSpec(family=family, parameters=parameters, **fields)


def llama(
    layers: int = 2,
    width: int = 12,
    heads: int = 6,
    kv_heads: int = 2,
    hidden: int = 24,
    tokens: int = 15,
    *,
    head_dim: int | None = None,
    family: str = "llama",
    wiring: Wiring | None = None,
    biases: bool = False,
    head_norms: bool = False,
) -> ArchitectureSpec:
    size = head_dim or width // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{attention}{name}_proj.weight"] = (rows * size, width)
            if biases:
                shapes[f"{attention}{name}_proj.bias"] = (rows * size,)
        shapes[f"{attention}o_proj.weight"] = (width, heads * size)
        if head_norms:
            shapes |= {f"{attention}q_norm.weight": (size,), f"{attention}k_norm.weight": (size,)}
        shapes |= {f"{mlp}gate_proj.weight": (hidden, width), f"{mlp}up_proj.weight": (hidden, width)}
        shapes[f"{mlp}down_proj.weight"] = (width, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    return spec_of(family, shapes, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, wiring=wiring)


def gpt2(
    layers: int = 2, width: int = 6, heads: int = 2, tokens: int = 11, wiring: Wiring | None = None
) -> ArchitectureSpec:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (tokens, width),
        "transformer.wpe.weight": (3, width),
    }

    def module(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[-1:]

    for layer in range(layers):
        start = f"transformer.h.{layer}."
        module(f"{start}ln_1", width)
        module(f"{start}attn.c_attn", width, 3 * width)
        module(f"{start}attn.c_proj", width, width)
        module(f"{start}ln_2", width)
        module(f"{start}mlp.c_fc", width, 4 * width)
        module(f"{start}mlp.c_proj", 4 * width, width)
    module("transformer.ln_f", width)
    return spec_of("gpt2", shapes, num_heads=heads, wiring=wiring)
