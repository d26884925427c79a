"""All predictions of the published implementation: 11 networks, 5 checkpoints, 3 horizons."""

from __future__ import annotations

import pytest
import torch
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import load_checkpoint
from nowcast_service.predictors import make_predictor

from ..graph.golden import GOLDEN, load

pytestmark = pytest.mark.skipif(not GOLDEN, reason="recorded predictions are in ../shared/golden, which is absent")

HORIZONS = (1, 8, 40)
LIMIT = 1e-4
"""Relative error of the update, float32."""
CHECKPOINTS = ("nino_no_posw", "nino_mlp", "nino_mlp_h32", "toy_posw", "toy_deep")


WAYS = [(name, way) for name in CHECKPOINTS for way in (("wnn",) if "mlp" in name else ("engine", "twin"))]
"""Graph networks are evaluated by the engine and by its reference twin."""


def _checkpoint(name):
    folder = GOLDEN[0].parent
    if not name.startswith("toy_"):
        folder = folder.parent / "checkpoints"
    return load_checkpoint(folder / f"{name}.pt")


def _parts(spec, flat):
    pieces = flat.split([parameter.numel for parameter in spec.parameters])
    return {p.name: piece.reshape(p.shape) for p, piece in zip(spec.parameters, pieces, strict=True)}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("name", "way"), WAYS, ids="-".join)
def test_parity(path, name, way):
    checkpoint = _checkpoint(name)
    golden = load(path)
    states = torch.from_numpy(golden.arrays["states"])  # (n_params, 5)
    history = History.of(golden.spec, [_parts(golden.spec, column.contiguous()) for column in states.T])
    positions = torch.from_numpy(golden.arrays["pos"])
    predictor = make_predictor(checkpoint=checkpoint, positions=positions, reference=way == "twin")
    assert predictor.name == ("wnn" if way == "wnn" else "nino")
    if checkpoint.config.gnn:
        predictions = predictor.predict_many(history, HORIZONS)
    else:
        predictions = [predictor.predict(history, k)[0] for k in HORIZONS]
    for k, prediction in zip(HORIZONS, predictions, strict=True):
        wanted = torch.from_numpy(golden.arrays[f"pred/{name}/k{k}"])
        found = torch.cat([prediction[parameter.name].reshape(-1) for parameter in golden.spec.parameters])
        wanted = wanted - states[:, -1]
        error = (found - wanted).norm() / wanted.norm()
        assert error < LIMIT, f"k={k}: {error:.1e}"


def test_all_of_them_are_there():
    assert len(GOLDEN) == 11
    recorded = {name for path in GOLDEN for name in load(path).arrays.files if name.startswith("pred/")}
    assert recorded == {f"pred/{name}/k{k}" for name in CHECKPOINTS for k in HORIZONS}
