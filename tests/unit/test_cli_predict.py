"""``nowcast predict``: the contract."""

from __future__ import annotations

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
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .command import nowcast, write_case
from .graph.golden import GOLDEN, load
from .nino.made import history, update_error
from .predict_case import SPEC, Case, change


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


def test_zero_variance_tensors_do_not_move(case):
    for name in ("nino", "wnn"):
        for number in range(5):
            change(case, number, "0.bias", torch.zeros(7))
        assert case.run(checkpoint=case.folder / f"{name}.safetensors").status == 0
        found = load_file(case.out)
        assert torch.equal(found["0.bias"], torch.zeros(7))
        assert all(torch.isfinite(tensor).all() for tensor in found.values())


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
