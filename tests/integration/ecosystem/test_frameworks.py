"""What the framework adapters promise beyond running: where they act, what they log, how they resume."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nowcast_client import TrialSettings
from nowcast_client.handle import Handle
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from . import ranks

pytestmark = pytest.mark.socket
SETTINGS: dict[str, Any] = {**ranks.SETTINGS, "trial": TrialSettings(window=6, reference=15)}


def data(count: int) -> TensorDataset:
    batches = ranks.batches(0)
    drawn = [next(batches) for _ in range(count)]
    return TensorDataset(torch.cat([x for x, _ in drawn]), torch.cat([y for _, y in drawn]))


# ------------------------------------------------------------------ Hugging Face


class Classifier(nn.Module):
    """Takes and returns what a Trainer expects of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ranks.network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.rows = data(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.rows[index]
        return {"x": x, "labels": y}


def trainer(folder: Path, steps: int, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given = {"logging_steps": 5, "save_strategy": "no", "report_to": [], "disable_tqdm": True, **arguments}
    return Trainer(
        Classifier(),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            use_cpu=True,
            **given,
        ),
        train_dataset=Rows(60),
    )


def test_trainer_acts_at_the_end_of_a_step_and_logs_through_the_trainer(url: str, tmp_path: Path) -> None:
    """With accumulation and clipping: weights stay as they are from the first micro-batch to the end of the step."""
    from nowcast_client.integrations.huggingface import add_nowcast
    from transformers import TrainerCallback

    made = trainer(tmp_path, 30, gradient_accumulation_steps=2, max_grad_norm=0.5)
    seen: list[tuple[str, int]] = []
    held: dict[str, Tensor] = {}
    moved: list[str] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held.update({n: p.detach().clone() for n, p in kwargs["model"].named_parameters()})

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moved.extend(n for n, p in kwargs["model"].named_parameters() if not torch.equal(p, held[n]))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("optimizer step", state.global_step + 1))

    made.add_callback(Watch())
    callback = add_nowcast(made, url, on_event=lambda e: seen.append((e.kind, e.step)), **SETTINGS)
    made.train()
    assert not moved
    assert callback.summary["steps"] == 30
    assert callback.summary["patched"] == 1
    assert seen.index(("patched", 20)) > seen.index(("optimizer step", 20))
    logged = [entry for entry in made.state.log_history if entry.get("nowcast/patched")]
    assert [entry["step"] for entry in logged] == [20]
    assert any("nowcast/kept" in entry or "nowcast/rolled_back" in entry for entry in made.state.log_history)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: torch.load(saved(model), weights_only=False),
    "average": lambda model: AveragedModel(model).module,
}


def saved(model: nn.Module) -> io.BytesIO:
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return held


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    "moment", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log"]
)
def test_a_user_s_callback_copies_the_model(way: str, moment: str, url: str, tmp_path: Path) -> None:
    """At any moment; and the losses a copy computes are not the training's."""
    from nowcast_client.integrations.huggingface import add_nowcast
    from transformers import TrainerCallback

    made = trainer(tmp_path, 3, gradient_accumulation_steps=2, logging_steps=1)
    computed: list[float] = []
    heard: list[float] = []

    class Copies(TrainerCallback):
        pass

    def copied(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clone = COPIES[way](kwargs["model"]).train()
        row = Rows(1)[0]
        computed.append(clone(row["x"][None], row["labels"][None])["loss"].item())
        assert b"nowcast" not in pickle.dumps(kwargs["model"])

    setattr(Copies, moment, copied)
    callback = add_nowcast(made, url, **SETTINGS)
    made.add_callback(Copies())
    observe = Handle.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handle, "observe", lambda self, loss, **k: (heard.append(float(loss)), observe(self, loss, **k)))
        made.train()
    assert len(computed) >= 3
    assert callback.summary["steps"] == 3
    assert len(heard) == 6
    assert not set(computed) & set(heard)
    assert not made.model._forward_hooks


def test_nowcast_numbers_share_the_rows_of_the_trainer(url: str, tmp_path: Path) -> None:
    """What reports sees one call per entry of the Trainer's, the nowcast numbers in it: a run's step stays its own."""
    from nowcast_client.integrations.huggingface import add_nowcast
    from transformers import TrainerCallback

    told: list[dict[str, float]] = []

    class Reports(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told.append(dict(logs))

    made = trainer(tmp_path, 50, logging_steps=50)
    made.add_callback(Reports())
    add_nowcast(made, url, **{**SETTINGS, "trial": False})
    made.train()
    assert len(told) == 2  # the losses, and what the Trainer says at its end
    assert told[0]["loss"] > 0
    assert told[0]["nowcast/patched"] == 2.0
    assert told[0]["nowcast/step"] == 40.0


def test_trainer_without_itself_gets_the_numbers_in_its_next_entry(url: str, tmp_path: Path) -> None:
    from nowcast_client.integrations.huggingface import NowcastCallback

    made = trainer(tmp_path, 30)
    made.add_callback(NowcastCallback(url, **SETTINGS))
    made.train()
    assert [entry["step"] for entry in made.state.log_history if entry.get("nowcast/patched")] == [20]


def test_trainer_takes_the_logged_loss_where_the_model_shows_none(url: str, tmp_path: Path) -> None:
    from nowcast_client.integrations.huggingface import add_nowcast

    made = trainer(tmp_path, 45, logging_steps=1, torch_compile=True, torch_compile_backend="eager")
    settings = {**SETTINGS, "period": 40, "trial": TrialSettings(window=5, reference=30, min_tail=1)}
    callback = add_nowcast(made, url, **settings)
    made.train()
    assert callback.summary["patched"] == 1
    assert callback.summary["kept"] + callback.summary["rolled_back"] == 1


def test_trainer_resumes_in_the_middle_of_a_window(url: str, tmp_path: Path) -> None:
    from nowcast_client.integrations.huggingface import add_nowcast

    first = trainer(tmp_path, 12, save_strategy="steps", save_steps=12)
    add_nowcast(first, url, **{**SETTINGS, "total_steps": 30})
    kept = first.callback_handler.callbacks[0]
    first.train()
    again = trainer(tmp_path, 30)
    callback = add_nowcast(again, url, **{**SETTINGS, "trial": False})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert callback.summary["steps"] == 30
    assert kept.summary["snapshots"] == 3
    # The snapshots of steps 4, 8 and 12 count as taken: the counters went on.
    assert callback.summary["snapshots"] == 7


# --------------------------------------------------------------------- Lightning


def module(manual: bool = False) -> Any:
    import lightning

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = ranks.network()
            self.automatic_optimization = not manual
            self.forwarded: dict[str, Tensor] = {}
            self.moved = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.forwarded = {n: p.detach().clone() for n, p in self.named_parameters()}
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            if manual:
                body, head = self.optimizers()
                body.zero_grad()
                head.zero_grad()
                self.manual_backward(loss)
                body.step()
                head.step()
            return loss

        def on_after_backward(self) -> None:
            self.moved += any(not torch.equal(p, self.forwarded[n]) for n, p in self.named_parameters())

        def configure_optimizers(self) -> Any:
            if manual:
                return [
                    torch.optim.AdamW(self.network[0].parameters(), lr=2e-3),
                    torch.optim.SGD(self.network[2].parameters(), lr=2e-2),
                ]
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    return Digits()


def fit(folder: Path, made: Any, callback: Any, steps: int, **arguments: Any) -> Any:
    import lightning

    resumed = {name: arguments.pop(name) for name in ("ckpt_path", "weights_only") if name in arguments}
    runner = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=callback if isinstance(callback, list) else [callback],
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "enable_checkpointing": False, **arguments},
    )
    runner.fit(made, DataLoader(data(100), 32), **resumed)
    return runner


@pytest.mark.parametrize("parts", [1, 2])
def test_lightning_never_patches_between_forward_and_backward(parts: int, url: str, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger
    from nowcast_client.integrations.lightning import NowcastCallback

    made = module()
    callback = NowcastCallback(url, **SETTINGS)
    logger = CSVLogger(tmp_path)
    fit(tmp_path, made, callback, 30, accumulate_grad_batches=parts, logger=logger, gradient_clip_val=0.5)
    assert made.moved == 0
    assert callback.summary["steps"] == 30
    assert callback.summary["patched"] == 1
    assert callback.summary["kept"] + callback.summary["rolled_back"] == 1
    logger.save()
    assert "nowcast/patched" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_lightning_s_module_is_copied_and_averaged(url: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from nowcast_client.integrations.lightning import NowcastCallback

    made = module()
    copies: list[Any] = []
    made.on_train_batch_end = lambda *_: copies.append(copy.deepcopy(made.network))
    callback = NowcastCallback(url, **SETTINGS)
    fit(tmp_path, made, [callback, EMAWeightAveraging()], 3)
    assert len(copies) == 3
    assert callback.summary["steps"] == 3


class Run:
    """Of a W&B run what matters here: one step for everything, rows that end when it moves, nothing for steps past."""

    def __init__(self) -> None:
        self.step = 0
        self.row: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, data: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
        if step is not None and step < self.step:
            return
        if step is not None and step > self.step:
            self.end(step)
        self.row |= data
        if commit or (commit is None and step is None):
            self.end(self.step + 1)

    def end(self, step: int) -> None:
        self.rows += [self.row] if self.row else []
        self.step, self.row = step, {}

    def count(self, name: str) -> int:
        self.end(self.step + 1)
        return sum(name in row for row in self.rows)


def test_lightning_leaves_a_run_s_step_alone(url: str, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import Logger as Base
    from nowcast_client.integrations.lightning import NowcastCallback

    run = Run()

    class Logger(Base):
        experiment, name, version = run, "runs", 0

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            run.log({**metrics, "trainer/global_step": step})

    made = module()
    made.on_train_batch_end = lambda *_: run.log({"mine": 1.0}, step=made.global_step // 10)
    fit(tmp_path, made, NowcastCallback(url, **{**SETTINGS, "trial": False}), 50, logger=Logger())
    assert run.count("mine") == 6
    assert run.count("nowcast/patched") == 2


def test_lightning_with_manual_optimization_of_two_optimizers(url: str, tmp_path: Path) -> None:
    from nowcast_client.integrations.lightning import NowcastCallback

    made = module(manual=True)
    callback = NowcastCallback(url, **{**SETTINGS, "total_steps": 30})
    fit(tmp_path, made, callback, 60)  # Lightning counts each optimizer's steps
    assert made.moved == 0
    assert callback.summary["steps"] == 30
    assert callback.summary["patched"] == 1


def test_lightning_resumes_in_the_middle_of_a_window(url: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from nowcast_client.integrations.lightning import NowcastCallback

    first = NowcastCallback(url, **{**SETTINGS, "total_steps": 30})
    runner = fit(tmp_path, module(), first, 12, enable_checkpointing=True)
    path = tmp_path / "middle.ckpt"
    assert any(isinstance(callback, ModelCheckpoint) for callback in runner.callbacks)
    runner.save_checkpoint(path)
    again = NowcastCallback(url, **{**SETTINGS, "trial": False})
    fit(tmp_path, module(), again, 30, ckpt_path=path, weights_only=True)
    assert again.summary["steps"] == 30
    assert again.summary["snapshots"] == 7


# -------------------------------------------------------------------- Accelerate


def test_accelerate_keeps_its_state_in_checkpoints(url: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from nowcast_client.integrations.accelerate import attach

    def prepared() -> tuple[Any, Any, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model = ranks.network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        return accelerator, model, optimizer, attach(accelerator, model, optimizer, url, **{**SETTINGS, "trial": False})

    accelerator, model, optimizer, handle = prepared()
    batches = ranks.batches(0)
    for _ in range(10):
        loss = nn.functional.cross_entropy(model((batch := next(batches))[0]), batch[1])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    assert handle.wait(30)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator, model, optimizer, again = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert again.step == 10
    for _ in range(10):
        loss = nn.functional.cross_entropy(model((batch := next(batches))[0]), batch[1])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    # Two snapshots of the window were taken before the checkpoint; the service still held them.
    assert again.summary()["snapshots"] == 5
    assert again.summary()["patched"] == 1
    again.close()


def test_accelerate_leaves_a_run_s_step_alone(url: str) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from nowcast_client.integrations.accelerate import attach

    run = Run()

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "runs", False, True
        tracker = run

        def store_init_configuration(self, values: Any) -> None: ...

        def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
            run.log(values, step=step, **kwargs)

    accelerator = Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("digits")
    model = ranks.network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    batches = ranks.batches(0)
    with attach(accelerator, model, optimizer, url, **{**SETTINGS, "trial": False}) as handle:
        for step in range(1, 51):
            loss = nn.functional.cross_entropy(model((batch := next(batches))[0]), batch[1])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            if step % 10 == 0:
                accelerator.log({"loss": float(loss)}, step=step // 10)
        assert handle.summary()["patched"] == 2
    assert run.count("loss") == 5
    assert run.count("nowcast/patched") == 2
