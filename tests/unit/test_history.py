"""Snapshots against the spec, and what a history holds."""

from __future__ import annotations

import pytest
import torch
from nowcast_proto.errors import InvalidRequest, InvalidSnapshot
from nowcast_service.commands._terminal import parse_bytes
from nowcast_service.history import History, all_finite

from .nino.made import history, mlp

SPEC = mlp(3, 4, ties={"head.weight": "0.weight"})


def test_contiguous_tensors_are_kept_where_they_are_and_others_made_so():
    snapshots = [dict(snapshot) for snapshot in history(SPEC).snapshots]
    snapshots[1]["0.weight"] = snapshots[1]["0.weight"].t().contiguous().t()
    past = History.of(SPEC, snapshots)
    assert past.snapshots[0]["0.weight"].data_ptr() == snapshots[0]["0.weight"].data_ptr()
    assert all(tensor.is_contiguous() for snapshot in past.snapshots for tensor in snapshot.values())
    assert torch.equal(past.snapshots[1]["0.weight"], snapshots[1]["0.weight"])
    assert past.flat("0.weight")[0].data_ptr() == snapshots[0]["0.weight"].data_ptr()
    assert len(past) == 5


def test_tied_aliases_are_ignored_and_gradients_left_behind():
    snapshots = [
        {name: tensor.requires_grad_() for name, tensor in snapshot.items()} | {"head.weight": torch.ones(1)}
        for snapshot in history(SPEC).snapshots
    ]
    past = History.of(SPEC, snapshots)
    assert set(past.snapshots[0]) == set(SPEC.shapes())
    assert not past.newest("0.weight").requires_grad


def test_tensors_of_one_name_must_be_in_one_place():
    snapshots = [dict(snapshot) for snapshot in history(SPEC).snapshots]
    snapshots[2]["0.bias"] = torch.empty(4, device="meta")
    with pytest.raises(InvalidSnapshot, match=r"snapshot 3 of 5: tensor '0.bias' is on meta; expected cpu"):
        History.of(SPEC, snapshots)


def test_no_snapshots_at_all():
    with pytest.raises(InvalidSnapshot, match="no snapshots"):
        History.of(SPEC, [])


@pytest.mark.parametrize("where", [0, 1 << 20, (3 << 20) - 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(where, value):
    tensor = torch.zeros(3, 1 << 20)
    assert all_finite(tensor)
    tensor.view(-1)[where] = value
    assert not all_finite(tensor)
    shapes = {"family": "sequential", "parameters": [{"name": "0.weight", "shape": [3, 1 << 20]}]}
    spec = type(SPEC).model_validate(shapes)
    with pytest.raises(InvalidSnapshot, match=r"'0.weight' has NaN or infinity"):
        History.of(spec, [{"0.weight": tensor}])


@pytest.mark.parametrize(
    ("text", "size"), [("1500", 1500), ("2K", 2048), ("1.5MiB", 3 << 19), ("2 GB", 2 << 30), ("1t", 1 << 40)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "2X", "G", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(InvalidRequest, match="is not a size"):
        parse_bytes(text)
