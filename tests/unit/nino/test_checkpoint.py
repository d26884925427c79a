"""Reading and writing checkpoints, and everything that must not pass for one."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import stat

import pytest
import torch
from nowcast_proto.errors import InvalidCheckpoint, UnreadableFile
from nowcast_service.nino.checkpoint import (
    CONFIG_KEY,
    Checkpoint,
    expected_shapes,
    load_checkpoint,
    save_checkpoint,
)
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.model import NiNoTwin
from safetensors.torch import save_file

from .made import checkpoint

VARIANTS = [
    {},
    {"gnn": False},
    {"gnn": False, "input_layer": "mlp"},
    {"towers": 4},
    {"input_layer": "mlp"},
    {"final_edge_update": True, "layers": 2},
    {"edge_types": 0},
    {"token_positions": True, "vocab_size": 12, "lpe": 0},
    {"token_positions": True, "vocab_size": 12},
    {"max_features": 1, "seq_len": 7, "context": 3},
    {"layers": 1},
]


def _args(config: NiNoConfig) -> dict:
    return {
        "gnn": config.gnn,
        "ctx": config.context,
        "seq_len": config.seq_len,
        "hid": config.hidden,
        "layers": config.layers,
        "max_feat_size": config.max_features,
        "wte_pos_enc": config.token_positions,
        "vocab_size": config.vocab_size,
        "edge_types": config.edge_types,
        "lpe": config.lpe,
        "input_layer": config.input_layer,
        "towers": config.towers,
        "final_edge_update": config.final_edge_update,
    }


def _equal(one: Checkpoint, other: Checkpoint) -> bool:
    return one.config == other.config and all(torch.equal(one.state[n], other.state[n]) for n in one.state)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_the_format_is_what_the_twin_has(fields):
    config = NiNoConfig(**{"hidden": 8, "token_positions": False, **fields})
    twin = NiNoTwin(config)
    assert expected_shapes(config) == {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_both_formats_give_back_what_was_written(tmp_path, fields):
    made = checkpoint(**fields)
    torch.save({"state_dict": dict(made.state), "model_args": _args(made.config), "step": 7}, tmp_path / "a.pt")
    published = load_checkpoint(tmp_path / "a.pt")
    assert _equal(published, made)
    save_checkpoint(tmp_path / "a.safetensors", published)
    own = load_checkpoint(tmp_path / "a.safetensors")
    assert _equal(own, made)
    assert own.digest == made.digest
    assert own.metadata == {}


@pytest.mark.parametrize("fields", [v for v in VARIANTS if "context" not in v], ids=str)
def test_bare_tensors_tell_their_sizes(tmp_path, fields):
    made = checkpoint(**fields)
    torch.save(dict(made.state), tmp_path / "bare.pt")
    assert _equal(load_checkpoint(tmp_path / "bare.pt"), made)


def test_a_file_saved_in_training_with_its_command_line(tmp_path):
    made = checkpoint()
    content = {
        "state_dict": dict(made.state),
        "model_args": _args(made.config),
        "step": 400,
        "config": argparse.Namespace(lr=1e-3, device="cuda"),
        "losses": [0.5, 0.4],
    }
    torch.save(content, tmp_path / "a.pt")
    assert _equal(load_checkpoint(tmp_path / "a.pt"), made)


def test_the_digest_knows_values_and_config():
    made = checkpoint()
    state = {name: tensor.clone() for name, tensor in made.state.items()}
    assert Checkpoint.of(made.config, state).digest == made.digest
    state["edge_out.fc.2.bias"][0] += 1e-3
    assert Checkpoint.of(made.config, state).digest != made.digest
    assert checkpoint(update_scale=0.5).digest != made.digest


def test_metadata_travels(tmp_path):
    made = checkpoint()
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(made.config, made.state, metadata={"trained_on": "tests"}))
    assert load_checkpoint(tmp_path / "a.safetensors").metadata == {"trained_on": "tests"}


def test_saving_is_whole_or_not_at_all_and_respects_the_umask(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", checkpoint())
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(UnreadableFile, match="cannot be written"):
        save_checkpoint(tmp_path / "missing" / "a.safetensors", checkpoint())


def _broken(name, tensor):
    def change(state):
        state[name] = tensor if isinstance(tensor, torch.Tensor) else tensor(state[name])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("edge_out.fc.0.bias"), "lacks tensor 'edge_out.fc.0.bias'"),
        (_broken("gnn.convs.0.norm.weight", torch.ones(8)), "has tensor 'gnn.convs.0.norm.weight'"),
        (_broken("edge_out.fc.0.bias", torch.ones(9)), r"'edge_out.fc.0.bias' has shape \[9\]; expected shape \[8\]"),
        (_broken("edge_out.fc.0.bias", torch.ones(8, dtype=torch.int64)), "'edge_out.fc.0.bias' is int64"),
        (_broken("edge_out.fc.0.bias", lambda t: t * float("nan")), "'edge_out.fc.0.bias' has NaN"),
        (lambda state: state.update({"edge_out.fc.0.bias": 3}), "'edge_out.fc.0.bias' is a int"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    made = checkpoint()
    state = dict(made.state)
    change(state)
    torch.save({"state_dict": state, "model_args": _args(made.config)}, tmp_path / "a.pt")
    with pytest.raises(InvalidCheckpoint, match=message):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_at_any_tenth_is_unreadable(tmp_path, suffix):
    made = checkpoint()
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": dict(made.state), "model_args": _args(made.config)}, whole)
    else:
        save_checkpoint(whole, made)
    content = whole.read_bytes()
    for tenth in range(10):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(UnreadableFile, match="damaged"):
            load_checkpoint(cut)


def test_what_is_no_checkpoint(tmp_path):
    def refused(name, content, error, message):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(error, match=message):
            load_checkpoint(path)

    refused("text.pt", b"hello, world", UnreadableFile, "damaged")
    refused("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", UnreadableFile, "LFS pointer")
    refused("list.pt", [torch.ones(2)], InvalidCheckpoint, "holds a list")
    refused("other.pt", {"weight": torch.ones(2, 2)}, InvalidCheckpoint, "no matrix 'edge_proj.fc.0.weight'")
    refused("extra.pt", {"state_dict": {}, "optimizer": {}}, InvalidCheckpoint, "unknown entry 'optimizer'")
    refused("args.pt", {"state_dict": {}, "model_args": [1]}, InvalidCheckpoint, "model_args is not a mapping")
    with pytest.raises(UnreadableFile, match="No such file"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UnreadableFile, match="cannot be read"):
        load_checkpoint(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(InvalidCheckpoint, match="no network config"):
        load_checkpoint(tmp_path / "plain.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "config.safetensors", {CONFIG_KEY: json.dumps({"hidden": 8})})
    with pytest.raises(InvalidCheckpoint, match="lacks field"):
        load_checkpoint(tmp_path / "config.safetensors")


class _Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_file_is_executed(tmp_path):
    proof = tmp_path / "proof"
    for number, save in enumerate((torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)))):
        path = tmp_path / f"hostile{number}.pt"
        save({"state_dict": _Hostile(f"touch {proof}")}, path)
        with pytest.raises(UnreadableFile, match="more than tensors"):
            load_checkpoint(path)
    assert not proof.exists()


def test_half_precision_is_widened(tmp_path):
    made = checkpoint()
    torch.save({n: t.half() for n, t in made.state.items()}, tmp_path / "half.pt")
    loaded = load_checkpoint(tmp_path / "half.pt")
    assert {tensor.dtype for tensor in loaded.state.values()} == {torch.float32}


def test_a_twin_keeps_to_itself():
    made = checkpoint()
    before = made.digest
    twin = made.twin()
    for one, other in itertools.pairwise(twin.parameters()):
        one.data += 1
        other.data += 1
    assert made.digest == before
