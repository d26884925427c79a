"""ConvNeXt of transformers."""

from __future__ import annotations

from nowcast_proto.table.elements import Neurons, Residual, Same, Stack, Table, Vector, Weight

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import CONV, NORM, OTHER, linear, norm

_CONVNEXT: Table = (
    Neurons(("x0",), fed_by=("channels",)),
    Weight("embeddings.patch_embeddings.weight", CONV, "channels", "x0"),
    Vector("embeddings.patch_embeddings.bias", OTHER, "x0"),
    *norm("embeddings.layernorm", "x0"),
    Stack(
        "encoder.stages.*.",
        (
            # b{i}.0 is the stage's input: what the stage before gave, through the downsampling where there is one.
            Same("b{i}.0", "x{i}", unless="downsampling_layer.1.weight"),
            *norm("downsampling_layer.0", "x{i}"),
            Weight("downsampling_layer.1.weight", CONV, "x{i}", "b{i}.0", required=False),
            Vector("downsampling_layer.1.bias", OTHER, "b{i}.0"),
            Neurons(("b{i}.0",)),
            Stack(
                "layers.*.",
                (
                    Same("b{i}.{m}", "x{i+1}"),
                    Neurons(("d{i}.{b}",)),
                    Neurons(("h{i}.{b}",)),
                    Neurons(("b{i}.{b+1}",)),
                    Weight("dwconv.weight", CONV, "b{i}.{b}", "d{i}.{b}", grouped=True),
                    Vector("dwconv.bias", OTHER, "d{i}.{b}"),
                    *norm("layernorm", "d{i}.{b}"),
                    *linear("pwconv1", "d{i}.{b}", "h{i}.{b}"),
                    *linear("pwconv2", "h{i}.{b}", "b{i}.{b+1}"),
                    Vector("layer_scale_parameter", NORM, "b{i}.{b+1}"),
                    Residual("res", "b{i}.{b}", "b{i}.{b+1}"),
                ),
                var="b",
                count="m",
            ),
            Neurons(("x{i+1}",)),
        ),
    ),
    *norm("layernorm", "x{n}"),
    Neurons(("labels",)),
    *linear("classifier", "x{n}", "labels", required=False),
)


FAMILIES = (Family("convnext", {"faithful": _CONVNEXT}, ("convnext.",), heads=False),)
