"""The predictors around trained networks: nino and wnn."""

from __future__ import annotations

import pytest
import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidCheckpoint, InvalidRequest, InvalidSnapshot
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.graph.positional import positional_encoding
from nowcast_service.graph.pyg import scatter, to_pyg
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.history import History
from nowcast_service.nino.scaling import scale_snapshots, scales_of
from nowcast_service.predictors import make_predictor, wnn
from nowcast_service.predictors.base import ahead
from nowcast_service.predictors.graphs import Graphs, Needs, coverage

from ..nino.made import checkpoint, convnet, history, mlp, update_error

SPEC = mlp(5, 7, 4)
GPT2 = ArchitectureSpec(
    family="gpt2",
    num_heads=2,
    parameters=[
        {"name": name, "shape": shape}
        for name, shape in {
            "transformer.wte.weight": [11, 6],
            "transformer.wpe.weight": [3, 6],
            "transformer.h.0.ln_1.weight": [6],
            "transformer.h.0.ln_1.bias": [6],
            "transformer.h.0.attn.c_attn.weight": [6, 18],
            "transformer.h.0.attn.c_attn.bias": [18],
            "transformer.h.0.attn.c_proj.weight": [6, 6],
            "transformer.h.0.attn.c_proj.bias": [6],
            "transformer.h.0.ln_2.weight": [6],
            "transformer.h.0.ln_2.bias": [6],
            "transformer.h.0.mlp.c_fc.weight": [6, 24],
            "transformer.h.0.mlp.c_fc.bias": [24],
            "transformer.h.0.mlp.c_proj.weight": [24, 6],
            "transformer.h.0.mlp.c_proj.bias": [6],
            "transformer.ln_f.weight": [6],
            "transformer.ln_f.bias": [6],
        }.items()
    ],
)


def _with_a_big_kernel() -> ArchitectureSpec:
    """A 5x5 convolution, which no 3x3 checkpoint can take, before a linear layer."""
    shapes = {"0.weight": [4, 3, 5, 5], "0.bias": [4], "2.weight": [6, 4], "2.bias": [6]}
    return ArchitectureSpec(family="sequential", parameters=[{"name": n, "shape": s} for n, s in shapes.items()])


def _frozen(past: History, name: str, value: float) -> History:
    tensor = torch.full(past.spec.shapes()[name], value)
    return History.of(past.spec, [{**snapshot, name: tensor} for snapshot in past.snapshots])


@pytest.mark.parametrize("spec", [SPEC, convnet(), GPT2], ids=["mlp", "convnet", "gpt2"])
def test_engine_and_twin_agree_through_the_predictor(spec):
    past, made = history(spec), checkpoint()
    fast = make_predictor("nino", made).predict_many(past, [1, 17])
    slow = make_predictor("nino", made, reference=True).predict_many(past, [1, 17])
    for one, other in zip(fast, slow, strict=True):
        assert update_error(one, other, nothing(spec)) < 1e-4


def test_one_horizon_is_the_same_as_among_many():
    past, predictor = history(SPEC), make_predictor("nino", checkpoint())
    many = predictor.predict_many(past, [3, 40, 12])
    for k, wanted in zip([3, 40, 12], many, strict=True):
        alone, state = predictor.predict(past, k)
        assert state == {}
        assert update_error(alone, wanted, nothing(SPEC)) < 1e-6


@pytest.mark.parametrize("spec", [SPEC, convnet(), GPT2, _with_a_big_kernel()], ids=["mlp", "conv", "gpt2", "5x5"])
@pytest.mark.parametrize("fields", [{}, {"input_layer": "mlp", "act": "gelu"}, {"edge_types": 0, "residual": False}])
def test_wnn_is_the_twin_on_every_edge(spec, fields, monkeypatch):
    monkeypatch.setitem(wnn.CHUNK, "cpu", 23)  # many ragged tiles
    past, made = history(spec), checkpoint(gnn=False, **fields)
    found, _ = ahead(make_predictor("wnn", made), past, 9)
    graph = build_graph(spec, max_features=25)
    scales = scales_of(past)
    scaled = scale_snapshots(past, scales)
    with torch.no_grad():
        out = made.twin()(to_pyg(graph, scaled, max_features=graph.features), 9)
    wanted = {name: scales[name].invert(tensor) for name, tensor in scatter(graph, out).items()}
    assert wanted.keys() == found.keys()
    assert update_error(found, wanted, past.snapshots[-1]) < 1e-5


def nothing(spec: ArchitectureSpec) -> dict[str, torch.Tensor]:
    """What displacements are measured from."""
    return {name: torch.zeros(shape) for name, shape in spec.shapes().items()}


def test_wnn_tells_its_progress():
    seen, timings = [], {}
    predictor = make_predictor("wnn", checkpoint(gnn=False), progress=lambda *at: seen.append(at), timings=timings)
    predictor.predict(history(SPEC), 9)
    assert seen[-1] == (SPEC.numel, SPEC.numel)
    assert timings["network"] > 0


@pytest.mark.parametrize("kind", ["nino", "nino reference", "wnn"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_a_tensor_without_variance_neither_divides_by_zero_nor_moves(kind, value):
    past = _frozen(history(SPEC), "0.bias", value)
    made = checkpoint(gnn=kind != "wnn")
    future, _ = ahead(make_predictor(kind.split()[0], made, reference="reference" in kind), past, 8)
    assert torch.equal(future["0.bias"], past.newest("0.bias"))
    assert not torch.equal(future["0.weight"], past.newest("0.weight"))
    assert all(torch.isfinite(tensor).all() for tensor in future.values())


def test_a_network_where_nothing_varies_stays():
    past = History.of(SPEC, [{name: torch.ones(shape) for name, shape in SPEC.shapes().items()}] * 5)
    for made in (checkpoint(), checkpoint(gnn=False)):
        future, _ = ahead(make_predictor(checkpoint=made), past, 8)
        assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in future.values())


def test_predictions_are_new_tensors():
    for made in (checkpoint(), checkpoint(gnn=False)):
        past = _frozen(history(_with_a_big_kernel()), "0.bias", 1.0)
        before = [{name: tensor.clone() for name, tensor in snapshot.items()} for snapshot in past.snapshots]
        future, _ = ahead(make_predictor(checkpoint=made), past, 8)
        for tensor in future.values():
            tensor.add_(1)
        for one, other in zip(before, past.snapshots, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_tensors_outside_the_graph_are_left_or_predicted_edge_wise_as_chosen():
    spec = _with_a_big_kernel()
    past, made, edgewise = history(spec), checkpoint(), checkpoint(1, gnn=False)
    left = make_predictor("nino", made)
    future, _ = ahead(left, past, 8)
    assert [entry.parameter for entry in coverage(Graphs(), spec, left.needs) if entry.rule != "graph"] == ["0.weight"]
    assert torch.equal(future["0.weight"], past.newest("0.weight"))
    sent = make_predictor("nino", made, uncovered="edgewise", edgewise=edgewise)
    mixed, _ = ahead(sent, past, 8)
    alone, _ = ahead(make_predictor("wnn", edgewise), past, 8)
    assert torch.equal(mixed["0.weight"], alone["0.weight"])
    assert torch.equal(mixed["2.weight"], future["2.weight"])
    assert {entry.parameter: entry.rule for entry in coverage(Graphs(), spec, sent.needs)}["0.weight"] == "edgewise"


def test_positions_can_be_given_and_matter():
    past, made = history(SPEC), checkpoint()
    graph = build_graph(SPEC)
    own = positional_encoding(graph)
    plain, _ = ahead(make_predictor("nino", made), past, 8)
    same, _ = ahead(make_predictor("nino", made, positions=own), past, 8)
    other, _ = ahead(make_predictor("nino", made, positions=own + 1), past, 8)
    assert update_error(same, plain, past.snapshots[-1]) < 1e-6
    assert update_error(other, plain, past.snapshots[-1]) > 1e-2
    with pytest.raises(InvalidSnapshot, match=rf"shape \[3, 8\]; expected shape \[{graph.n_nodes}, 8\]"):
        ahead(make_predictor("nino", made, positions=torch.zeros(3, 8)), past, 8)


@pytest.mark.parametrize("n", [4, 6])
@pytest.mark.parametrize("gnn", [True, False])
def test_another_number_of_snapshots_than_the_context_is_refused(gnn, n):
    with pytest.raises(InvalidSnapshot, match=f"{n} snapshots were given; expected exactly 5"):
        ahead(make_predictor(checkpoint=checkpoint(gnn=gnn)), history(SPEC, n), 1)


@pytest.mark.parametrize("k", [0, -3, 41])
@pytest.mark.parametrize("gnn", [True, False])
def test_a_horizon_the_network_does_not_have_is_refused(gnn, k):
    with pytest.raises(HorizonOutOfRange, match=f"k={k}; expected a whole number of strides from 1 to 40"):
        ahead(make_predictor(checkpoint=checkpoint(gnn=gnn)), history(SPEC), k)


@pytest.mark.parametrize("reference", [False, True])
def test_a_vocabulary_larger_than_the_checkpoints_is_refused(reference):
    fits = make_predictor("nino", checkpoint(token_positions=True, vocab_size=11), reference=reference)
    assert fits.predict(history(GPT2), 3)[0]
    small = make_predictor("nino", checkpoint(token_positions=True, vocab_size=10), reference=reference)
    with pytest.raises(InvalidCheckpoint, match="for 10 tokens, the model has 11; expected at least 11"):
        small.predict(history(GPT2), 3)


def test_a_table_of_edge_types_that_is_too_small_is_refused():
    for gnn in (True, False):
        with pytest.raises(InvalidCheckpoint, match="has 5 edge types, the graph of family 'gpt2' uses type 13"):
            ahead(make_predictor(checkpoint=checkpoint(gnn=gnn, edge_types=5)), history(GPT2), 3)


def test_the_wrong_kind_of_checkpoint_is_refused():
    with pytest.raises(InvalidCheckpoint, match="is an edge-wise network"):
        make_predictor("nino", checkpoint(gnn=False))
    with pytest.raises(InvalidCheckpoint, match="is a graph network"):
        make_predictor("wnn", checkpoint())
    with pytest.raises(InvalidCheckpoint, match="no edge-wise checkpoint is given"):
        make_predictor("nino", checkpoint(), uncovered="edgewise")
    with pytest.raises(InvalidCheckpoint, match="is a graph network"):
        make_predictor("nino", checkpoint(), uncovered="edgewise", edgewise=checkpoint())
    with pytest.raises(InvalidCheckpoint, match="reads 3 snapshots; expected 5"):
        make_predictor("nino", checkpoint(), uncovered="edgewise", edgewise=checkpoint(gnn=False, context=3))
    with pytest.raises(InvalidRequest, match="uncovered='dropped'"):
        make_predictor("nino", checkpoint(), uncovered="dropped")


def test_precision_is_checked():
    with pytest.raises(InvalidRequest, match="'float8' is not known"):
        make_predictor("nino", checkpoint(), precision="float8")
    with pytest.raises(InvalidRequest, match="not available for predictor wnn"):
        make_predictor("wnn", checkpoint(gnn=False), precision="bf16")
    with pytest.raises(InvalidRequest, match="not available for the reference"):
        make_predictor("nino", checkpoint(), precision="bf16", reference=True)


def test_graphs_are_built_once_per_architecture_and_forgotten_in_time():
    graphs, needs = Graphs(), Needs(9, positions=True)
    specs = [mlp(3, n) for n in range(2, 12)]
    first = graphs.prepared(specs[0], needs)
    assert graphs.prepared(mlp(3, 2), needs) is first
    for spec in specs[1:]:
        graphs.prepared(spec, needs)
    assert graphs.prepared(specs[0], needs) is not first


@pytest.mark.parametrize(
    ("shape", "kind"), [((), "OTHER"), ((4,), "OTHER"), ((4, 5), "LINEAR"), ((4, 5, 3), "CONV"), ((2, 2, 2, 2), "CONV")]
)
def test_type_of_a_tensor_of_no_known_role(shape, kind):
    assert wnn.type_of_shape(shape).name == kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["nino", "nino reference", "wnn"])
def test_on_a_gpu_with_snapshots_on_either_side(kind, home):
    past, made, reference = history(GPT2), checkpoint(gnn=kind != "wnn"), "reference" in kind
    wanted, _ = ahead(make_predictor(checkpoint=made, reference=reference), past, 8)
    there = History.of(GPT2, [{name: tensor.to(home) for name, tensor in snap.items()} for snap in past.snapshots])
    found, _ = ahead(make_predictor(checkpoint=made, reference=reference, device="cuda"), there, 8)
    assert {tensor.device.type for tensor in found.values()} == {home}
    assert update_error({n: t.cpu() for n, t in found.items()}, wanted, past.snapshots[-1]) < 1e-4
