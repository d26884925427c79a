"""Any network is wired from its computation, and what is claimed of it is true: judged by a program of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from nowcast_client import derive_spec
from nowcast_client.network.prove import prove
from nowcast_client.network.trace import trace
from nowcast_proto.wiring import ExplicitWiring
from torch import Tensor, nn

from tests.bench.judge import Judge, Verdict

WIDTH = 8


class Net(nn.Module):
    """A network from named layers and a function of them and the input."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._run(self, *inputs)


def mlp(middle: Callable[[Net, Tensor], Tensor], **parts: nn.Module | Tensor) -> Net:
    """Ten inputs, sixteen hidden neurons that something is done to, three outputs."""
    return Net(lambda net, x: net.out(middle(net, net.inp(x))), inp=nn.Linear(10, 16), out=nn.Linear(16, 3), **parts)


def attention(net: Net, x: Tensor, *, heads: int = 2, kv: int = 2, bias: Tensor | None = None) -> Tensor:
    """Scores and sums written out."""
    b, t, _ = x.shape
    q, k, v = (m(x).view(b, t, n, -1).transpose(1, 2) for m, n in ((net.q, heads), (net.k, kv), (net.v, kv)))
    k, v = (z.repeat_interleave(heads // kv, 1) for z in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    return x + net.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


def attending(kv: int = 2, **more: object) -> Net:
    inner = WIDTH // 2 * kv
    return Net(
        lambda net, x: net.out(attention(net, net.inp(x), kv=kv, **more)),  # type: ignore[arg-type]
        inp=nn.Linear(5, WIDTH),
        q=nn.Linear(WIDTH, WIDTH),
        k=nn.Linear(WIDTH, inner),
        v=nn.Linear(WIDTH, inner),
        o=nn.Linear(WIDTH, WIDTH),
        out=nn.Linear(WIDTH, 3),
    )


def rows() -> tuple[Tensor, ...]:
    return (torch.randn(4, 10),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randn(2, 6, 5),)


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


def document(wiring: ExplicitWiring) -> dict[str, Any]:
    """The wiring as ``nowcast graph --json`` prints it."""
    ranges = [{**one.model_dump(), "first": first} for one, first in zip(wiring.ranges, wiring.firsts(), strict=True)]
    blocks = [block.model_dump() for block in wiring.blocks]
    return {"n_nodes": wiring.n_nodes, "ranges": ranges, "blocks": blocks, "left": dict(wiring.left)}


def judged(model: nn.Module, wiring: ExplicitWiring, inputs: tuple[Tensor, ...]) -> Verdict:
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    live = dict(model.named_parameters())
    tensors = {name: tensor.detach().clone() for name, tensor in live.items()}

    @torch.no_grad()
    def outputs(changed: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in changed.items():
            live[name].copy_(tensor)
        return model(*inputs).clone()

    return Judge(document(wiring), tensors, outputs).judge()


HEADS_APART = torch.tensor([0.5, 0.25]).view(2, 1, 1) * torch.arange(6.0)

FREE = {
    "relu": (lambda: mlp(lambda net, h: F.relu(h)), rows),
    "gate": (lambda: mlp(lambda net, h: h * torch.sigmoid(net.g(h)), g=nn.Linear(16, 16)), rows),
    "residual": (lambda: mlp(lambda net, h: h + net.b(F.relu(h)), b=nn.Linear(16, 16)), rows),
    "layer norm": (lambda: mlp(lambda net, h: net.n(h), n=nn.LayerNorm(16)), rows),
    "group norm": (lambda: mlp(lambda net, h: net.n(h), n=nn.GroupNorm(4, 16)), rows),
    "groups": (lambda: mlp(lambda net, h: h.view(-1, 4, 4).softmax(-1).flatten(1)), rows),
    "concatenation": (
        lambda: Net(
            lambda net, x: net.c(torch.cat([net.a(x), x, net.b(x)], 1)),
            a=nn.Linear(10, 6),
            b=nn.Linear(10, 7),
            c=nn.Linear(23, 3),
        ),
        rows,
    ),
    "split": (
        lambda: Net(lambda net, x: net.b(net.a(x)[:, :8] * net.a(x)[:, 8:]), a=nn.Linear(10, 16), b=nn.Linear(8, 3)),
        rows,
    ),
    "layer twice": (lambda: mlp(lambda net, h: net.b(F.relu(net.b(h))), b=nn.Linear(16, 16)), rows),
    "flattened pixels": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)),
        images,
    ),
    "grouped convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        images,
    ),
    "depthwise 7x7": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 7, padding=3, groups=8),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        images,
    ),
    "channel shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ChannelShuffle(2),
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        images,
    ),
    "attention": (attending, tokens),
    "shared keys": (lambda: attending(kv=1), tokens),
    "weight norm": (lambda: _normed(), rows),
    "lstm": (
        lambda: Net(lambda net, x: net.out(net.r(x)[0][:, -1]), r=nn.LSTM(5, 8, batch_first=True), out=nn.Linear(8, 3)),
        tokens,
    ),
    "transformer layer": (
        lambda: Net(
            lambda net, x: net.out(net.t(net.inp(x))),
            inp=nn.Linear(5, 8),
            t=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            out=nn.Linear(8, 3),
        ),
        tokens,
    ),
}
"""Networks nearly all of whose elements can be moved, each by another rule."""


def _normed() -> nn.Module:
    net = mlp(lambda net, h: F.relu(h))
    nn.utils.parametrizations.weight_norm(net.inp)
    return net


@pytest.mark.parametrize("what", FREE)
def test_what_may_move_does_and_keeps_the_function(what: str) -> None:
    torch.manual_seed(0)
    make, inputs = FREE[what]
    model, given = make().eval(), inputs()
    found = trace(model, given)
    assert not found.unknown
    proof = prove(model, found.wiring, given)
    assert proof.proven
    assert not proof.demoted
    verdict = judged(model, proof.wiring, given)
    assert verdict.false == []
    assert verdict.share > 0.8
    assert proof.share == pytest.approx(verdict.share, abs=0.1)


STILL: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "sorting": (lambda: mlp(lambda net, h: h.sort(dim=-1).values), rows),
    "cumulative sums": (lambda: mlp(lambda net, h: h.cumsum(-1)), rows),
    "a buffer": (lambda: mlp(lambda net, h: h * net.scale, scale=torch.linspace(0.2, 2, 16)), rows),
    "rolling": (lambda: mlp(lambda net, h: h + h.roll(1, -1)), rows),
    "local response norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        images,
    ),
}
"""Networks whose hidden neurons are known by their place."""


@pytest.mark.parametrize("what", STILL)
def test_what_is_known_by_its_place_stays(what: str) -> None:
    torch.manual_seed(0)
    make, inputs = STILL[what]
    model, given = make().eval(), inputs()
    verdict = judged(model, trace(model, given).wiring, given)
    assert verdict.false == []
    assert verdict.share < 0.1


def test_slopes_tell_heads_apart_and_not_their_neurons() -> None:
    torch.manual_seed(0)
    plain, apart = attending(), attending(bias=HEADS_APART)
    for model, swaps in ((plain, True), (apart, False)):
        wiring = trace(model.eval(), tokens()).wiring
        heads = {block.source for block in wiring.blocks if block.type == "head"}
        fixed = {
            first + place
            for one, first in zip(wiring.ranges, wiring.firsts(), strict=True)
            if one.fixed
            for place in range(one.size)
        }
        assert bool(heads - fixed) is swaps
        verdict = judged(model, wiring, tokens())
        assert verdict.false == []
        assert verdict.share > 0.9


def test_a_false_claim_is_taken_back_by_name() -> None:
    torch.manual_seed(0)
    model, given = mlp(lambda net, h: h.cumsum(-1)).eval(), rows()
    honest = trace(model, given).wiring
    claims = ExplicitWiring(
        ranges=tuple(one.model_copy(update={"fixed": False}) if one.size == 16 else one for one in honest.ranges),
        blocks=honest.blocks,
    )
    assert judged(model, claims, given).false
    proof = prove(model.float(), claims, given)
    assert list(proof.demoted) == [one.name for one in honest.ranges if one.size == 16]
    assert judged(model, proof.wiring, given).false == []


NOISY = {
    "latent": lambda: mlp(lambda net, h: h + torch.randn_like(h) * F.softplus(net.s(h)), s=nn.Linear(16, 16)),
    "drawn in place": lambda: mlp(lambda net, h: h + torch.empty_like(h).normal_()),
    "dropout at all times": lambda: mlp(lambda net, h: F.dropout(F.relu(h), 0.5, training=True)),
    "mask": lambda: mlp(lambda net, h: torch.where(torch.rand_like(h) < 0.3, 0.1, h)),
}


@pytest.mark.parametrize("what", NOISY)
def test_noise_that_treats_all_alike_tells_no_neurons_apart(what: str) -> None:
    torch.manual_seed(0)
    model, given = NOISY[what]().eval(), rows()
    proof = prove(model, trace(model, given).wiring, given)
    assert proof.proven
    assert not proof.demoted
    assert proof.share > 0.8


@pytest.mark.parametrize("what", ["scaled", "means", "chances"])
def test_noise_that_does_not_is_seen_by_the_proof(what: str) -> None:
    torch.manual_seed(0)
    scale = torch.linspace(0.2, 2, 16)
    noisy = {
        "scaled": lambda net, h: h + torch.randn_like(h) * net.scale,
        "chances": lambda net, h: h * torch.bernoulli((net.scale / 2).expand_as(h)),
        "means": lambda net, h: h + torch.normal(net.scale.expand_as(h), 1.0),
    }[what]
    model, given = mlp(noisy, scale=scale).eval(), rows()
    honest = trace(model, given).wiring
    claims = ExplicitWiring(
        ranges=tuple(one.model_copy(update={"fixed": False}) if one.size == 16 else one for one in honest.ranges),
        blocks=honest.blocks,
    )
    assert prove(model, claims, given).demoted


def test_an_unknown_operation_fixes_what_it_meets_and_is_named() -> None:
    model = mlp(lambda net, h: torch.linalg.qr(h.view(-1, 4, 4))[0].flatten(1)).eval()
    found = trace(model, rows())
    assert any("qr" in name for name in found.unknown)
    assert judged(model, found.wiring, rows()).false == []


def test_a_trace_leaves_the_network_as_it_was() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.kept = nn.Linear(10, 4), nn.BatchNorm1d(4), None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.layer(x) if self.kept is None else self.kept
            return self.norm(self.layer(x)) + 0 * self.kept

    model = Keeps().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = rows()
    state = torch.random.get_rng_state()
    prove(model, trace(model, given).wiring, given)
    assert model.kept is None
    assert model.training
    assert model.norm.training
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_spec_from_an_example_carries_the_graph_and_every_parameter() -> None:
    model = FREE["gate"][0]()
    for parameter in model.inp.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    spec = derive_spec(model, example=(rows(), {}))
    assert spec.graph is not None
    assert spec.family is None
    assert set(spec.shapes()) == {name for name, _ in model.named_parameters()}


def test_a_chain_stays_a_family_and_what_only_looks_like_one_does_not() -> None:
    chain = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    assert derive_spec(chain, example=(rows(), {})).family == "sequential"

    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 4, 4).softmax(-1).flatten(1)

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.sort(self.a(x), dim=-1).values)
            return out

    assert derive_spec(Sorted(), example=(rows(), {})).family is None

    grouped = nn.Sequential(nn.Linear(10, 16), Softmax(), nn.Linear(16, 3))
    assert derive_spec(grouped, example=(rows(), {})).family is None
