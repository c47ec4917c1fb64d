"""RichProgress: how far a run of transformers' Trainer is, on stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN = {"reward": "reward", "completions/mean_length": "length", "entropy": "entropy", "kl": "kl"}
_SHOWN |= {"grad_norm": "gradient", "step_time": "seconds"}


class RichProgress(TrainerCallback):  # type: ignore[misc]
    """A bar of optimizer steps with the latest metrics; on the main process only."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, TextColumn("{task.fields[told]}"), console=console)
        self._task = self._progress.add_task("", total=state.max_steps, told="")
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._progress is not None and logs and "reward" in logs:
            shown = ((label, logs.get(name)) for name, label in _SHOWN.items())
            told = "  ".join(f"{label} {value:.3g}" for label, value in shown if value is not None)
            self._progress.update(self._task, told=told)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
