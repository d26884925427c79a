"""What a NiNo checkpoint is: the sizes and variants of its network.

Published checkpoints carry the arguments of the published constructor (``model_args``), our own the fields of
`NiNoConfig` as JSON. Both end here, and whatever this project cannot evaluate faithfully is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nowcast_proto.errors import InvalidCheckpoint

ACTIVATIONS = ("silu", "relu", "gelu", "tanh")
_NONE = (None, "None", "none")
_IGNORED = ("chunk_size", "message_passing_device")
"""Published arguments that change where and in what portions things are computed, never the result."""


@dataclass(frozen=True, slots=True)
class NiNoConfig:
    """Sizes and variants of one NiNo (graph) or WNN+ (edge-wise) network; defaults are the paper's best NiNo.

    Attributes:
        gnn: Graph network (NiNo), or the edge-wise network without a graph (WNN+).
        context: Snapshots the network reads.
        seq_len: Horizons it predicts, 1 … seq_len strides ahead, each by an output of its own (section 3.3).
        hidden: Width of node and edge vectors.
        layers: Message passing layers; without meaning for the edge-wise network.
        max_features: Kernel positions per edge (9 = up to 3x3); 1 for the edge-wise network, which is applied to
            every kernel position alone.
        token_positions: Whether vocabulary nodes have an embedding of their own.
        vocab_size: Rows of that embedding, not counting row 0 for all other nodes.
        edge_types: Rows of the edge type table; 0 for none.
        lpe: Columns of the Laplacian positional encoding used as node input.
        act: Activation between linear maps.
        input_layer: ``linear``, or ``mlp`` for two maps with an activation between them.
        residual: Whether outputs are added to the newest snapshot.
        final_edge_update: Whether edges are updated after the last convolution too.
        towers: Parallel convolutions over slices of the node vector.
        update_scale: Factor on the output before it is added to the newest snapshot.
        scale_method: How parameters are scaled; ``std`` (per tensor) only.
    """

    gnn: bool = True
    context: int = 5
    seq_len: int = 40
    hidden: int = 128
    layers: int = 3
    max_features: int = 9
    token_positions: bool = True
    vocab_size: int = 50257
    edge_types: int = 15
    lpe: int = 8
    act: str = "silu"
    input_layer: str = "linear"
    residual: bool = True
    final_edge_update: bool = False
    towers: int = 1
    update_scale: float = 1.0
    scale_method: str = "std"

    def __post_init__(self) -> None:
        if not self.gnn:  # one canonical form: what the edge-wise network has no use for is not part of its identity
            for name, value in (("max_features", 1), ("layers", 0), ("lpe", 0), ("vocab_size", 0), ("towers", 1)):
                object.__setattr__(self, name, value)
            object.__setattr__(self, "token_positions", False)
            object.__setattr__(self, "final_edge_update", False)
        elif not self.token_positions:
            object.__setattr__(self, "vocab_size", 0)
        for name, low, high in (
            ("context", 1, 64),
            ("seq_len", 1, 4096),
            ("hidden", 1, 8192),
            ("layers", 1 if self.gnn else 0, 64),
            ("max_features", 1, 4096),
            ("vocab_size", 1 if self.token_positions else 0, 2**24),
            ("edge_types", 0, 4096),
            ("lpe", 0, 8),
            ("towers", 1, 64),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise _unsupported(name, value, f"an integer from {low} to {high}")
        for name in ("gnn", "token_positions", "residual", "final_edge_update"):
            if not isinstance(getattr(self, name), bool):
                raise _unsupported(name, getattr(self, name), "true or false")
        if not isinstance(self.update_scale, int | float) or isinstance(self.update_scale, bool):
            raise _unsupported("update_scale", self.update_scale, "a number")
        object.__setattr__(self, "update_scale", float(self.update_scale))
        if not abs(self.update_scale) < 1e6:
            raise _unsupported("update_scale", self.update_scale, "a finite number")
        if self.act not in ACTIVATIONS:
            raise _unsupported("act", self.act, "one of " + ", ".join(ACTIVATIONS))
        if self.input_layer not in ("linear", "mlp"):
            raise _unsupported("input_layer", self.input_layer, "linear or mlp")
        if self.scale_method != "std":
            raise _unsupported("scale_method", self.scale_method, "std")
        if self.hidden % self.towers:
            raise _unsupported("towers", self.towers, f"a divisor of hidden={self.hidden}")
        if self.gnn and not self.lpe and not self.token_positions:
            raise _unsupported("lpe", 0, "at least 1 where nodes have no token-position embedding either")

    @property
    def edge_updates(self) -> int:
        """Edge updates between convolutions."""
        return 0 if not self.gnn else self.layers - (0 if self.final_edge_update else 1)

    @property
    def inputs(self) -> int:
        """Raw inputs per edge: column ``context * position + snapshot``, oldest snapshot first."""
        return self.max_features * self.context

    def to_json(self) -> str:
        """All fields as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NiNoConfig:
        """Inverse of `to_json`.

        Raises:
            InvalidCheckpoint: Not JSON, an unknown or missing field, or an unsupported value.
        """
        try:
            fields = json.loads(text)
        except ValueError as exc:
            raise InvalidCheckpoint(f"the checkpoint's config is not JSON: {exc}") from exc
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict):
            raise InvalidCheckpoint("the checkpoint's config is not a JSON object", expected=f"fields {sorted(names)}")
        for name in fields:
            if name not in names:
                raise InvalidCheckpoint(f"the checkpoint's config has unknown field {name!r}")
        for name in sorted(names - set(fields)):
            raise InvalidCheckpoint(f"the checkpoint's config lacks field {name!r}")
        return cls(**fields)

    @classmethod
    def from_model_args(cls, args: Mapping[str, Any]) -> NiNoConfig:
        """Config from the arguments published checkpoints carry; absent ones take the published defaults.

        Raises:
            InvalidCheckpoint: An argument is unknown, or has a value this project cannot evaluate.
        """
        if not isinstance(args, Mapping) or not all(isinstance(name, str) for name in args):
            raise InvalidCheckpoint("model_args is not a mapping of argument names to values")
        fields: dict[str, Any] = {}
        for name, value in args.items():
            if name in _IGNORED:
                continue
            if name in _RENAMED:
                fields[_RENAMED[name]] = value
            elif name in _FIXED:
                if value not in _FIXED[name]:
                    raise _unsupported(name, value, " or ".join(repr(v) for v in _FIXED[name]))
            else:
                raise InvalidCheckpoint(
                    f"model argument {name!r} (= {value!r}) is not known",
                    expected="arguments of the published NiNo network",
                    remedy="convert the checkpoint with a version of Nowcast that knows it",
                )
        if fields.get("gnn", True) in _NONE:
            fields["gnn"] = False
        if fields.get("max_features", 9) is None:
            fields["max_features"] = 1
        if fields.get("act") == "swish":
            fields["act"] = "silu"
        if fields.get("input_layer", "linear") != "linear":  # published: whatever is not 'linear' is two maps
            fields["input_layer"] = "mlp" if fields["input_layer"] in ("mlp", *_NONE) else fields["input_layer"]
        for name in ("gnn", "token_positions", "residual", "final_edge_update"):
            if fields.get(name) in (0, 1):
                fields[name] = bool(fields[name])
        for name in ("lpe", "edge_types"):  # flags in places: False is 0, and True asks for the full encoding
            if isinstance(fields.get(name), bool):
                fields[name] = 0 if not fields[name] else {"lpe": 8, "edge_types": 15}[name]
        return cls(**fields)


_RENAMED = {
    "gnn": "gnn",
    "ctx": "context",
    "seq_len": "seq_len",
    "hid": "hidden",
    "layers": "layers",
    "max_feat_size": "max_features",
    "wte_pos_enc": "token_positions",
    "vocab_size": "vocab_size",
    "edge_types": "edge_types",
    "lpe": "lpe",
    "act_name": "act",
    "input_layer": "input_layer",
    "residual": "residual",
    "final_edge_update": "final_edge_update",
    "towers": "towers",
    "upd_scale": "update_scale",
    "scale_method": "scale_method",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "dms": (True,),
    "improved_graph": (True,),
    "edge_sample_ratio": (0, 1, None),  # dropping edges at random is what exact inference makes needless
    "dropout": (0,),
    "jk": (None,),
    "act_first": (False, True),  # before or after a normalisation that is not there
    "act_kwargs": (None,),
    "norm_kwargs": (None,),
    "pre_layers": (1,),
    "post_layers": (1,),
    "train_norm": (False, True),
}


def _unsupported(name: str, value: object, expected: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"model argument {name}={value!r} is not supported",
        expected=expected,
        remedy="use another checkpoint",
        detail={"argument": name},
    )
