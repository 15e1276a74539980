"""What is seen of a run: progress, metrics, curve, overfitting."""

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from tnl.errors import StorageError
from tnl.train import callbacks


def state(step: int, total: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=total)


def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)


def test_metrics_are_one_object_a_line_and_lose_what_lies_behind_the_step_resumed_from(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.9}\n{"step": 6, "lo', encoding="utf-8")
    metrics = callbacks.Metrics(file)
    metrics.on_train_begin(args(tmp_path), state(2), TrainerControl())
    metrics.on_log(args(tmp_path), state(3), TrainerControl(), {"loss": 0.123456789, "learning_rate": 1.5e-7, "grad_norm": float("inf")})
    metrics.on_log(args(tmp_path), state(3), TrainerControl(), {"train_runtime": 3.0})
    lines = callbacks.read_metrics(file)
    assert [line["step"] for line in lines] == [2, 3]
    assert lines[1]["loss"] == 0.123457 and lines[1]["learning_rate"] == 1.5e-7 and lines[1]["grad_norm"] == "inf"
    assert lines[1]["peak_memory_reserved"] > 0 and lines[1]["seconds"] >= 0
    assert callbacks.read_metrics(tmp_path / "none") == []


def test_peak_memory_is_the_most_there_was() -> None:
    before, held = callbacks.peak_memory(), psutil.Process().memory_info().rss
    assert before >= held - 2**20
    more = before - held + 2**26
    bytearray(b"x" * more)  # two copies of it, touched and gone
    assert callbacks.peak_memory() >= before + 2**25 and psutil.Process().memory_info().rss < callbacks.peak_memory()


def test_a_disk_that_refuses_metrics_is_an_error_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = callbacks.Metrics(tmp_path / "metrics.jsonl")

    real = Path.open

    def full(self: Path, *args: Any, **options: Any) -> Any:
        if self.name != "metrics.jsonl":
            return real(self, *args, **options)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError):
        metrics.on_log(args(tmp_path), state(3), TrainerControl(), {"loss": 1.0})


LOG = {"loss": 2.5, "tokens_per_second": 1234.5}
MEASURED = {"eval_loss": 2.25, "eval_perplexity": 9.49}


def show(console: Console, tmp_path: Path, lines: bool = False) -> None:
    live = callbacks.Live(console, lines)
    live.on_train_begin(args(tmp_path), state(0), TrainerControl())
    live.on_step_end(args(tmp_path), state(5), TrainerControl())
    live.on_log(args(tmp_path), state(5), TrainerControl(), LOG)
    live.on_log(args(tmp_path), state(5), TrainerControl(), MEASURED)
    live.say("[bold] is no markup")
    live.on_train_end(args(tmp_path), state(10), TrainerControl())


@pytest.mark.parametrize("lines", [False, True])
def test_lines_where_nobody_watches(tmp_path: Path, lines: bool) -> None:
    out = io.StringIO()
    show(Console(file=out, width=60, force_terminal=lines), tmp_path, lines)
    text = out.getvalue()
    assert "step 5/10  loss 2.5000  1,23" in text and "GiB" in text and "0:00:0" in text and "left" in text
    assert "step 5: held-out loss 2.2500 (perplexity 9.5)" in text and "[bold] is no markup" in text


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    show(Console(file=out, width=120, force_terminal=True), tmp_path)
    text = out.getvalue()
    assert "5/10" in text and "loss 2.5000" in text and "tokens/s" in text and "held-out loss" in text


def test_the_curve(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"step": 3, "loss": "nan"}]
    callbacks.draw(lines, tmp_path / "loss.png")
    callbacks.draw([], tmp_path / "empty.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "empty.png"))


def measured(*losses: float, learned: tuple[float, ...] = (3.0, 1.9), first: int = 10) -> list[dict[str, Any]]:
    training = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(learned)]
    held_out = [{"step": first + 10 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
    return [json.loads(json.dumps(line)) for line in (*training, *held_out)]


def test_overfitting_is_named_in_one_line_against_the_training_loss() -> None:
    line = callbacks.overfitting(measured(3.0, 2.0, 2.5), kept=True)
    assert line is not None and "lowest at step 20 (2.0000) and is 2.5000 at step 30" in line and "that of step 20" in line
    assert "the training loss went from 3.0000 to 1.9000" in line
    assert "load_best_model_at_end" in (callbacks.overfitting(measured(2.0, 3.0), kept=False) or "")
    for losses in ((3.0, 2.0, 1.0), (2.0,), (), (2.0, 2.001)):
        assert callbacks.overfitting(measured(*losses), kept=True) is None


def test_records_known_by_heart_are_overfitting_though_the_held_out_loss_does_not_rise() -> None:
    line = callbacks.overfitting(measured(5.2, 5.11, 5.12, learned=(3.4, 0.003)), kept=True)
    assert line is not None and "from 3.4000 to 0.0030, the held-out loss is 5.1200" in line and "by heart" in line
    assert callbacks.overfitting(measured(5.2, 5.1, learned=(3.4, 2.6)), kept=True) is None


def test_a_run_that_only_got_worse_says_so() -> None:
    line = callbacks.overfitting(measured(2.0, 2.5, 2.4, 3.0, first=0), kept=True)
    assert line is not None and "lowest before the first step (2.0000)" in line and "the adapter is that of step 20" in line
