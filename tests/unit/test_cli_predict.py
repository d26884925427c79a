"""``nowcast predict``: the contract, every bad input, and that nothing is written on error."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_service.files.snapshots import read_snapshot
from nowcast_service.graph.positional import positional_encoding
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import save_checkpoint
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .command import nowcast, write_case
from .graph.golden import GOLDEN, load
from .nino.made import checkpoint, history, mlp, update_error

SPEC = mlp(5, 7, 4)


class Case:
    def __init__(self, folder: Path, capfd) -> None:
        self.folder, self.capfd = folder, capfd
        self.past = history(SPEC)
        self.snapshots = write_case(folder, SPEC, self.past)
        self.made, self.edgewise = checkpoint(), checkpoint(gnn=False)
        save_checkpoint(folder / "nino.safetensors", self.made)
        save_checkpoint(folder / "wnn.safetensors", self.edgewise)
        self.out = folder / "out.safetensors"
        self.before = set(folder.iterdir())

    def run(self, *more: object, **changed: object):
        """The ordinary request, with options changed or (None) left out."""
        options = {
            "spec": self.folder / "spec.json",
            "snapshots": self.snapshots,
            "checkpoint": self.folder / "nino.safetensors",
            "k": 8,
            "out": self.out,
            **changed,
        }
        args: list[object] = []
        for name, value in options.items():
            if value is not None:
                args += [f"--{name}", *(value if isinstance(value, list) else [value])]
        return nowcast(self.capfd, "predict", *args, *more)

    def refused(self, *words: str, **changed: object) -> None:
        """The request fails with status 2, one message that has all the words, no traceback, and writes nothing."""
        before = set(self.folder.iterdir())
        outcome = self.run(**changed)
        assert outcome.status == 2
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        for word in words:
            assert word in outcome.err, outcome.err
        assert set(self.folder.iterdir()) == before


@pytest.fixture
def case(tmp_path, capfd):
    return Case(tmp_path, capfd)


def test_parameters_come_out_as_the_contract_says(case):
    outcome = case.run()
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
    wanted, _ = ahead(make_predictor("nino", case.made), case.past, 8)
    found = load_file(case.out)
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        name: (shape, torch.float32) for name, shape in SPEC.shapes().items()
    }
    assert update_error(found, wanted, case.past.snapshots[-1]) < 1e-6
    umask = os.umask(0)
    os.umask(umask)
    assert case.out.stat().st_mode & 0o777 == 0o666 & ~umask
    assert set(case.folder.iterdir()) == case.before | {case.out}


@pytest.mark.parametrize("spelling", ["once", "repeated", "mixed", "last"])
def test_all_ways_to_name_the_snapshots(case, spelling):
    s = [str(path) for path in case.snapshots]
    words = {
        "once": ["--snapshots", *s, "--k", "8"],
        "repeated": [word for path in s for word in ("--snapshots", path)] + ["--k", "8"],
        "mixed": ["--snapshots", *s[:2], "--k", "8", "--snapshots", *s[2:]],
        "last": ["--k", "8", "--snapshots", *s],
    }[spelling]
    base = ["--spec", case.folder / "spec.json", "--checkpoint", case.folder / "nino.safetensors", "--out", case.out]
    assert nowcast(case.capfd, "predict", *base, *words).status == 0
    wanted, _ = ahead(make_predictor("nino", case.made), case.past, 8)
    assert update_error(load_file(case.out), wanted, case.past.snapshots[-1]) < 1e-6


def test_the_predictor_defaults_to_what_the_checkpoint_is(case):
    assert case.run(checkpoint=case.folder / "wnn.safetensors").status == 0
    wanted, _ = ahead(make_predictor("wnn", case.edgewise), case.past, 8)
    assert update_error(load_file(case.out), wanted, case.past.snapshots[-1]) < 1e-6


@pytest.mark.parametrize("name", ["linear", "lawa", "snoo", "identity"])
def test_baselines_need_no_checkpoint(case, name):
    assert case.run(checkpoint=None, predictor=name).status == 0
    wanted, _ = ahead(make_predictor(name), case.past, 8)
    found = load_file(case.out)
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)


def test_positions_update_scale_and_precision_are_used(case):
    positions = torch.randn(build_graph(SPEC).n_nodes, 8, generator=torch.Generator().manual_seed(0))
    np.save(case.folder / "pos.npy", positions.numpy())
    options = {"positions": case.folder / "pos.npy", "update-scale": 0.5, "precision": "float32"}
    assert case.run(**options).status == 0
    wanted, _ = ahead(make_predictor("nino", case.made, positions=positions), case.past, 8, update_scale=0.5)
    plain, _ = ahead(make_predictor("nino", case.made), case.past, 8)
    found, newest = load_file(case.out), case.past.snapshots[-1]
    assert update_error(found, wanted, newest) < 1e-6
    assert update_error(found, plain, newest) > 1e-2
    np.save(case.folder / "own.npy", positional_encoding(build_graph(SPEC)).numpy())
    assert case.run(positions=case.folder / "own.npy").status == 0
    assert update_error(load_file(case.out), plain, newest) < 1e-6


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_every_format_reads_the_same(case, suffix, nested):
    if nested and suffix not in (".pt", ".pth"):
        return
    paths = []
    for number, snapshot in enumerate(case.past.snapshots):
        paths.append(case.folder / f"t{number}{suffix}")
        if suffix == ".npz":
            np.savez(paths[-1], **{name: tensor.numpy() for name, tensor in snapshot.items()})
        elif suffix == ".safetensors":
            save_file(dict(snapshot), paths[-1])
        else:
            tensors = {name: tensor.t().contiguous().t() for name, tensor in snapshot.items()}  # other strides
            torch.save({"state_dict": tensors, "step": 3} if nested else tensors, paths[-1])
    assert case.run(snapshots=paths).status == 0
    wanted, _ = ahead(make_predictor("nino", case.made), case.past, 8)
    assert update_error(load_file(case.out), wanted, case.past.snapshots[-1]) < 1e-6


def test_half_precision_snapshots_give_float32(case):
    for path, snapshot in zip(case.snapshots, case.past.snapshots, strict=True):
        save_file({name: tensor.bfloat16() for name, tensor in snapshot.items()}, path)
    assert case.run().status == 0
    with safe_open(case.out, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_an_older_output_is_replaced_and_survives_a_failure(case):
    case.out.write_bytes(b"older")
    case.refused("k=41", k=41)
    assert case.out.read_bytes() == b"older"
    assert case.run().status == 0
    assert set(load_file(case.out)) == set(SPEC.shapes())


def test_verbose_times_the_phases_on_stderr(case):
    outcome = case.run("--verbose")
    assert outcome.status == 0
    assert outcome.out == ""
    for phase in ("checkpoint", "snapshots", "graph", "output", "write", "together"):
        assert f" s  {phase}" in outcome.err


def test_tensors_outside_the_graph(case):
    shapes = {"0.weight": [4, 3, 5, 5], "0.bias": [4], "2.weight": [6, 4], "2.bias": [6]}
    spec = type(SPEC)(family="sequential", parameters=[{"name": n, "shape": s} for n, s in shapes.items()])
    past = history(spec)
    paths = write_case(case.folder, spec, past)
    outcome = case.run("--verbose", snapshots=paths)
    assert outcome.status == 0
    assert "outside the graph (left): 0.weight" in outcome.err
    assert torch.equal(load_file(case.out)["0.weight"], past.newest("0.weight"))
    options = {"uncovered": "edgewise", "edgewise-checkpoint": case.folder / "wnn.safetensors"}
    assert case.run(snapshots=paths, **options).status == 0
    wanted, _ = ahead(make_predictor("wnn", case.edgewise), past, 8)
    assert torch.equal(load_file(case.out)["0.weight"], wanted["0.weight"])
    case.refused("no edge-wise checkpoint", snapshots=paths, uncovered="edgewise")


# -- bad input --


def _change(case: Case, number: int, name: str, tensor: torch.Tensor | None) -> None:
    tensors = {**load_file(case.snapshots[number]), name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, case.snapshots[number])


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
    _change(case, 2, name, tensor)
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


def test_zero_variance_tensors_do_not_move(case):
    for name in ("nino", "wnn"):
        for number in range(5):
            _change(case, number, "0.bias", torch.zeros(7))
        assert case.run(checkpoint=case.folder / f"{name}.safetensors").status == 0
        found = load_file(case.out)
        assert torch.equal(found["0.bias"], torch.zeros(7))
        assert all(torch.isfinite(tensor).all() for tensor in found.values())


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


# -- the real thing --


def _command(case: Case) -> list[str]:
    script = Path(sys.executable).with_name("nowcast")
    paths = [str(path) for path in case.snapshots]
    options = ["--spec", "spec.json", "--snapshots", *paths, "--checkpoint", "nino.safetensors", "--k", "8"]
    return [str(script), "predict", *options, "--out", "out.safetensors"]


def test_the_installed_script(case):
    done = subprocess.run(_command(case), cwd=case.folder, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted, _ = ahead(make_predictor("nino", case.made), case.past, 8)
    assert update_error(load_file(case.out), wanted, case.past.snapshots[-1]) < 1e-6


def test_a_full_disk_leaves_nothing_behind(case):
    # A limit on the size of files: names can be made, but not one byte be written, as on a disk that is full.
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *_command(case)],
        cwd=case.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "out.safetensors cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(case.folder.iterdir()) == case.before


def test_a_bar_on_a_terminal_only(case):
    ours, theirs = pty.openpty()
    done = subprocess.Popen(_command(case), cwd=case.folder, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert done.communicate(timeout=120)[0] == b""
    os.close(ours)
    assert done.returncode == 0
    assert b"predicting" in shown


def test_help_loads_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom nowcast_service.cli import main\n"
        "try:\n    main(['predict', '--help'])\nexcept SystemExit as exc:\n    assert not exc.code\n"
        "heavy = {'torch', 'torch_geometric', 'numpy', 'scipy', 'fastapi', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--snapshots" in done.stdout


@pytest.mark.skipif(not GOLDEN, reason="recorded predictions are in ../shared/golden, which is absent")
@pytest.mark.parametrize("number", range(11))
def test_recorded_predictions_through_the_command(tmp_path, capfd, number):
    golden = load(GOLDEN[number])
    names = [
        ("nino_no_posw", "checkpoints"),
        ("toy_posw", "golden"),
        ("toy_deep", "golden"),
        ("nino_mlp", "checkpoints"),
    ]
    name, folder = names[number % 4]
    k = (1, 8, 40)[number % 3]
    states = torch.from_numpy(golden.arrays["states"])
    sizes = [parameter.numel for parameter in golden.spec.parameters]
    snapshots = [
        {p.name: part.reshape(p.shape) for p, part in zip(golden.spec.parameters, column.split(sizes), strict=True)}
        for column in states.T.contiguous()
    ]
    past = History.of(golden.spec, snapshots)
    paths = write_case(tmp_path, golden.spec, past)
    np.save(tmp_path / "pos.npy", golden.arrays["pos"])
    outcome = nowcast(
        capfd, "predict", "--spec", tmp_path / "spec.json", "--snapshots", *paths, "--k", k,
        "--checkpoint", GOLDEN[0].parents[1] / folder / f"{name}.pt", "--out", tmp_path / "o.safetensors",
        *([] if name == "nino_mlp" else ["--positions", tmp_path / "pos.npy"]),
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    found = read_snapshot(tmp_path / "o.safetensors")
    flat = torch.cat([found[parameter.name].reshape(-1) for parameter in golden.spec.parameters])
    wanted = torch.from_numpy(golden.arrays[f"pred/{name}/k{k}"])
    assert (flat - wanted).norm() / (wanted - states[:, -1]).norm() < 1e-4
