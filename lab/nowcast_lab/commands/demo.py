"""``nowcast demo``: train a small network alone, nowcast, nowcast while the service is killed, and with Muon."""

from __future__ import annotations

import json
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from nowcast_lab.demo.server import Server
    from nowcast_lab.demo.training import Training

DOWN_SECONDS = 3.0
"""How long the killed service stays away."""


class Trained(StrEnum):
    """What the demo can train, by the names of ``python -m nowcast_lab.demo.training_job``."""

    letters = "letters"
    text = "text"


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the figures and the logs.")] = Path("runs/demo"),
    task: Annotated[
        Trained, typer.Option(help="A convolutional network that reads letters, or a GPT that reads Python.")
    ] = Trained.letters,
    steps: Annotated[
        int | None, typer.Option(min=100, help="Optimizer steps of each training; the task's own number by default.")
    ] = None,
    period: Annotated[
        int | None, typer.Option(min=15, help="Steps between nowcasts; by the length of the training by default.")
    ] = None,
    max_horizon: Annotated[int, typer.Option(min=1, help="Longest horizon, in strides of a fifth of the period.")] = 20,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Peak learning rate; by default the best for training alone.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = 1,
    checkpoint: Annotated[str | None, typer.Option(help="Name or path; the shipped one by default.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Predictor; what the checkpoint is for by default.")] = None,
) -> None:
    """Train a small network four times from one seed: alone, nowcast, nowcast while the service dies half-way, and
    alone with Muon, the strongest recipe known here, so that it is seen what nowcasts on AdamW are worth beside it.

    The service and every training are processes of their own. Prints a table, and last the path of a picture of the
    loss curves.
    """
    from rich.console import Console

    from nowcast_lab.demo import plot, report
    from nowcast_lab.demo.progress import Shown
    from nowcast_lab.demo.server import Server
    from nowcast_lab.demo.training import Training, run

    out.mkdir(parents=True, exist_ok=True)
    chosen = {
        "task": task,
        "steps": steps,
        "period": period,
        "max-horizon": max_horizon,
        "rate": rate,
        "seed": seed,
        "predictor": predictor,
    }
    common = {name: str(value) for name, value in chosen.items() if value is not None}
    alone, nowcast, killed, muon = trainings = [
        Training("alone", "alone"),
        Training("nowcast", "nowcast"),
        Training("killed", "nowcast, service killed"),
        Training("muon", "Muon, alone"),
    ]
    # One thread for the service: the trainer has one as well, and neither takes the other's core on a small machine.
    settings = {"threads": "1", **({"checkpoint": checkpoint} if checkpoint else {})}
    with Shown(trainings) as shown:
        run(alone, {**common, "mode": "off"}, out, shown.update)
        shown.say("starting the service")
        with Server(out, **settings) as server:
            run(nowcast, {**common, "mode": "on", "url": server.url}, out, shown.update)
            accident = Accident(server, alone.about["steps"] // 2, shown.say)

            def show(training: Training) -> None:
                shown.update(training)
                accident.watch(training)

            run(killed, {**common, "mode": "on", "url": server.url}, out, show)
            accident.over()
        run(muon, {**common, "mode": "off", "optimizer": "muon"}, out, shown.update)
    picture = (out / "loss.png").resolve()
    (out / "results.json").write_text(json.dumps(report.numbers(trainings), indent=1) + "\n")
    plot.draw(trainings, picture)
    console = Console(width=110, highlight=False)
    console.print(report.table(trainings))
    for sentence in report.findings(trainings):
        console.print(sentence)
    chosen_by = "given" if rate else "the best for training alone"
    console.print(f"AdamW at a peak rate of {alone.about['rate']:g} ({chosen_by}), cosine decay, seed {seed}.")
    typer.echo(str(picture))


class Accident:
    """Kills the service once a training has come so far, and starts it again a little later.

    Args:
        server: The service.
        step: When.
        say: Told what happens.
    """

    def __init__(self, server: Server, step: int, say: Callable[[str], object]) -> None:
        self._server = server
        self._step = step
        self._say = say
        self._restart: threading.Thread | None = None
        self._error: Exception | None = None

    def watch(self, training: Training) -> None:
        """See whether it is time."""
        if self._restart is None and training.points and training.points[-1].step >= self._step:
            training.killed_at = training.points[-1].step
            self._server.kill()
            self._say(f"step {training.killed_at}: killed the service (SIGKILL); it comes back in {DOWN_SECONDS:.0f} s")
            self._restart = threading.Thread(target=self._start, daemon=True)
            self._restart.start()

    def _start(self) -> None:
        time.sleep(DOWN_SECONDS)
        try:
            self._server.start()
        except Exception as error:
            self._error = error
        else:
            self._say("the service is back")

    def over(self) -> None:
        """Wait for the restart.

        Raises:
            Exception: What went wrong in it.
        """
        if self._restart is not None:
            self._restart.join()
        if self._error is not None:
            raise self._error
