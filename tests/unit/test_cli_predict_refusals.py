"""``nowcast predict``: every bad input is refused by name, and nothing is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.nino.checkpoint import save_checkpoint
from safetensors.torch import save_file

from .command import write_case
from .nino.made import checkpoint, history
from .predict_case import SPEC, Case, change


@pytest.fixture
def case(tmp_path, capfd):
    return Case(tmp_path, capfd)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("1.weight", None, ["snapshot 3 of 5", "'1.weight'"]),
        ("0.bias", None, ["lacks tensor '0.bias'"]),
        ("9.weight", torch.ones(2), ["has tensor '9.weight'", "does not list"]),
        ("0.weight", torch.ones(5, 7), ["'0.weight' has shape [5, 7]", "expected shape [7, 5]"]),
        ("0.bias", torch.ones(7, dtype=torch.int32), ["'0.bias' is int32", "expected float32"]),
        ("0.bias", torch.ones(7, dtype=torch.float64), ["'0.bias' is float64", "expected float32"]),
        ("0.bias", torch.full((7,), float("nan")), ["'0.bias' has NaN or infinity", "snapshot 3 of 5"]),
        ("0.bias", torch.tensor([0.0, 1, 2, 3, 4, 5, float("-inf")]), ["'0.bias' has NaN or infinity"]),
    ],
)
def test_a_snapshot_that_does_not_fit_the_spec(case, name, tensor, words):
    change(case, 2, name, tensor)
    case.refused("invalid_snapshot", *words)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_another_number_of_snapshots_than_the_context(case, count):
    paths = (case.snapshots * 2)[:count]
    case.refused(f"{count} snapshots were given", "expected exactly 5", snapshots=paths)


@pytest.mark.parametrize("k", [0, 41, -2])
def test_a_horizon_outside_the_checkpoints(case, k):
    case.refused("horizon_out_of_range", f"k={k}", "from 1 to 40", k=k)


def test_a_horizon_that_is_no_number(case):
    case.refused("--k", "integer", k="soon")


def test_a_checkpoint_with_fewer_token_positions_than_the_vocabulary(case):
    from .graph.specs import gpt2

    spec = gpt2(layers=1)
    paths = write_case(case.folder, spec, history(spec))
    save_checkpoint(case.folder / "small.safetensors", checkpoint(token_positions=True, vocab_size=10))
    case.refused(
        "invalid_checkpoint", "for 10 tokens", "expected at least 11", snapshots=paths,
        checkpoint=case.folder / "small.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "missing", "folder"])
def test_unreadable_snapshots(case, suffix, how):
    path = case.folder / f"bad{suffix}"
    tensors = dict(case.past.snapshots[0])
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\x93" * 500}[how])
    case.refused("unreadable_file", str(path), snapshots=[*case.snapshots[:4], path])


@pytest.mark.parametrize("option", ["spec", "checkpoint", "positions"])
@pytest.mark.parametrize("how", ["missing", "garbage", "empty", "folder"])
def test_unreadable_other_files(case, option, how):
    suffix = {"spec": "json", "checkpoint": "pt", "positions": "npy"}[option]
    path = case.folder / f"bad.{suffix}"
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"garbage": b"\x93" * 500, "empty": b""}[how])
    code = "invalid_spec" if option == "spec" and how in ("garbage", "empty") else "unreadable_file"
    case.refused(code, str(path), **{option: path})


def test_what_else_a_file_can_hold(case):
    def instead(path, *words):
        case.refused(*words, snapshots=[*case.snapshots[:4], path])

    torch.save([1, 2], case.folder / "list.pt")
    instead(case.folder / "list.pt", "holds a list")
    torch.save({"0.weight": "a string"}, case.folder / "string.pt")
    instead(case.folder / "string.pt", "entry '0.weight' is a str")
    torch.save({"0.weight": torch.eye(3).to_sparse()}, case.folder / "sparse.pt")
    instead(case.folder / "sparse.pt", "'0.weight' has layout torch.sparse_coo")
    torch.save(torch.nn.Linear(2, 2), case.folder / "module.pt")
    instead(case.folder / "module.pt", "more than tensors")
    np.savez(case.folder / "ints.npz", **{"0.weight": np.ones((7, 5), dtype=np.int64)})
    instead(case.folder / "ints.npz", "array '0.weight' has dtype int64")
    np.savez(case.folder / "objects.npz", **{"0.weight": np.array([{}], dtype=object)})
    instead(case.folder / "objects.npz", "unreadable_file", "objects.npz")
    (case.folder / "weights.bin").write_bytes(b"")
    instead(case.folder / "weights.bin", "suffix '.bin'", ".safetensors, .npz, .pt")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 8), np.float32), ["shape [3, 8]", "expected shape [16, 8]"]),
        (np.zeros((16, 7), np.float32), ["shape [16, 7]", "expected shape [16, 8]"]),
        (np.zeros((16, 8)), ["float64", "expected a float32 matrix"]),
        (np.zeros(16, np.float32), ["shape [16]", "expected a float32 matrix"]),
        (np.full((16, 8), np.nan, np.float32), ["has NaN or infinity"]),
        (np.array([{}], dtype=object), ["unreadable_file"]),
    ],
    ids=["rows", "columns", "float64", "vector", "nan", "pickle"],
)
def test_positions_that_do_not_fit(case, array, words):
    nodes = build_graph(SPEC).n_nodes
    if array.shape[:1] == (16,):
        array = np.resize(array, (nodes, *array.shape[1:]))
    np.save(case.folder / "pos.npy", array)
    case.refused(*(word.replace("16", str(nodes)) for word in words), positions=case.folder / "pos.npy")


def test_an_output_that_cannot_be_written(case):
    case.refused("out", "cannot be written", out=case.folder / "no" / "out.safetensors")
    case.refused("cannot be written", out=case.folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["invalid_spec"]),
        ('{"family": "sequential"}', ["parameters"]),
        ('{"family": "sequential", "parameters": [], "colour": 1}', ["invalid_spec"]),
        ('{"family": "unheard", "parameters": [{"name": "a", "shape": [2]}]}', ["lacks tensor 'a'"]),
    ],
)
def test_specs_that_do_not_do(case, text, words):
    (case.folder / "spec.json").write_text(text)
    case.refused(*words)


def test_a_family_nobody_knows(case):
    spec = json.loads(SPEC.canonical()) | {"family": "unheard"}
    (case.folder / "spec.json").write_text(json.dumps(spec))
    case.refused("unsupported_architecture", "'unheard'", "gpt2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": None}, ["neither a predictor nor a checkpoint"]),
        ({"checkpoint": None, "predictor": "nino"}, ["predictor 'nino' needs a checkpoint"]),
        ({"predictor": "oracle"}, ["predictor 'oracle' is not known", "linear"]),
        ({"predictor": "wnn"}, ["is a graph network"]),
        ({"checkpoint": "nothing"}, ["'nothing' is neither a file nor a registered name"]),
        ({"precision": "float8"}, ["'float8'", "float32, tf32, bf16"]),
        ({"update-scale": "nan"}, ["update scale nan"]),
        ({"device": "tpu"}, ["device 'tpu' is not known"]),
        ({"device": "cuda:99"}, ["device 'cuda:99' is not there"]),
        ({"memory-budget": "lots"}, ["'lots' is not a size"]),
        ({"memory-budget": "1"}, ["memory budget"]),
        ({"uncovered": "dropped"}, ["uncovered='dropped'"]),
        ({"snapshots": []}, ["--snapshots", "at least one file"]),
        ({"spec": None}, ["--spec"]),
        ({"out": None}, ["--out"]),
    ],
    ids=str,
)
def test_options_that_cannot_be(case, options, words):
    case.refused(*words, **options)
