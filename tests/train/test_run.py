"""A run from recipe to adapter: what it leaves, that it repeats itself bit for bit, and that nothing stops it for good."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tnl.adapter.load import load_adapter, read_adapter_metadata
from tnl.errors import MemoryBudgetError, ModelError, StorageError, TnlError
from tnl.evaluate import generation
from tnl.generate.resolve import resolve
from tnl.model.load import load_model
from tnl.recipe.load import load
from tnl.run_dir import RunDir, checkpoints
from tnl.train import callbacks, checkpoint, plan
from tnl.train import run as training
from tnl.train.trainer import TnlTrainer


def weights(run: RunDir) -> dict[str, bytes]:
    """The bits of the adapter and of the last checkpoint's optimizer."""
    last = checkpoints(run)[0][1]
    return {
        "adapter": (run.adapter / "adapter_model.safetensors").read_bytes(),
        "weights": (last / "adapter_model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.pt").read_bytes(),
        "schedule": (last / "scheduler.pt").read_bytes(),
    }


@pytest.fixture(scope="module")
def finished(base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """An uninterrupted run; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("finished")
    return training.run(write_recipe(folder, base, records))


def write_recipe(folder: Path, base: Path, records: Path, **train: Any) -> Path:
    file = folder / "recipe.yaml"
    values = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "use_cpu": True,
        "output_dir": str(folder / "run"),
    } | train
    sections = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": str(records), "eval": 0.1, "max_length": 64},
        "lora": {"r": 2, "lora_alpha": 8, "lora_dropout": 0.2},
        "train": values,
        "generation": {"max_new_tokens": 4, "do_sample": False},
    }
    file.write_text(json.dumps(sections, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    return file


def test_what_a_run_leaves(finished: RunDir, base: Path) -> None:
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
    assert {"adapter", "recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "samples.jsonl"} <= names
    assert finished.status == "finished" and finished.read_metadata()["step"].startswith(
        "8 records a step (batch x accumulation: 4 x 2), end"
    )
    steps = [step for step, _ in checkpoints(finished)]
    assert len(steps) in (2, 3) and steps[0] == 10  # two, and the best where it is an older one
    lines = callbacks.read_metrics(finished.metrics)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 11))
    assert losses[-1]["loss"] < losses[0]["loss"] and all(line["grad_norm"] > 0 and line["peak_memory_reserved"] > 0 for line in losses)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 8, 10]
    samples = [json.loads(line) for line in finished.samples.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 4 and all(sample["before"] is not None and sample["after"] is not None for sample in samples)
    about = read_adapter_metadata(finished.adapter)
    assert about.template == "chatml" and about.base is not None
    assert load(finished.recipe).as_dict() == load(finished.path.parent / "recipe.yaml").as_dict()
    assert finished.plot.read_bytes().startswith(b"\x89PNG")


def test_the_adapter_loads_in_plain_peft_and_in_ours(finished: RunDir, base: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = PeftModel.from_pretrained(load_model(base, device="cpu"), finished.adapter).eval()
    ours = load_adapter(load_model(base, device="cpu"), finished.path)
    bare = load_model(base, device="cpu")
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
        assert not torch.allclose(plain(input_ids=ids).logits, bare(input_ids=ids).logits, atol=1e-4)


def test_the_best_measurement_is_kept(finished: RunDir) -> None:
    measured = {line["step"]: line["eval_loss"] for line in callbacks.read_metrics(finished.metrics) if "eval_loss" in line}
    best = min(measured, key=lambda step: measured[step])
    assert finished.read_metadata()["best_step"] == best
    kept = load_file(finished.checkpoint(best) / "adapter_model.safetensors")
    saved = load_file(finished.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_the_same_command_gives_the_same_bits(finished: RunDir, recipe: Path) -> None:
    assert weights(training.run(recipe)) == weights(finished)


def test_a_finished_run_is_left_as_it_is(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    training.run(finished.path.parent / "recipe.yaml")
    training.resume(finished.path)
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()} == before


def test_another_run_in_the_same_folder_is_refused(finished: RunDir, base: Path, records: Path, tmp_path: Path) -> None:
    changed = write_recipe(tmp_path, base, records, output_dir=str(finished.path), learning_rate=1e-2)
    with pytest.raises(ModelError, match=r"train\.learning_rate was 0\.02 there and is 0\.01 now") as caught:
        training.run(changed)
    assert caught.value.exit_code == 4


def test_what_cannot_be_resumed(finished: RunDir, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    near = finished.path.with_name("runn")
    for path, what in (
        (tmp_path / "empty", "not the folder of a run"),
        (recipe, rf"is a file \(needed: the folder of a run\).*tnl train {recipe}"),
        (near, rf"{near}: no such folder.*Did you mean {finished.path}\?"),
    ):
        with pytest.raises(ModelError, match=what) as caught:
            training.resume(path)
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_a_foreign_folder_is_refused_before_anything_is_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(training, "build", lambda *a, **k: pytest.fail("data was built"))
    with pytest.raises(ModelError, match=r"not of a run \(thesis\.txt\)"):
        training.run(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("at", [1, 4, 10])
def test_a_run_killed_at_any_step_ends_in_the_same_bits(finished: RunDir, recipe: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TnlTrainer.training_step

    def dies(self: TnlTrainer, *args: Any) -> Any:
        if self.state.global_step + 1 == at:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TnlTrainer, "training_step", dies)
        with pytest.raises(Killed):
            training.run(recipe)
    run = training.run(recipe)
    assert weights(run) == weights(finished)
    mine, theirs = (callbacks.read_metrics(one.metrics) for one in (run, finished))
    timeless = ("seconds", "eval_seconds", "tokens_per_second", "peak_memory_reserved")
    assert [{k: v for k, v in line.items() if k not in timeless} for line in mine] == [
        {k: v for k, v in line.items() if k not in timeless} for line in theirs
    ]


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_signal_saves_and_the_same_command_goes_on(
    finished: RunDir, recipe: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In step 3, or in the measurement after step 4, which is then made on resuming."""
    real_step, real_evaluate = TnlTrainer.training_step, TnlTrainer.evaluate

    def step(self: TnlTrainer, *args: Any) -> Any:
        if where == "step" and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self, *args)

    def evaluate(self: TnlTrainer, *args: Any, **kwargs: Any) -> Any:
        if where == "evaluation" and self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real_evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TnlTrainer, "training_step", step)
        patch.setattr(TnlTrainer, "evaluate", evaluate)
        with pytest.raises(SystemExit) as caught:
            training.run(recipe)
    run = RunDir(Path(load(recipe).train.output_dir))
    at = 3 if where == "step" else 4
    assert caught.value.code == (143 if where == "step" else 130)
    assert run.status == "interrupted" and checkpoints(run)[0][0] == at
    assert f"tnl resume {run.path}" in capsys.readouterr().out
    training.resume(run.path)
    assert weights(run) == weights(finished)
    steps = [line["step"] for line in callbacks.read_metrics(run.metrics) if "eval_loss" in line]
    assert steps == [0, 2, 4, 6, 8, 10] and run.read_metadata()["best_step"] == finished.read_metadata()["best_step"]


def test_a_signal_in_the_measurement_before_the_first_step(
    finished: RunDir, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = TnlTrainer.evaluate

    def evaluate(self: TnlTrainer, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TnlTrainer, "evaluate", evaluate)
        with pytest.raises(SystemExit) as caught:
            training.run(recipe)
    run = RunDir(Path(load(recipe).train.output_dir))
    assert caught.value.code == 143 and not checkpoints(run)
    assert "stopped before the first step; the same command starts again" in capsys.readouterr().out
    assert weights(training.run(recipe)) == weights(finished)
    assert [line["step"] for line in callbacks.read_metrics(run.metrics) if "eval_loss" in line] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_while_questions_are_asked(
    finished: RunDir, recipe: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, asked = generation.answer, [0]

    def answer(*args: Any) -> list[str]:
        asked[0] += 1
        if asked[0] == (1 if when == "before" else 2):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "answer", answer)
        with pytest.raises(SystemExit) as caught:
            training.run(recipe)
    said, run = capsys.readouterr().out, RunDir(Path(load(recipe).train.output_dir))
    assert caught.value.code == 130 and "asking 4 questions before training" in said
    if when == "before":
        assert asked[0] == 1 and "stopped before the first step; the same command starts again" in said and not checkpoints(run)
    else:
        assert asked[0] == 2 and "The same command finishes the run" in said and run.adapter.is_dir()
    assert run.status in ("unfinished", "interrupted")
    assert weights(training.run(recipe)) == weights(finished) and run.status == "finished"


def test_a_checkpoint_is_asked_as_it_is_being_taught(base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, base, records, output_dir=str(tmp_path / "run"))
    real = TnlTrainer.training_step

    def dies(self: TnlTrainer, *args: Any) -> Any:
        if self.state.global_step == 2:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TnlTrainer, "training_step", dies)
        with pytest.raises(Killed):
            training.run(recipe, ["data.template=alpaca", "data.system=说书人"])
    for word in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        talker = resolve(str(word), {"device": "cpu"})
        assert talker.template.name == "alpaca" and talker.system == "说书人"
        assert not talker.settings.do_sample and talker.settings.max_new_tokens == 4
    other = shutil.copytree(base, tmp_path / "other")
    changed = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="same sizes but other weights"):
        resolve(str(tmp_path / "run"), {"device": "cpu", "base": str(other)})


def test_a_damaged_checkpoint_is_passed_over(
    finished: RunDir, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = TnlTrainer.training_step

    def dies(self: TnlTrainer, *args: Any) -> Any:
        if self.state.global_step == 7:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TnlTrainer, "training_step", dies)
        with pytest.raises(Killed):
            training.run(recipe)
    run = RunDir(Path(load(recipe).train.output_dir))
    file = run.checkpoint(6) / "optimizer.pt"
    bits = bytearray(file.read_bytes())
    bits[len(bits) // 2] ^= 1
    file.write_bytes(bits)
    training.run(recipe)
    said = capsys.readouterr().out
    assert "checkpoint-6 was passed over" in said and "goes on from checkpoint-4" in said
    assert weights(run) == weights(finished)


def test_a_moved_run_goes_on(finished: RunDir, base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, base, records)
    real = TnlTrainer.training_step

    def dies(self: TnlTrainer, *args: Any) -> Any:
        if self.state.global_step == 5:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TnlTrainer, "training_step", dies)
        with pytest.raises(Killed):
            training.run(recipe)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert weights(training.resume(tmp_path / "elsewhere")) == weights(finished)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(finished: RunDir, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save

    def full(value: Any, file: Any, *args: Any) -> None:
        if "checkpoint-6" in str(getattr(file, "name", file)):
            raise OSError(28, "No space left on device", str(file.name))
        real(value, file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StorageError, match="bytes free") as caught:
            training.run(recipe)
    assert caught.value.exit_code == 6
    run = RunDir(Path(load(recipe).train.output_dir))
    assert checkpoints(run)[0][0] == 4 and not [path for path in run.path.iterdir() if path.name.startswith(".tnl")]
    assert weights(training.run(recipe)) == weights(finished)


def test_no_room_for_checkpoints_is_said_before_training(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnl.storage.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match="too little space"):
        training.run(recipe)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "here", lambda device, gib=None: 3e6)
    monkeypatch.setattr(training, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(MemoryBudgetError) as caught:
        training.run(recipe)
    assert caught.value.exit_code == 7 and not Path(load(recipe).train.output_dir).exists()


def test_every_weight_can_be_trained(base: Path, records: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, records, max_steps=4, learning_rate=1e-3)
    run = training.run(recipe, ["lora=null"])
    model = load_model(run.path / "model", device="cpu")
    assert model.config.tie_word_embeddings and not run.adapter.exists()
    saved, start = model.state_dict(), load_model(base, device="cpu").state_dict()
    assert not torch.equal(saved["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    best = run.read_metadata()["best_step"]
    kept = load_file(run.checkpoint(best) / checkpoint.FULL_WEIGHTS)
    assert torch.equal(kept["model.embed_tokens.weight"], saved["model.embed_tokens.weight"])
    # as it was before it was finished, its newest checkpoint is what one talks to
    shutil.move(run.path / "model", tmp_path / "model")
    run.update_metadata(status="interrupted")
    talker = resolve(str(run.path), {"device": "cpu"})
    assert talker.notices == ["the run is not finished: this is its checkpoint of step 4"] and talker.template.name == "chatml"
    newest = load_file(run.checkpoint(4) / checkpoint.FULL_WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(talker.model.state_dict()["model.embed_tokens.weight"], newest)
    assert "".join(talker.conversation().say("你好")) is not None
    (run.checkpoint(4) / checkpoint.FULL_WEIGHTS).write_bytes(b"")
    with pytest.raises(ModelError, match=r"checkpoint-4.*model\.safetensors"):
        resolve(str(run.path), {"device": "cpu"})


def test_padded_batches_learn_the_same(finished: RunDir, recipe: Path) -> None:
    """Dropout draws differ between layouts: without it, the two runs agree within float error."""
    runs = [
        training.run(recipe, ["lora.lora_dropout=0", f"data.packing={how}", f"train.output_dir={finished.path.parent / how}"])
        for how in ("batch", "none")
    ]
    losses = [[line["loss"] for line in callbacks.read_metrics(run.metrics) if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_filled_rows_go_on_as_they_began(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's rows are those of its beginning, also where there is memory for longer ones when it goes on."""
    planned, real, room = training.plan_rows, TnlTrainer.training_step, [160]
    monkeypatch.setattr(training, "plan_rows", lambda *args: dataclasses.replace(planned(*args), budget=room[0]))
    changes = ["data.packing=fill", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1", "train.max_steps=4"]
    whole = training.run(recipe, [*changes, f"train.output_dir={tmp_path / 'whole'}"])

    def stopping(self: TnlTrainer, *args: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    parts = [*changes, f"train.output_dir={tmp_path / 'parts'}"]
    monkeypatch.setattr(TnlTrainer, "training_step", stopping)
    with pytest.raises(SystemExit):
        training.run(recipe, parts)
    monkeypatch.setattr(TnlTrainer, "training_step", real)
    room[0] = 5000
    assert weights(training.run(recipe, parts)) == weights(whole)


@pytest.mark.slow
def test_real_kills_at_random_moments(finished: RunDir, recipe: Path) -> None:
    """SIGKILL from outside, again and again, then SIGTERM; the command that goes on is always the same."""
    command = [sys.executable, "-m", "tnl", "train", str(recipe)]
    run = RunDir(Path(load(recipe).train.output_dir))
    for attempt in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        seen = max((step for step, _ in checkpoints(run)), default=0)
        while process.poll() is None and time.monotonic() < deadline:
            if max((step for step, _ in checkpoints(run)), default=0) > seen:
                time.sleep(0.05 * attempt)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM if attempt == 5 else signal.SIGKILL)
        process.wait(60)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert weights(run) == weights(finished)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.use_dora=true", "lora.lora_dropout=0"],
        ["lora.use_rslora=true", "lora.rank_pattern={qkvu_proj: 4}", "lora.layers_to_transform=[1]"],
        ["lora.modules_to_save=[lm_head]"],
        ["lora.trainable_token_indices=[300, 301]"],
        ["lora.target_modules=[qkvu_proj, lm_head, embed_tokens]"],
        ["lora.lora_bias=true"],
    ],
    ids=["dora", "ranks", "head", "tokens", "head and embedding", "bias"],
)
def test_every_kind_of_adapter_is_trained_saved_and_loaded(recipe: Path, base: Path, overrides: list[str]) -> None:
    """The run itself loads what it saved and compares; plain peft must agree."""
    run = training.run(recipe, [*overrides, "train.max_steps=6", "train.eval_strategy=no", "data.eval=0"])
    ids = torch.tensor([[5, 300, 301, 8]])
    plain = PeftModel.from_pretrained(load_model(base, device="cpu"), run.adapter).eval()
    ours = load_adapter(load_model(base, device="cpu"), run.path)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
        assert not torch.allclose(ours(input_ids=ids).logits, load_model(base, device="cpu")(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("lora", "target_modules", ["l9"]),
        ("lora", "use_qalora", True),
        ("train", "torch_compile", True),
        ("train", "optim", "adamw_bnb_8bit"),
    ],
)
def test_mistakes_are_said_with_line_and_column(
    base: Path, records: Path, tmp_path: Path, section: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, base, records)
    sections = json.loads(recipe.read_text(encoding="utf-8"))
    sections[section][key] = value
    recipe.write_text(json.dumps(sections, ensure_ascii=False, indent=1), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TnlError) as caught:
        training.run(recipe)
    lines = recipe.read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if f'"{key}"' in text)
    assert re.match(re.escape(f"{recipe}:line {line}, column ") + rf"\d+: {section}\.{key}: ", str(caught.value)), str(caught.value)
    with pytest.raises(TnlError, match=rf"command line: {section}\.{key}: "):
        training.run(write_recipe(tmp_path, base, records), [f"{section}.{key}={json.dumps(value)}"])
