"""Fine-tuning with adapters: only the adapters train, so only they travel.

An adapter (LoRA and its kin, as PEFT lays them out) hangs beside a frozen network. A neural graph of the adapters alone
would be wrong and one of the whole network would send gigabytes that never change; so adapters are nowcast weight by
weight, without a graph, by the service's ``linear`` predictor unless another one without a graph is asked for. Nowcasts
of adapters have not been shown to gain anything, so by default they are only watched.
"""

from __future__ import annotations

import re

from nowcast_proto.spec import ArchitectureSpec, ParameterSpec

from nowcast_client.network.modules import Module, plain_name

ADAPTER_FAMILY = "adapters"
ADAPTER_PREDICTOR = "linear"
"""A straight line through the last snapshots, per weight: what can be said without a graph."""
ADAPTERS_WATCHED = (
    "only adapters (LoRA or its kin) train here: their nowcasts are watched, not patched (mode 'shadow'), because no "
    "gain has been shown for adapters and a straight line over a long horizon did harm; mode='on' patches them, on "
    "trial"
)
"""Said at attach where nobody chose a mode."""
_ADAPTER = re.compile(r"(^|\.)(lora_|vera_|hada_|lokr_|oft_|boft_|ia3_|adapter|prompt_encoder|modules_to_save)")


def adapter_spec(model: Module) -> ArchitectureSpec | None:
    """The spec of a model's trainable parameters where they are adapters beside frozen weights; None elsewhere.

    Args:
        model: A ``torch.nn.Module``, wrapped or not.
    """
    trained: dict[str, tuple[int, ...]] = {}
    frozen = adapters = 0
    for raw, parameter in model.named_parameters(remove_duplicate=True):
        name = plain_name(raw)
        if parameter.requires_grad:
            trained[name] = tuple(parameter.shape)
            adapters += bool(_ADAPTER.search(name))
        else:
            frozen += 1
    if not frozen or not adapters:
        return None
    return ArchitectureSpec(
        family=ADAPTER_FAMILY,
        parameters=tuple(ParameterSpec(name=name, shape=shape) for name, shape in trained.items()),
    )
