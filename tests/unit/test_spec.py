from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nowcast_proto.errors import InvalidSpec, UnreadableFile
from nowcast_proto.spec import ArchitectureSpec

NAMES = st.text(min_size=1, max_size=12)
SHAPES = st.lists(st.integers(1, 50), max_size=4)


@st.composite
def documents(draw) -> dict:
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    document: dict = {
        "family": draw(st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)),
        "parameters": [{"name": name, "shape": draw(SHAPES)} for name in names],
    }
    if draw(st.booleans()):
        kv_heads = draw(st.integers(1, 4))
        document |= {"num_kv_heads": kv_heads, "num_heads": kv_heads * draw(st.integers(1, 4))}
    if draw(st.booleans()):
        document["wiring"] = draw(st.sampled_from(["published", "faithful"]))
    alias = draw(NAMES)
    if alias not in names:
        document["ties"] = {alias: draw(st.sampled_from(names))}
    return document


@given(documents(), st.randoms(use_true_random=False))
def test_the_canonical_form_is_a_fixed_point_and_does_not_depend_on_spelling(document, random):
    spec = ArchitectureSpec.parse(json.dumps(document))
    again = ArchitectureSpec.parse(spec.canonical())
    assert again == spec
    assert again.canonical() == spec.canonical()
    keys = list(document)
    random.shuffle(keys)
    spelled = {key: document[key] for key in keys} | {"head_dim": None}
    assert ArchitectureSpec.parse(json.dumps(spelled, indent=3, ensure_ascii=False)).digest() == spec.digest()


@given(documents(), documents())
def test_equal_digests_mean_equal_specs(first, second):
    a, b = (ArchitectureSpec.parse(json.dumps(document)) for document in (first, second))
    assert (a.digest() == b.digest()) == (a == b)


def test_the_order_of_parameters_is_part_of_the_digest():
    parameters = [{"name": "a", "shape": [2]}, {"name": "b", "shape": [2]}]
    forward, backward = (ArchitectureSpec(family="x", parameters=p) for p in (parameters, parameters[::-1]))
    assert forward.digest() != backward.digest()


def test_a_changed_copy_has_a_digest_of_its_own():
    spec = ArchitectureSpec(family="sequential", parameters=({"name": "a", "shape": (2, 3)},))
    before = spec.digest()
    changed = spec.model_copy(update={"wiring": "faithful"})
    assert changed.digest() == ArchitectureSpec.parse(changed.canonical()).digest() != before
    assert spec.model_copy().digest() == before


def test_a_long_spec_is_written_out_as_a_short_one_is():
    """The canonical form is made piece by piece; it is that of the whole."""
    ranges = [{"name": f"r{n}", "size": 1 + n % 2, "fixed": n == 0} for n in range(700)]
    blocks = [
        {"type": "other", "parameter": f"p\u00e9{n}", "source": n, "n_sources": 1, "target": n + 1, "n_targets": 1}
        for n in range(600)
    ]
    spec = ArchitectureSpec.model_validate(
        {
            "parameters": [{"name": f"p\u00e9{n}", "shape": [1]} for n in range(601)],
            "num_heads": 2,
            "ties": {"z": "p\u00e90"},
            "graph": {"ranges": ranges, "blocks": blocks, "left": {"p\u00e9600": "why not"}},
        }
    )
    for one in (spec, ArchitectureSpec(family="x", parameters=spec.parameters, wiring="faithful")):
        fields = one.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        assert one.canonical() == json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def test_the_digest_is_a_recorded_value():
    """A change here invalidates every cached graph and every session under way."""
    spec = ArchitectureSpec(family="gpt2", parameters=[{"name": "wte.weight", "shape": [3, 2]}], num_heads=1)
    assert spec.canonical() == '{"family":"gpt2","num_heads":1,"parameters":[{"name":"wte.weight","shape":[3,2]}]}'
    assert spec.digest() == "f2e54f813d19f573ad0ddcdbeb5d7a9f"


BAD = [
    ("not json", "document"),
    ("{}", "parameters"),
    ('{"family": "x", "parameters": []}', "parameters"),
    ('{"family": "X!", "parameters": [{"name": "a", "shape": [1]}]}', "family"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [0]}]}', "shape"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [-1]}]}', "shape"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1.5]}]}', "shape"),
    ('{"family": "x", "parameters": [{"name": "", "shape": [1]}]}', "name"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 1]}]}', "shape"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}, {"name": "a", "shape": [1]}]}', "more than once"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "head": 3}', "head"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "num_heads": 0}', "num_heads"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "num_kv_heads": 2}', "without num_heads"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "num_heads": 3, "num_kv_heads": 2}', "multiple"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "ties": {"b": "c"}}', "not listed"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "ties": {"a": "a"}}', "of its own"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1]}], "wiring": "other"}', "wiring"),
    ('{"family": "x", "parameters": [{"name": "a", "shape": [1099511627776, 1099511627776]}]}', "shape"),
]


@pytest.mark.parametrize(("text", "named"), BAD, ids=range(len(BAD)))
def test_bad_documents_name_what_is_wrong(text, named):
    with pytest.raises(InvalidSpec) as caught:
        ArchitectureSpec.parse(text, origin="net.json")
    assert caught.value.message.startswith("net.json: ")
    assert named in caught.value.message


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UnreadableFile, match=r"nowhere\.json"):
        ArchitectureSpec.read(tmp_path / "nowhere.json")


def test_a_scalar_has_one_element_and_kv_heads_fall_back():
    spec = ArchitectureSpec(family="x", parameters=[{"name": "s", "shape": []}], num_heads=4)
    assert spec.numel == 1
    assert spec.kv_heads == 4
