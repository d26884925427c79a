"""Tables of one's own: read, capped, wired, sent in a spec, checked on a live network, and refused when wrong."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from nowcast_client import attach
from nowcast_client.errors import AttachError
from nowcast_client.network.derive import derive_spec
from nowcast_proto.errors import InvalidSpec, NowcastError, UnreadableFile
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table import MAX_ELEMENTS, DeclaredTable, wired_spec
from nowcast_proto.table.expand import MAX_WORK
from nowcast_service.graph.wiring.build import build_graph

from ..command import nowcast

EXAMPLES = Path(__file__).resolve().parents[3] / "client" / "examples"
EXAMPLE = EXAMPLES / "own_network.json"
WEIGHT = {"kind": "weight", "tensor": "a.weight", "type": "linear", "source": "x", "target": "y"}
NEURONS = {"kind": "neurons", "ranges": ["y"], "fed_by": ["x"]}


@pytest.fixture(scope="module")
def document() -> dict:
    return json.loads(EXAMPLE.read_text())


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))  # for the client's process
    import own_network

    return own_network.tiny()[0]


def _layer(document: dict) -> list[dict]:
    return next(e for e in document["elements"] if e["kind"] == "stack")["elements"]


def _without(document: dict, **fields: str) -> dict:
    """The table without the element of a layer that has these fields."""
    changed = copy.deepcopy(document)
    layer = _layer(changed)
    (found,) = (e for e in layer if all(e.get(key) == value for key, value in fields.items()))
    layer.remove(found)
    return changed


def _with(document: dict, change: dict, **fields: str) -> dict:
    changed = copy.deepcopy(document)
    (found,) = (e for e in _layer(changed) if all(e.get(key) == value for key, value in fields.items()))
    found.update(change)
    return changed


def test_the_example_wires_every_tensor_and_travels_as_the_wiring_itself(model):
    spec = derive_spec(model, table=EXAMPLE)
    assert spec.graph is not None
    assert (spec.family, spec.graph.left) == (None, {})
    fixed = {range_.name for range_ in spec.graph.ranges if range_.fixed and not range_.name.startswith("#")}
    ordered = {range_.name for range_ in spec.graph.ranges if range_.ordered}
    assert (fixed, ordered) == ({"tokens", "logits"}, {"q0", "q1"})
    assert ArchitectureSpec.parse(spec.canonical()) == spec
    graph = build_graph(ArchitectureSpec.parse(spec.canonical()))
    assert graph.wiring == "faithful"
    assert all(entry.rule == "graph" for entry in graph.coverage)
    assert sum(block.n_edges * block.features for block, _ in graph.weighted()) == spec.numel


def test_attach_takes_a_table(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, mode="off", table=EXAMPLE) as handle:
        assert handle.spec == derive_spec(model, table=EXAMPLE)
    with pytest.raises(AttachError, match="both spec and table"):
        attach(model, optimizer, mode="off", table=EXAMPLE, spec=handle.spec)
    with pytest.raises(UnreadableFile, match="cannot be read"):
        attach(model, optimizer, mode="off", table=EXAMPLE.with_name("none.json"))


def test_the_digest_includes_the_wiring(model, document):
    spec = derive_spec(model, table=EXAMPLE)
    other = _with(document, {"ordered": False}, label="ask.head")
    changed = derive_spec(model, table=DeclaredTable.model_validate(other))
    assert changed.digest() != spec.digest()


def test_no_pattern_of_a_table_travels_and_what_travels_grows_with_the_network(document):
    import own_network

    table = DeclaredTable.model_validate(document)
    sizes = {}
    for layers in (2, 4, 8):
        text = derive_spec(own_network.Own(layers=layers), table=table).canonical()
        assert not set("*{}").intersection("".join(json.loads(text)["graph"]["blocks"][0].get("parameter", "")))
        assert "stack" not in text
        assert "{i" not in text
        sizes[layers] = len(text)
    assert sizes[8] - sizes[4] <= 2.1 * (sizes[4] - sizes[2])


def test_spec_check_passes_the_example(capfd, model):
    done = nowcast(capfd, "spec", "check", EXAMPLE, "--model", "own_network:tiny")
    assert done.status == 0, done.err
    assert "BROKEN" not in done.out
    assert {line.split("\t")[0] for line in done.out.splitlines()} == {"holds"}
    assert "neurons of h0, up0" in done.out
    assert not any(line.endswith(("neurons of q0", "neurons of q1")) for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        # Gate and up neurons are multiplied one by one.
        (lambda d: _without(d, label="gated.pair"), "blocks.0.up.weight"),
        # Rotary pairs have their places.
        (lambda d: _with(d, {"ordered": False}, label="ask.head"), "blocks.0.ask.weight"),
        # Values belong to the heads of their queries.
        (lambda d: _without(d, label="value.head"), "blocks.0.value.weight"),
        # The stream goes around attention.
        (lambda d: _without(d, label="attention.res"), "blocks.0"),
    ],
    ids=["gate and up apart", "rotary pairs", "values without heads", "no residual"],
)
def test_spec_check_names_what_is_wired_wrongly(capfd, tmp_path, model, document, change, named):
    table = DeclaredTable.model_validate(change(document))
    (tmp_path / "spec.json").write_text(derive_spec(model, table=table).canonical())
    done = nowcast(capfd, "spec", "check", tmp_path / "spec.json", "--model", "own_network:tiny")
    assert done.status == 2
    assert "BROKEN" in done.out
    assert "claims are broken" in done.err
    assert f"'{named}" in done.err
    assert "Traceback" not in done.err


def test_spec_show_prints_the_spec_and_the_coverage(capfd, model):
    done = nowcast(capfd, "spec", "show", "--model", "own_network:tiny", "--table", EXAMPLE)
    assert done.status == 0, done.err
    assert ArchitectureSpec.parse(done.out) == derive_spec(model, table=EXAMPLE)
    assert "parameters in the graph" in done.err
    traced = nowcast(capfd, "spec", "show", "--model", "own_network:tiny")
    assert traced.status == 0, traced.err
    assert ArchitectureSpec.parse(traced.out).kind == "traced"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("own_network", "names no function"),
        ("nowhere_at_all:f", "does not import"),
        ("own_network:none", "no function"),
    ],
)
def test_spec_check_refuses_what_is_no_model(capfd, model, reference, said):
    done = nowcast(capfd, "spec", "show", "--model", reference)
    assert done.status == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"elements": []}, "at least 1"),
        ({"family": "Own!"}, "family"),
        ({"elements": [{"kind": "magic"}]}, "magic"),
        ({"elements": [{"kind": "neurons", "ranges": ["x"], "colour": 1}]}, "colour"),
        ({"elements": [{"kind": "neurons", "ranges": ["x0:first"]}]}, "ranges"),
        ({"elements": [{"kind": "stack", "find": "(a+)+$", "elements": [NEURONS]}]}, "find"),
        ({"elements": [{"kind": "heads", "label": "a", "heads": "h", "target": "q", "count": 0}]}, "count"),
        ({"elements": [{"kind": "neurons", "ranges": ["x"]}] * (MAX_ELEMENTS + 1)}, "512"),
    ],
)  # fmt: skip
def test_malformed_tables_are_refused(document, change, said):
    with pytest.raises(InvalidSpec, match=said):
        DeclaredTable.parse(json.dumps({**document, **change}))


def test_the_caps_hold_inside_stacks():
    inner = [{"kind": "neurons", "ranges": ["x"]}] * 300
    stack = {"kind": "stack", "find": "a.*.", "elements": inner}
    with pytest.raises(InvalidSpec, match="602 elements"):
        DeclaredTable.parse(json.dumps({"family": "x", "elements": [stack, stack]}))
    deep = {"kind": "neurons", "ranges": ["x"]}
    for _ in range(4):
        deep = {"kind": "stack", "find": "a.*.", "elements": [deep]}
    with pytest.raises(InvalidSpec, match="nested 5 deep"):
        DeclaredTable.parse(json.dumps({"family": "x", "elements": [deep]}))


def test_unreadable_tables_are_told(model, tmp_path):
    with pytest.raises(UnreadableFile, match="cannot be read"):
        derive_spec(model, table=tmp_path / "none.json")


def _wired(elements: list[dict], **shapes: tuple[int, ...]) -> ArchitectureSpec:
    parameters = [{"name": name.replace("__", "."), "shape": shape} for name, shape in shapes.items()]
    spec = ArchitectureSpec(family="own", parameters=parameters, num_heads=2)
    return wired_spec(spec, DeclaredTable.model_validate({"family": "own", "elements": elements}))


@pytest.mark.parametrize(
    ("elements", "said"),
    [
        ([NEURONS, WEIGHT, {"kind": "same", "alias": "y", "range": "z"}, {"kind": "same", "alias": "z", "range": "y"}],
         "another name of itself"),
        ([NEURONS, WEIGHT, WEIGHT], "places tensor 'a.weight' twice"),
        ([NEURONS, {**WEIGHT, "cut": {"axis": 0, "index": 0, "ratio": [1, 1]}}], "places tensor 'a.weight' in part"),
        ([WEIGHT], "places no neurons"),
        ([NEURONS, WEIGHT, {"kind": "spread", "label": "s", "source": "x", "target": "y", "few": 4, "many": 2}],
         "4 heads"),
        ([NEURONS, WEIGHT, {"kind": "heads", "label": "h", "heads": "k", "target": "y", "count": 3}], "places no"),
        ([NEURONS, {**WEIGHT, "tensor": "b.weight"}], "'b.weight' is missing"),
    ],
)  # fmt: skip
def test_tables_that_contradict_the_network_are_refused(elements, said):
    with pytest.raises(NowcastError, match=said):
        _wired(elements, a__weight=(4, 4))


@pytest.mark.parametrize("field", [{"source": "x:last"}, {"target": "y:next"}, {"transposed": True}])
def test_what_published_families_alone_may_do_is_no_part_of_a_table(field):
    with pytest.raises(InvalidSpec, match="published families alone"):
        DeclaredTable.parse(json.dumps({"family": "own", "elements": [NEURONS, {**WEIGHT, **field}]}))


def test_tensors_no_element_speaks_of_fix_the_neurons_they_may_touch():
    graph = _wired([NEURONS, WEIGHT], a__weight=(4, 4), mystery=(4,)).graph
    assert graph.left == {"mystery": "no rule of table 'own' for this name"}
    assert all(range_.fixed for range_ in graph.ranges)
    scalar = _wired([NEURONS, {"kind": "neurons", "ranges": ["z"]}, WEIGHT, {**WEIGHT, "tensor": "b.weight",
                     "source": "y", "target": "z"}], a__weight=(4, 4), b__weight=(3, 4), mystery=()).graph  # fmt: skip
    assert scalar.left == {"mystery": "a scalar belongs to no neuron"}
    assert [(range_.name, range_.fixed) for range_ in scalar.ranges] == [("x", True), ("y", False), ("z", True)]


def test_a_table_may_not_make_a_small_network_expensive():
    shapes = {f"a.{number}.w": (1,) for number in range(300)}
    inner = {"kind": "stack", "find": "b.*.", "elements": [NEURONS], "required": False}
    outer = {"kind": "stack", "find": "a.*.", "elements": [inner] * 255}
    assert len(shapes) * len(shapes) * len(outer["elements"]) > MAX_WORK
    with pytest.raises(InvalidSpec, match="too large for 300 parameters"):
        _wired([outer], **shapes)


def test_mutilated_tables_end_in_a_wiring_or_a_typed_error(document, model):
    """Whatever a table says, the client answers for it, and the service takes what comes of it."""
    spec = ArchitectureSpec(
        family="own",
        num_heads=3,
        parameters=[{"name": name, "shape": list(tensor.shape)} for name, tensor in model.named_parameters()],
    )
    random.seed(0)
    outcomes = set()
    for _ in range(150):
        changed = copy.deepcopy(document)
        layer = _layer(changed)
        for _ in range(random.randint(1, 3)):
            element = random.choice(layer)
            other = random.choice(layer)
            field = random.choice([key for key in element if key != "kind"])
            action = random.randrange(3)
            if action == 0 and len(layer) > 2:
                layer.remove(element)
            elif action == 1 and field in other:
                element[field] = other[field]
            else:
                element[field] = random.choice(["q{i}", "x{i-1}", "{z}", "st", 7, "K", "up.weight", True])
        try:
            build_graph(wired_spec(spec, DeclaredTable.parse(json.dumps(changed))))
            outcomes.add("graph")
        except NowcastError as error:
            outcomes.add(type(error).__name__)
    assert {"graph", "InvalidSpec"} <= outcomes
