"""Residual networks of torchvision and transformers."""

from __future__ import annotations

from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table.elements import Neurons, Residual, Same, Stack, Weight

from nowcast_service.graph.families.family import Expansion, Family
from nowcast_service.graph.families.parts import CONV, linear, norm


def _resnet(spec: ArchitectureSpec) -> Expansion:
    """Names of transformers or torchvision; a block has as many convolutions as it has, basic or bottleneck."""

    def block(find: str, shortcut: str, shortcut_norm: str, convolutions: Stack) -> Stack:
        return Stack(
            find,
            (
                Weight(f"{shortcut}.weight", CONV, "x{i}", "x{i+1}", required=False),
                *norm(shortcut_norm, "x{i+1}"),
                Residual("res", "x{i}", "x{i+1}", unless=f"{shortcut}.weight"),
                convolutions,
                Neurons(("x{i+1}",)),
            ),
        )

    def convolutions(find: str, convolution: str, after: str, *, relative: bool) -> Stack:
        return Stack(
            find,
            (
                Same("c{i}.0", "x{i}"),
                Same("c{i}.{m}", "x{i+1}"),
                Neurons(("c{i}.{c+1}",)),
                Weight(f"{convolution}.weight", CONV, "c{i}.{c}", "c{i}.{c+1}", grouped=True),
                *norm(after, "c{i}.{c+1}"),
            ),
            var="c",
            count="m",
            relative=relative,
        )

    if any(name.startswith("layer1.") for name in spec.shapes()):
        stem, stem_norm, head = "conv1", "bn1", "fc"
        blocks = block(
            "layer*.*.",
            "downsample.0",
            "downsample.1",
            convolutions("conv*.", "conv{c#}", "bn{c#}", relative=False),
        )
    else:
        stem, stem_norm, head = "embedder.embedder.convolution", "embedder.embedder.normalization", "classifier.1"
        blocks = block(
            "encoder.stages.*.layers.*.",
            "shortcut.convolution",
            "shortcut.normalization",
            convolutions("layer.*.", "convolution", "normalization", relative=True),
        )
    return Expansion(
        (
            Neurons(("x0",), fed_by=("channels",)),
            Weight(f"{stem}.weight", CONV, "channels", "x0"),
            *norm(stem_norm, "x0"),
            blocks,
            Neurons(("labels",)),
            *linear(head, "x{n}", "labels", required=False),
        ),
        {},
    )


FAMILIES = (Family("resnet", {"faithful": _resnet}, ("resnet.",), heads=False),)
