"""Checkpoints: reading the published ``.pt`` format and our own ``.safetensors``, writing the latter.

Loading is strict. The config says which tensors there must be and of what shape; anything missing, unknown, of another
shape or not finite is an error that names it. Nothing is ever unpickled beyond tensors and plain containers.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nowcast_proto.errors import InvalidCheckpoint, UnreadableFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nowcast_service.files.replacing import replacing
from nowcast_service.nino.config import NiNoConfig

if TYPE_CHECKING:
    from nowcast_service.nino.model import NiNoTwin

CONFIG_KEY = "nowcast.config"
"""Metadata key of the config in our own files."""
MAX_BYTES = 8 << 30
_BOOKKEEPING = ("step", "config", "losses")
"""What published files may hold beside weights and arguments."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained network: what it is, its tensors, and where it came from.

    Attributes:
        config: Sizes and variants.
        state: Tensor name -> float32 CPU tensor, the names of `NiNoTwin.state_dict()`.
        source: The file or registered name it was read from, for messages.
        metadata: Free text a file carries about its training; empty for published files.
    """

    config: NiNoConfig
    state: Mapping[str, Tensor]
    source: str = "memory"
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """BLAKE2b-128 of config and tensors, 32 hex digits; the same for a file and its conversion."""
        digest = hashlib.blake2b(self.config.to_json().encode(), digest_size=16)
        for name in sorted(self.state):
            tensor = self.state[name].contiguous()
            digest.update(f"\0{name}\0{list(tensor.shape)}\0".encode())
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def twin(self, *, dtype: torch.dtype = torch.float32) -> NiNoTwin:
        """The reference network with these weights, in evaluation mode."""
        from nowcast_service.nino.model import NiNoTwin  # graph libraries are slow to import, and the engine needs none

        with torch.device("meta"):
            twin = NiNoTwin(self.config)
        twin.load_state_dict({name: tensor.to(dtype).clone() for name, tensor in self.state.items()}, assign=True)
        return twin.eval()

    @classmethod
    def of(
        cls,
        config: NiNoConfig,
        state: Mapping[str, Tensor],
        *,
        source: str = "memory",
        metadata: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """Check tensors against the config.

        Raises:
            InvalidCheckpoint: A tensor is missing, unknown, of another shape, not floating point or not finite.
        """
        expected = expected_shapes(config)
        missing = [name for name in expected if name not in state]
        if missing:
            raise InvalidCheckpoint(
                f"{source} lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
                expected=f"the {len(expected)} tensors of its config",
                remedy="the file is of another network or was cut; get it again",
            )
        unknown = [name for name in state if name not in expected]
        if unknown:
            raise InvalidCheckpoint(
                f"{source} has tensor {unknown[0]!r}, which its config does not have",
                expected=f"the {len(expected)} tensors of its config",
                remedy="the file is of another network than its config says",
            )
        tensors: dict[str, Tensor] = {}
        for name, shape in expected.items():
            tensor = state[name]
            if not isinstance(tensor, Tensor):
                raise InvalidCheckpoint(f"{source}: {name!r} is a {type(tensor).__name__}", expected="a tensor")
            if tuple(tensor.shape) != shape:
                raise InvalidCheckpoint(
                    f"{source}: tensor {name!r} has shape {list(tensor.shape)}", expected=f"shape {list(shape)}"
                )
            if not tensor.is_floating_point():
                raise InvalidCheckpoint(
                    f"{source}: tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}",
                    expected="floating point",
                )
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidCheckpoint(f"{source}: tensor {name!r} has NaN or infinity", expected="finite weights")
            tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()
        return cls(config, tensors, source, dict(metadata or {}))


def expected_shapes(config: NiNoConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a network: the file format, and what `NiNoTwin.state_dict()` has."""
    d, width = config.hidden, config.hidden // config.towers
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        shapes[f"{name}.bias"] = (n_out,)

    def entry(name: str, n_in: int) -> None:
        linear(f"{name}.fc.0", n_in, d)
        if config.input_layer == "mlp":
            linear(f"{name}.fc.2", d, d)

    if config.edge_types:
        shapes["layer_embed.weight"] = (config.edge_types, d)
    entry("edge_proj", config.inputs)
    if not config.gnn:
        for number in (0, 2, 4, 6):
            linear(f"edge_mlp.fc.{number}", d, config.seq_len if number == 6 else d)
        return shapes
    if config.token_positions:
        shapes["wte_pos_enc_layer.weight"] = (config.vocab_size + 1, d)
    if config.lpe:
        entry("node_proj", config.lpe)
    for layer in range(config.layers):
        conv = f"gnn.convs.{layer}"
        linear(f"{conv}.edge_encoder", d, 2 * width)
        for tower in range(config.towers):
            linear(f"{conv}.pre_nns.{tower}.0", 2 * width, width)
            linear(f"{conv}.post_nns.{tower}.0", 2 * width, width)
        linear(f"{conv}.lin", d, d)
    for layer in range(config.edge_updates):
        for part in ("lin_e", "lin_s", "lin_t", "lin1"):
            linear(f"gnn.edge_update.{layer}.{part}", d, d)
    linear("edge_out.fc.0", d, d)
    linear("edge_out.fc.2", d, config.max_features * config.seq_len)
    return shapes


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, published ``.pt`` or our own ``.safetensors``.

    Raises:
        UnreadableFile: Missing, truncated or in neither format.
        InvalidCheckpoint: Its tensors do not fit its config, or the config is not supported.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as exc:
        raise UnreadableFile(
            f"checkpoint {path} cannot be read: {exc.strerror}", remedy="check the path, or see `nowcast weights list`"
        ) from exc
    if size > MAX_BYTES:
        raise UnreadableFile(f"checkpoint {path} has {size} bytes", expected=f"at most {MAX_BYTES}")
    if head.startswith(b"version https://git-lfs"):
        raise UnreadableFile(
            f"checkpoint {path} is a Git LFS pointer, not the file itself", remedy="fetch it with `git lfs pull`"
        )
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return _load_published(path)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as ``.safetensors`` with its config in the metadata, whole or not at all.

    Raises:
        UnreadableFile: The file cannot be written.
    """
    path = Path(path)
    metadata = {**checkpoint.metadata, CONFIG_KEY: checkpoint.config.to_json()}
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.state.items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as exc:
        raise UnreadableFile(f"checkpoint {path} cannot be written: {exc}", remedy="check the folder") from exc


def _load_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as exc:
        raise UnreadableFile(
            f"checkpoint {path} is damaged or no safetensors file: {exc}", remedy="get it again"
        ) from exc
    if CONFIG_KEY not in metadata:
        raise InvalidCheckpoint(
            f"{path} carries no network config",
            expected=f"metadata {CONFIG_KEY!r}",
            remedy="make it with `nowcast weights convert` from a published file",
        )
    config = NiNoConfig.from_json(metadata.pop(CONFIG_KEY))
    return Checkpoint.of(config, state, source=str(path), metadata=metadata)


def _load_published(path: Path) -> Checkpoint:
    try:
        # Files saved in the midst of training hold their command line as a Namespace: an inert bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # a damaged or hostile pickle raises whatever it likes; all of it means one thing
        reason = str(exc).strip().splitlines()
        raise UnreadableFile(
            f"checkpoint {path} is damaged, or holds more than tensors and plain values"
            + (f" ({reason[0]})" if reason else ""),
            expected="a published NiNo .pt file or a .safetensors file",
            remedy="get it again",
        ) from exc
    if not isinstance(content, Mapping):
        raise InvalidCheckpoint(f"{path} holds a {type(content).__name__}", expected="a mapping of tensors")
    if "state_dict" not in content:
        return Checkpoint.of(_infer(content, path), content, source=str(path))
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise InvalidCheckpoint(f"{path}: state_dict is a {type(state).__name__}", expected="a mapping of tensors")
    for name in content:
        if name not in ("state_dict", "model_args", *_BOOKKEEPING):
            raise InvalidCheckpoint(
                f"{path} has unknown entry {name!r}",
                expected="state_dict, model_args and " + ", ".join(_BOOKKEEPING),
            )
    if "model_args" in content:
        config = NiNoConfig.from_model_args(content["model_args"])
    else:
        config = _infer(state, path)
    return Checkpoint.of(config, state, source=str(path))


def _infer(state: Mapping[str, Tensor], path: Path) -> NiNoConfig:
    """Config of tensors that come without arguments: shapes tell the sizes, the rest are the published defaults."""

    def shape(name: str) -> tuple[int, ...]:
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise InvalidCheckpoint(
                f"{path} has no matrix {name!r}", expected="the tensors of a NiNo network", remedy="check the file"
            )
        return tuple(tensor.shape)

    default = NiNoConfig()
    gnn = any(str(name).startswith("gnn.") for name in state)
    deep = "edge_proj.fc.2.weight" in state
    hidden, inputs = shape("edge_proj.fc.0.weight")
    fields: dict[str, object] = {
        "gnn": gnn,
        "hidden": hidden,
        "input_layer": "mlp" if deep else "linear",
        "edge_types": shape("layer_embed.weight")[0] if "layer_embed.weight" in state else 0,
    }
    if not gnn:
        return NiNoConfig(**fields, context=inputs, seq_len=shape("edge_mlp.fc.6.weight")[0])  # type: ignore[arg-type]

    def count(prefix: str) -> int:
        return len({str(name)[len(prefix) :].split(".")[0] for name in state if str(name).startswith(prefix)})

    features, rest = divmod(inputs, default.context)
    outputs = shape("edge_out.fc.2.weight")[0]
    if rest or not features or outputs % features:
        raise InvalidCheckpoint(
            f"{path} carries no model_args and its sizes do not tell them: {inputs} inputs and {outputs} outputs",
            expected=f"inputs a multiple of context={default.context}, outputs of the kernel positions",
            remedy="save it with model_args",
        )
    tokens = "wte_pos_enc_layer.weight" in state
    layers = count("gnn.convs.")
    return NiNoConfig(
        **fields,  # type: ignore[arg-type]
        max_features=features,
        seq_len=outputs // features,
        layers=layers,
        towers=max(1, count("gnn.convs.0.pre_nns.")),
        final_edge_update=count("gnn.edge_update.") == layers,
        token_positions=tokens,
        vocab_size=shape("wte_pos_enc_layer.weight")[0] - 1 if tokens else 0,
        lpe=shape("node_proj.fc.0.weight")[1] if "node_proj.fc.0.weight" in state else 0,
    )
