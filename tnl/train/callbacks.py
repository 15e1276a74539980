"""What a person and a file see of a run while it goes on: live progress, metrics.jsonl, the curve, and a word about overfitting."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tnl import host
from tnl.run_dir import trim_metrics
from tnl.storage import storage

GIB = 1024**3
RISE = 1.01
"""The held-out loss counts as risen where it ends above its lowest by this factor."""
HEART = 0.5
"""Records count as learned by heart where the training loss is below this share of the held-out loss."""


def peak_memory() -> int:
    """Bytes: the most that PyTorch has reserved on the GPU so far, or, where there is none, that the process has held in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return host.peak_resident()


class Metrics(TrainerCallback):
    """Writes one JSON object a line to metrics.jsonl for whatever Trainer logs; lines beyond the step a run resumes from are dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.start = time.monotonic()
        trim_metrics(self.path, state.global_step or -1)  # of a run that begins anew nothing stays, not even its step 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, **{name: plain(value) for name, value in logs.items()}}
        line |= {"peak_memory_reserved": peak_memory(), "seconds": round(time.monotonic() - self.start, 3)}
        with storage(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def plain(value: Any) -> Any:
    """A number as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return round(value, 6) if isinstance(value, float) and abs(value) > 1e-3 else value


class Live(TrainerCallback):
    """A bar with loss, tokens a second, time left and peak memory; lines instead where nobody watches a terminal."""

    def __init__(self, console: Console, lines: bool = False) -> None:
        self.console, self.lines = console, lines or not console.is_terminal
        self.bar: Progress | None = None
        self.start, self.first = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.start, self.first = time.monotonic(), state.global_step
        if not self.lines:
            words = TextColumn("{task.fields[words]}")
            self.bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), words, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, words="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f} (perplexity {logs['eval_perplexity']:.1f})")
        elif "loss" in logs:
            memory = f"peak {peak_memory() / GIB:.1f} GiB"
            words = f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s  {memory}"
            if self.bar is not None:
                self.bar.update(self.task, words=words)
            else:
                self.say(f"step {state.global_step}/{state.max_steps}  {words}  {self.left(state)} left")

    def left(self, state: TrainerState) -> str:
        """Time to the last step, at the speed so far."""
        done = max(state.global_step - self.first, 1)
        seconds = round((time.monotonic() - self.start) / done * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the training loss and the held-out loss against the step. Raises StorageError."""
    # half a second that only the end of a run pays
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss per supervised token")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    if axes.has_data():
        axes.legend()
    axes.grid(alpha=0.3)
    with storage(path):
        figure.savefig(path, dpi=120)


def overfitting(lines: Sequence[dict[str, Any]], kept: bool) -> str | None:
    """One line where the records were learned by heart, else None: held-out against training loss. kept: whether the best was kept.

    That is where the held-out loss ends above its lowest, or where the training loss ends below half of it.
    """
    measured = [(line["eval_loss"], line["step"]) for line in lines if isinstance(line.get("eval_loss"), float)]
    learned = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    if len(measured) < 2 or not learned:
        return None
    (lowest, at), (last, end) = min(measured), measured[-1]
    training = f"the training loss went from {learned[0]:.4f} to {learned[-1]:.4f}"
    if last > lowest * RISE:
        best = min(one for one in measured if one[1] > 0)[1]
        todo = f"the adapter is that of step {best}" if kept else "train.load_best_model_at_end: true would keep the best adapter"
        where = "before the first step" if at == 0 else f"at step {at}"
        return f"overfitting: the held-out loss was lowest {where} ({lowest:.4f}) and is {last:.4f} at step {end}, while {training}; {todo}"
    if learned[-1] < last * HEART:
        return f"overfitting: {training}, the held-out loss is {last:.4f}; more records, or fewer epochs, teach more than these by heart"
    return None
