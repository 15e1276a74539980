"""One recipe in one process and in several: the same losses, the same files, and one word where something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.processes import assert_same_run, command, environment, errors, tnl, together
from tnl.errors import RecipeError
from tnl.run_dir import RunDir, checkpoints
from tnl.train import crew, launch
from tnl.train import run as training

PROCESSES = 2


@pytest.fixture(scope="module")
def alone(base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return training.run(write(tmp_path_factory.mktemp("alone"), base, records)).path


def write(folder: Path, base: Path, records: Path) -> Path:
    """10 steps of 8 records over two epochs, measured and saved every second step, with dropout."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{path: "{base}", dtype: float32}}
data: {{train: "{records}", eval: 0.1, max_length: 64}}
lora: {{r: 2, lora_alpha: 8, lora_dropout: 0.2}}
train: {{output_dir: "{folder / "run"}", per_device_train_batch_size: 4, gradient_accumulation_steps: 2, num_train_epochs: 2,
  learning_rate: 2.0e-2, logging_steps: 1, eval_steps: 2, save_steps: 2, save_total_limit: 2, use_cpu: true}}
generation: {{max_new_tokens: 4, do_sample: false}}
""",
        encoding="utf-8",
    )
    return recipe


def assert_same_adapter(mine: Path, theirs: Path) -> None:
    one, other = (load_file(run / "adapter/adapter_model.safetensors") for run in (mine, theirs))
    assert {name: (x.shape, x.dtype) for name, x in one.items()} == {name: (x.shape, x.dtype) for name, x in other.items()}
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)
    files = ("adapter_config.json", "tnl.json")
    texts = [[json.loads((run / "adapter" / name).read_text(encoding="utf-8")) for name in files] for run in (mine, theirs)]
    texts[0][1]["base"]["path"] = texts[1][1]["base"]["path"]  # from another folder
    assert texts[0] == texts[1]


def test_two_processes_train_as_one(alone: Path, base: Path, records: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, base, records)
    done = tnl("train", str(recipe), "--num-processes", str(PROCESSES))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data: 40 records, 4 held out") == 1 and done.stdout.count("saved in") == 1
    assert_same_run(tmp_path / "run", alone)
    assert_same_adapter(tmp_path / "run", alone)
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name[0] != ".") == sorted(
        path.name for path in alone.iterdir() if path.name[0] != "."
    )
    again = tnl("train", str(recipe))
    assert again.returncode == 0 and "this run is finished" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--standalone", "--nproc-per-node", "2"],
        ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_launchers_people_know(launcher: list[str], alone: Path, base: Path, records: Path, tmp_path: Path) -> None:
    words = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], "-m", "tnl", "train", str(write(tmp_path, base, records))]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)
    assert_same_adapter(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 3])
def test_a_stopped_run_goes_on_with_another_number_of_processes(then: int, alone: Path, base: Path, records: Path, tmp_path: Path) -> None:
    recipe, run = write(tmp_path, base, records), RunDir(tmp_path / "run")
    slow = "import time, tnl.train.guard as g; check = g.Guard.check; g.Guard.check = lambda *a: (time.sleep(0.3), check(*a))[1]"
    launcher = f"{slow}\nimport tnl.train.launch as launch, sys"
    process = subprocess.Popen(command(["train", str(recipe), "--num-processes", "2"], launcher), env=environment())
    deadline = time.monotonic() + 120
    while not checkpoints(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    assert code == 143 and run.status == "interrupted"
    extra = ["--num-processes", str(then)] if then > 1 else []
    done = tnl("resume", str(run.path), *extra)
    assert done.returncode == 0, done.stderr
    assert "goes on from checkpoint-" in done.stdout
    assert_same_run(run.path, alone)
    assert_same_adapter(run.path, alone)
    evaluated = tnl("evaluate", str(run.path))
    assert evaluated.returncode == 0 and "adapter: loss" in evaluated.stdout


@pytest.mark.slow
def test_a_process_that_sees_something_else_stops_all_with_one_message(base: Path, records: Path, tmp_path: Path) -> None:
    recipe = str(write(tmp_path, base, records))
    other = tmp_path / "other.json"
    rows = json.loads(records.read_text(encoding="utf-8"))
    other.write_text(json.dumps([*rows[:-1], {**rows[-1], "output": "别的。"}]), encoding="utf-8")
    for override, said in (
        (f"data.train={other}", "has another data ("),
        ("train.seed=7", "has another train.seed (7) than process 0 (42)"),
    ):
        done = together([command(["train", recipe]), command(["train", recipe, override])])
        assert [one.returncode for one in done] == [2, 2]
        (line,) = errors(done)
        assert f"process 1 of 2 {said}" in line and "Give every machine the same recipe, data and base." in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_goes_wrong_in_one_is_said_once(base: Path, records: Path, tmp_path: Path) -> None:
    recipe = str(write(tmp_path, base, records))
    full = "import tnl.storage as s; s.free_bytes = lambda path: 1000"
    done = together([command(["train", recipe], full), command(["train", recipe])])
    assert [one.returncode for one in done] == [6, 6] and len(errors(done)) == 1 and "too little space" in errors(done)[0]
    shutil.rmtree(tmp_path / "run")
    broken = """
import tnl.train.run as r
from tnl.errors import ModelError
def load(*a, **k): raise ModelError('x', 'is damaged')
r.load_model = load
"""
    done = together([command(["train", recipe]), command(["train", recipe], broken)])
    assert [one.returncode for one in done] == [4, 4] and errors(done) == ["error: x: is damaged (process 1 of 2)."]
    killed = """
import os, tnl.train.guard as g
check = g.Guard.check
g.Guard.check = lambda self, *a: os.kill(os.getpid(), 9) if self.steps else check(self, *a)
"""
    done = together([command(["train", recipe]), command(["train", recipe], killed)])
    assert [one.returncode for one in done] == [1, -9]
    (line,) = errors(done)
    assert line.startswith("error: another process of this run has ended") and "the same command goes on" in line
    missing = together([command(["train", recipe, "data.train=nowhere.json"]), command(["train", recipe, "data.train=nowhere.json"])])
    assert len(errors(missing[:1])) == 1 and missing[0].returncode == 3


@pytest.mark.slow
def test_memory_that_ends_in_one_makes_all_rows_shorter(alone: Path, base: Path, records: Path, tmp_path: Path) -> None:
    fails = """
import tnl.train.step as s
row, calls = s.row_loss, [0]
def row_loss(*a):
    calls[0] += not next(a[0].parameters()).is_meta  # memory is planned on the meta device
    if calls[0] == 3: raise MemoryError
    return row(*a)
s.row_loss = row_loss
"""
    recipe = str(write(tmp_path, base, records))
    done = together([command(["train", recipe]), command(["train", recipe], fails)])
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    assert "out of memory: from now on rows of at most" in done[0].stdout
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_machines_with_disks_of_their_own_each_save(alone: Path, base: Path, records: Path, tmp_path: Path) -> None:
    recipe = str(write(tmp_path, base, records))
    places = [[f"train.output_dir={tmp_path / name}", "train.save_on_each_node=true"] for name in ("first", "second")]
    short = [[*place, "train.max_steps=10"] for place in places]
    done = together([command(["train", recipe, *place]) for place in short], nodes=True)
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    for name in ("first", "second"):
        assert_same_adapter(tmp_path / name, alone)
        assert [step for step, _ in checkpoints(RunDir(tmp_path / name))] == [10, 8]
    assert_same_run(tmp_path / "first", alone)
    # one machine has lost its newest checkpoint, and the run its result: both go on from what both have
    for name in ("first", "second"):
        shutil.rmtree(tmp_path / name / "adapter")
        RunDir(tmp_path / name).update_metadata(status="unfinished")
    shutil.rmtree(tmp_path / "second" / "checkpoint-10")
    done = together([command(["train", recipe, *place]) for place in short], nodes=True)
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    assert "goes on from checkpoint-8" in done[0].stdout
    assert_same_adapter(tmp_path / "second", alone)
    # without save_on_each_node the second machine must see the first one's disk
    RunDir(tmp_path / "first").update_metadata(status="unfinished")
    shutil.rmtree(tmp_path / "second")
    done = together([command(["train", recipe, place[0], "train.max_steps=10"]) for place in places], nodes=True)
    assert [one.returncode for one in done] == [4, 4] and len(errors(done)) == 1
    assert "Put train.output_dir on a disk that all machines share, or set train.save_on_each_node" in errors(done)[0]


def test_fewer_gpus_than_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"4 processes on a machine of 2 GPUs. Start 2 processes a machine"):
        crew.join(use_cpu=False)


def test_accelerate_s_own_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"asks for FSDP, of which the recipe knows nothing. Use train.fsdp"):
        crew.join(use_cpu=True)


def test_a_launcher_inside_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="--num-processes inside torchrun"):
        launch.start(2, ["train", "recipe.yaml"])


def test_the_launcher_ends_with_the_code_of_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    killed = [subprocess.Popen([sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]) for number in (0, 9)]
    assert launch.wait(killed) == 137 and "process 1 of 2 was ended by SIGKILL" in capsys.readouterr().err
    before = signal.getsignal(signal.SIGTERM)
    assert launch.start(2, ["train", str(tmp_path / "nowhere.yaml")]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
