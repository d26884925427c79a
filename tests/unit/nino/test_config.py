"""Published arguments to config, and what is refused."""

from __future__ import annotations

import pytest
from nowcast_proto.errors import InvalidCheckpoint
from nowcast_service.nino.config import NiNoConfig


def test_no_arguments_mean_the_papers_network():
    assert NiNoConfig.from_model_args({}) == NiNoConfig()


def test_published_names():
    config = NiNoConfig.from_model_args(
        {
            "ctx": 4,
            "hid": 32,
            "layers": 2,
            "max_feat_size": None,
            "wte_pos_enc": False,
            "act_name": "swish",
            "input_layer": "mlp",
            "upd_scale": 0.5,
            "towers": 4,
            "final_edge_update": 1,
            "chunk_size": 10**6,
            "message_passing_device": "cuda",
            "dms": True,
            "improved_graph": True,
            "edge_sample_ratio": 0.0,
        }
    )
    wanted = {"context": 4, "hidden": 32, "layers": 2, "max_features": 1, "act": "silu", "input_layer": "mlp"}
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.towers, config.update_scale, config.final_edge_update) == (4, 0.5, True)
    assert not config.token_positions
    assert config.vocab_size == 0
    assert config.edge_updates == 2
    assert config.inputs == 4


@pytest.mark.parametrize("gnn", [False, None, "None", "none"])
def test_edge_wise_network_has_one_canonical_config(gnn):
    config = NiNoConfig.from_model_args({"gnn": gnn, "hid": 32, "layers": 7, "vocab_size": 3})
    assert config == NiNoConfig(gnn=False, hidden=32)
    assert (config.max_features, config.layers, config.token_positions) == (1, 0, False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dms", False),
        ("improved_graph", False),
        ("edge_sample_ratio", 0.05),
        ("scale_method", "min-max"),
        ("act_name", "selu"),
        ("pre_layers", 2),
        ("post_layers", 3),
        ("jk", "cat"),
        ("dropout", 0.1),
        ("towers", 3),
        ("hid", "wide"),
        ("hid", 0),
        ("ctx", -5),
        ("layers", 10**9),
        ("seq_len", True),
        ("lpe", 9),
        ("upd_scale", float("nan")),
        ("input_layer", "conv"),
        ("wte_pos_enc", "yes"),
    ],
)
def test_an_unsupported_value_is_refused_by_name(argument, value):
    renamed = {"act_name": "act", "hid": "hidden", "ctx": "context", "upd_scale": "update_scale"}
    with pytest.raises(InvalidCheckpoint) as refused:
        NiNoConfig.from_model_args({argument: value})
    assert renamed.get(argument, {"wte_pos_enc": "token_positions"}.get(argument, argument)) in refused.value.message
    assert repr(value) in refused.value.message


def test_an_unknown_argument_is_refused_by_name():
    with pytest.raises(InvalidCheckpoint, match="'gating'"):
        NiNoConfig.from_model_args({"gating": True})


def test_nodes_without_any_input_are_refused():
    with pytest.raises(InvalidCheckpoint, match="lpe"):
        NiNoConfig(lpe=0, token_positions=False)


def test_json_round_trip_and_its_strictness():
    config = NiNoConfig(hidden=16, towers=2, update_scale=0.25)
    assert NiNoConfig.from_json(config.to_json()) == config
    with pytest.raises(InvalidCheckpoint, match="not JSON"):
        NiNoConfig.from_json("{")
    with pytest.raises(InvalidCheckpoint, match="not a JSON object"):
        NiNoConfig.from_json("[]")
    with pytest.raises(InvalidCheckpoint, match="unknown field 'colour'"):
        NiNoConfig.from_json(config.to_json().replace('"act"', '"colour"'))
    with pytest.raises(InvalidCheckpoint, match="lacks field 'act'"):
        NiNoConfig.from_json(config.to_json().replace('"act": "silu", ', ""))
