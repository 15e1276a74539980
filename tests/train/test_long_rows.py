"""A run over rows of many segments that is killed in the middle of one ends in the bits of a run that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tnl.data.build import build
from tnl.data.store import lengths_of
from tnl.model.load import load_tokenizer
from tnl.recipe.load import load
from tnl.run_dir import RunDir, checkpoints
from tnl.train import run as training
from tnl.train.callbacks import read_metrics

KILLED = """
import os, signal, sys
from tnl.train import long_sequence
from tnl.cli import main

calls, real = 0, long_sequence._Stream.{name}

def dying(self, *arguments):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *arguments)

long_sequence._Stream.{name} = dying
sys.argv = ["tnl", "train", {recipe!r}, "train.output_dir={output}"]
main()
"""
SEGMENTS = 6
"""Of a row; a step has two of them: 12 backward passes, and 10 forward passes without gradients."""


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    """Four documents of six segments, two a step, dropout in the adapters, every step saved."""
    folder = tmp_path / "novels"
    folder.mkdir()
    for i in range(4):
        text = "".join(f"第{i}回{j} 春夏秋冬{j % 7}，山水风云{j % (5 + i)}。\n" for j in range(19))
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
model: {{path: "{base}", dtype: float32}}
data: {{train: "{folder}", eval: 0, format: text, max_length: null}}
lora: {{r: 2, lora_dropout: 0.2}}
train: {{output_dir: "{tmp_path / "whole"}", max_steps: 4, logging_steps: 1, save_steps: 1, learning_rate: 2.0e-2, use_cpu: true,
  per_device_train_batch_size: 2, gradient_accumulation_steps: 1, segment_length: 64}}
generation: {{max_new_tokens: 2}}
""",
        encoding="utf-8",
    )
    return file


def losses(run: RunDir) -> list[tuple[float, ...]]:
    return [tuple(line[key] for key in ("step", "loss", "grad_norm", "tokens")) for line in read_metrics(run.metrics) if "loss" in line]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_long_row(recipe: Path, base: Path, tmp_path: Path) -> None:
    whole = training.run(recipe)
    expected = losses(whole)
    assert [line[0] for line in expected] == [1, 2, 3, 4]
    data = build(load(recipe).data, load_tokenizer(base))  # type: ignore[arg-type]
    assert all((SEGMENTS - 1) * 64 < length <= SEGMENTS * 64 for length in lengths_of(data.train))
    for name, call, done in (("backward", 12 + 4, 1), ("advance", 2 * 10 + 8, 2), ("backward", 3 * 12 + 12, 3)):
        run = RunDir(tmp_path / f"{name}-{call}")
        code = KILLED.format(name=name, call=call, recipe=str(recipe), output=run.path)
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert run.status != "finished" and checkpoints(run)[0][0] == done, "no more than the step under way is lost"
        training.run(recipe, [f"train.output_dir={run.path}"])
        assert losses(run) == expected
        weights = "adapter_model.safetensors"
        assert (run.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
