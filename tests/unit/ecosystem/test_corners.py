"""The corners where tools that change weights usually break; each test fails without the handling it is about."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from nowcast_client.errors import AttachError
from torch import Tensor, nn

from .loops import Watched, backwards, digits, equal, network, step, steps, weights


def test_accumulation_patches_only_between_optimizer_steps() -> None:
    """The weights never change between two micro-batches of one step."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[bool] = []
    watched = Watched(model, optimizer)
    data = digits()
    for _ in range(45):
        optimizer.zero_grad()
        held = weights(model)
        for _ in range(3):
            x, y = next(data)
            loss = nn.functional.cross_entropy(model(x), y) / 3
            loss.backward()
            watched.handle.observe(loss * 3)
            seen.append(equal(held, weights(model)))
        optimizer.step()
    assert all(seen)
    assert watched.handle.step == 45
    assert watched.steps("patched") == [20, 40]


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_amp_steps_are_no_steps(fused: bool) -> None:
    """A fused optimizer is called even where gradient scaling skips: only ``found_inf`` tells."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10_000)
    watched = Watched(model, optimizer)
    data = digits()
    for number in range(1, 25):
        x, y = next(data)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if number in (3, 10, 11) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert watched.handle.step == 21
    assert watched.steps("patched") == [20]
    held = next(iter(watched.service.sessions.values()))[1]
    assert sorted(held) == [4, 8, 12, 16, 20]


def test_a_compiled_model_is_patched_without_recompiling() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch._dynamo.reset()
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    watched = Watched(compiled, optimizer)
    x, _ = next(digits())
    data = digits()
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(45):
        step(compiled, optimizer, data)
    assert watched.steps("patched") == [20, 40]
    assert len(compilations) == 1
    # A CUDA graph replays on the addresses it was recorded with: a patch must not move the weights elsewhere.
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert not any("_orig_mod" in name for name in watched.sent())
    # What is compiled computes with the patched weights.
    torch.testing.assert_close(compiled(x), nn.Sequential.forward(model, x))


def gpt2(**config: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, **config))


def read(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Steps of a language model on random tokens."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.randint(0, 32, (4, 8), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def test_tied_weights_travel_once_and_stay_tied() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = Watched(model, optimizer)
    read(model, optimizer, 20)
    assert watched.steps("patched") == [20]
    assert "transformer.wte.weight" in watched.sent()
    assert "lm_head.weight" not in watched.sent()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_frozen_parameters_neither_travel_nor_move() -> None:
    model = network()
    model[0].requires_grad_(False)
    held = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = Watched(model, optimizer)
    data = digits()
    for _ in range(20):
        step(model, optimizer, data)
    assert watched.steps("patched") == [20]
    assert set(watched.sent()) == {"2.weight", "2.bias"}
    assert torch.equal(model[0].weight, held["0.weight"])


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def test_only_adapters_travel_when_only_they_train() -> None:
    model = lora()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    moved: list[dict[str, Tensor]] = []
    watched = Watched(
        model, optimizer, mode="on", on_event=lambda e: moved.append(weights(model)) if e.kind == "patched" else 0
    )
    read(model, optimizer, 19)
    before = weights(model)
    read(model, optimizer, 1)
    assert watched.steps("patched") == [20]
    sent = watched.sent()
    assert sent
    assert all(".lora_" in name for name in sent)
    assert watched.handle.spec.family == "adapters"
    assert {job.predictor for job in watched.service.jobs.values()} == {"linear"}
    assert all(torch.equal(frozen[name], model.get_parameter(name)) for name in frozen)
    assert not equal(before, moved[0])


def test_adapters_are_only_watched_unless_somebody_chose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    watched = Watched(model, optimizer)
    watched.handle.close()
    assert watched.handle.mode == "shadow"
    assert any("adapters" in line and "shadow" in line and "no gain" in line for line in caplog.messages)
    monkeypatch.setenv("NOWCAST_MODE", "on")
    chosen = Watched(model, optimizer)
    chosen.handle.close()
    assert chosen.handle.mode == "on"


def test_several_optimizers_count_once_and_roll_back_together() -> None:
    model = network()
    body = torch.optim.AdamW(model[0].parameters(), lr=1e-3)
    head = torch.optim.SGD(model[2].parameters(), lr=1e-2, momentum=0.9)
    stepped = {"body": 0, "head": 0}
    body.register_step_post_hook(lambda *_: stepped.__setitem__("body", stepped["body"] + 1))
    head.register_step_post_hook(lambda *_: stepped.__setitem__("head", stepped["head"] + 1))
    counts: list[tuple[int, int]] = []
    states: dict[int, list[Tensor]] = {}
    watched = Watched(
        model,
        [body, head],
        backwards,
        trial=True,
        period=30,
        on_event=lambda e: counts.append((stepped["body"], stepped["head"])) if e.kind == "patched" else None,
    )
    data = digits()
    for number in range(1, 41):
        x, y = next(data)
        body.zero_grad()
        head.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        watched.handle.observe(loss + 100.0 * (number > 30))
        body.step()
        head.step()
        moments = [body.state[model[0].weight]["exp_avg"], head.state[model[2].weight]["momentum_buffer"]]
        states[number] = [moment.clone() for moment in moments]
    assert watched.handle.step == 40
    assert counts == [(30, 30)]
    assert watched.steps("rolled_back") == [40]
    assert all(torch.equal(a, b) for a, b in zip(states[40], states[30], strict=True))


def test_clipped_gradients_are_left_as_they_were() -> None:
    """What a logger or a later clip reads after the step is this step's gradients, patch or not."""
    norms: dict[str, list[float]] = {"on": [], "off": []}
    for mode, found in norms.items():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        watched = Watched(model, optimizer, mode=mode)
        data = digits()
        for _ in range(20):
            x, y = next(data)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            found.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        assert watched.steps("patched") == ([20] if mode == "on" else [])
    assert norms["on"] == norms["off"]


def test_a_rollback_leaves_the_schedule_where_it_is() -> None:
    """The step of a rollback keeps the rate and the cycled momentum of now; only the moments go back."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=100)
    twin = torch.optim.SGD(network().parameters(), lr=1e-2, momentum=0.9)
    expected = torch.optim.lr_scheduler.OneCycleLR(twin, max_lr=2e-2, total_steps=100)
    watched = Watched(model, optimizer, backwards, trial=True, period=30)
    data = digits()
    for number in range(1, 46):
        x, y = next(data)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        watched.handle.observe(loss + 100.0 * (number > 30))
        optimizer.step()
        twin.step()
        for key in ("lr", "momentum"):  # before the schedule sets them anew
            assert optimizer.param_groups[0][key] == twin.param_groups[0][key]
        schedule.step()
        expected.step()
    assert watched.steps("rolled_back") == [40]


def test_activation_checkpointing_changes_nothing() -> None:
    """Its wrappers leave the names alone, and the second forward pass sees the weights of the first."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = []
    for wrap in (False, True):
        model = network()
        if wrap:
            model[0] = checkpoint_wrapper(model[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        watched = Watched(model, optimizer)
        data = digits()
        for _ in range(25):
            step(model, optimizer, data)
        assert watched.steps("patched") == [20]
        found.append((watched.handle.spec.digest(), sorted(watched.sent()), list(weights(model).values())))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_resume_in_the_middle_of_a_window() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = Watched(model, optimizer)
    data = digits()
    for _ in range(10):
        step(model, optimizer, data)
    assert first.handle.wait(10)
    saved = first.handle.state_dict()
    restored = network()
    restored.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(restored.parameters(), lr=1e-3)
    fresh.load_state_dict(optimizer.state_dict())
    again = Watched(restored, fresh)
    again.service.sessions = first.service.sessions
    again.handle.load_state_dict(saved)
    for _ in range(10):
        step(restored, fresh, data)
    assert again.handle.step == 20
    assert [job.steps for job in again.service.jobs.values()] == [(4, 8, 12, 16, 20)]
    assert again.steps("patched") == [20]


def test_a_model_swapped_under_the_hook() -> None:
    """Other tensors of the same network are followed from then on; another network turns nowcasting off."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    watched = Watched(model, optimizer)
    data = digits()
    for _ in range(10):
        step(model, optimizer, data)
    old = model[0]
    model[0] = nn.Linear(64, 24)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    held = old.weight.detach().clone()
    for _ in range(30):
        step(model, optimizer, data)
    assert "parameters were replaced" in watched.reasons("skipped")
    assert watched.steps("patched")
    assert torch.equal(old.weight, held)
    model[0] = nn.Linear(64, 12)
    model[2] = nn.Linear(12, 10)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(RuntimeWarning, match="no longer the one it was attached to"):
        steps(20, model, optimizer, data)
    assert watched.handle.mode == "off"


def test_no_optimizer_yet_is_a_clear_error() -> None:
    with pytest.raises(AttachError, match=r"no optimizer yet.*attach after it has been created"):
        Watched(network(), None)


def test_an_optimizer_created_after_attach_is_followed() -> None:
    model = network()
    watched = Watched(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched.handle.follow(optimizer)
    data = digits()
    for _ in range(20):
        step(model, optimizer, data)
    assert watched.steps("patched") == [20]
    with pytest.raises(AttachError, match="holds none"):
        watched.handle.follow(torch.optim.SGD(network().parameters(), lr=1e-2))


def test_an_optimizer_nobody_told_about_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import nowcast_client.loop.steps as module

    monkeypatch.setattr(module, "SILENT_REPORTS", 30)
    model = network()
    watched = Watched(model, torch.optim.SGD(model.parameters(), lr=1e-2), trial=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = digits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(35):
            step(model, optimizer, data, watched.handle)
    assert watched.reasons("skipped").count("made no step") == 1
