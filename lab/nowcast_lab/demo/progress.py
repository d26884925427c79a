"""Live progress on stderr: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nowcast_lab.demo.training import Training


class Shown:
    """Shows the trainings as they go; a context manager.

    Args:
        trainings: In the order they run.
    """

    def __init__(self, trainings: list[Training]) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._said: dict[str, int] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            for training in trainings:
                self._tasks[training.name] = self._progress.add_task(training.label, total=None, start=False, told="")

    def update(self, training: Training) -> None:
        """Show how far a training is; on no terminal, every tenth of it."""
        if self._progress is not None:
            task = self._tasks[training.name]
            self._progress.start_task(task)
            if training.points:
                step, steps = training.points[-1].step, training.about["steps"]
                self._progress.update(task, completed=step, total=steps, told=self._told(training))
            return
        if not training.points:
            return
        step, steps = training.points[-1].step, training.about["steps"]
        if (tenth := step * 10 // steps) > self._said.get(training.name, 0):
            self._said[training.name] = tenth
            self.say(f"{training.label}: step {step}/{steps}, {self._told(training)}")

    def say(self, message: str) -> None:
        """Print one line."""
        self._console.print(message)

    def _told(self, training: Training) -> str:
        kept = sum(event["kind"] == "kept" for event in training.nowcasts)
        patched = sum(event["kind"] == "patched" for event in training.nowcasts)
        nowcasts = f", {patched} nowcasts, {kept} kept" if patched else ""
        return f"held-out loss {training.points[-1].held_out:.3f}{nowcasts}"

    def __enter__(self) -> Shown:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
