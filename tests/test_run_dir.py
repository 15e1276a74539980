"""A run's folder: which checkpoint counts, which may be deleted, which run it belongs to."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tnl.errors import ModelError
from tnl.recipe.load import load
from tnl.run_dir import (
    RunDir,
    checkpoints,
    compare,
    fingerprint,
    hash_files,
    hold,
    latest_valid,
    open_run,
    rotate,
    trim_metrics,
)
from tnl.storage import staged, verify

SMALL = "model:\n  path: demo\ndata:\n  train: records.json\n"


def save(run: RunDir, step: int, text: str = "") -> Path:
    with staged(run.checkpoint(step), {"step": step}) as place:
        (place / "state.bin").write_bytes(f"state of {step} {text}".encode())
    return run.checkpoint(step)


def test_names(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = (run.adapter, run.recipe, run.metrics, run.plot, run.samples, run.metadata, run.checkpoint(7))
    assert [path.name for path in names] == [
        "adapter",
        "recipe.yaml",
        "metrics.jsonl",
        "loss.png",
        "samples.jsonl",
        "run.json",
        "checkpoint-7",
    ]
    assert {path.parent for path in names} == {tmp_path}


class Rotation(RuleBasedStateMachine):
    """Save, resume from older, touch, damage, foreign folders, links, half folders, rotation, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.run = RunDir(Path(self.folder.name) / "run")
        self.run.path.mkdir()
        self.step = 0
        self.valid: set[int] = set()
        self.damaged: set[int] = set()
        self.foreign: dict[str, bool] = {}  # name -> whether it is a link
        self.best: int | None = None

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(by=st.integers(1, 5))
    def saves(self, by: int) -> None:
        self.step += by
        if f"checkpoint-{self.step}" in self.foreign:
            return
        save(self.run, self.step)
        self.valid.add(self.step)
        self.damaged.discard(self.step)

    @precondition(lambda self: self.valid)
    @rule(data=st.data())
    def resumes_from_an_older_one(self, data: st.DataObject) -> None:
        self.step = data.draw(st.sampled_from(sorted(self.valid)))

    @precondition(lambda self: self.valid)
    @rule(data=st.data())
    def becomes_the_best(self, data: st.DataObject) -> None:
        self.best = data.draw(st.sampled_from(sorted(self.valid)))

    @precondition(lambda self: self.valid | self.damaged)
    @rule(data=st.data(), when=st.integers(0, 2**33))
    def clock_jumps(self, data: st.DataObject, when: int) -> None:
        os.utime(self.run.checkpoint(data.draw(st.sampled_from(sorted(self.valid | self.damaged)))), (when, when))

    @precondition(lambda self: self.valid)
    @rule(data=st.data())
    def a_file_is_damaged(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.valid)))
        (self.run.checkpoint(step) / "state.bin").write_bytes(b"rubbish")
        self.valid.discard(step)
        self.damaged.add(step)
        self.best = None if self.best == step else self.best

    @precondition(lambda self: self.valid)
    @rule(data=st.data(), to=st.integers(1000, 1003))
    def a_copy_poses_as_another_step(self, data: st.DataObject, to: int) -> None:
        source, target = self.run.checkpoint(data.draw(st.sampled_from(sorted(self.valid)))), self.run.checkpoint(to)
        if not target.exists() and not target.is_symlink():
            target.mkdir()
            for file in source.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            self.foreign[target.name] = False

    @rule(name=st.sampled_from(["checkpoint-best", "checkpoint-backup", "checkpoint-007", "checkpoint-", "notes", "checkpoint-5.bak"]))
    def a_person_makes_a_folder(self, name: str) -> None:
        (self.run.path / name).mkdir(exist_ok=True)
        (self.run.path / name / "mine.txt").touch()
        self.foreign[name] = False

    @precondition(lambda self: self.valid)
    @rule(data=st.data(), name=st.sampled_from(["checkpoint-900", "checkpoint-1", "checkpoint-2"]))
    def a_person_makes_a_link(self, data: st.DataObject, name: str) -> None:
        link = self.run.path / name
        if not link.exists() and not link.is_symlink():
            link.symlink_to(self.run.checkpoint(data.draw(st.sampled_from(sorted(self.valid)))))
            self.foreign[name] = True

    @rule(step=st.integers(1, 40))
    def half_a_folder(self, step: int) -> None:
        folder = self.run.checkpoint(step)
        if not folder.exists() and not folder.is_symlink():
            folder.mkdir()
            (folder / "state.bin").touch()
            self.foreign[folder.name] = False

    @rule(limit=st.sampled_from([1, 1, 2, 2, 3, 4, None]))
    def rotates(self, limit: int | None) -> None:
        rotate(self.run, limit, None if self.best is None else self.run.checkpoint(self.best))
        there = {
            step for step in self.valid | self.damaged if self.run.checkpoint(step).is_dir() and not self.run.checkpoint(step).is_symlink()
        }
        gone = (self.valid | self.damaged) - there
        newest = sorted(self.valid, reverse=True)
        assert not gone & set(newest[: max(limit or len(newest), 2)])
        assert self.best not in gone
        assert limit is not None or not gone
        if limit is not None:
            assert len(there & self.valid) <= max(limit, 2) + 1
        self.valid -= gone
        self.damaged -= gone

    @invariant()
    def the_latest_valid_one_is_found(self) -> None:
        folder, notices = latest_valid(self.run)
        assert folder == (self.run.checkpoint(max(self.valid)) if self.valid else None)
        passed_over = {step for step in self.damaged if step > max(self.valid, default=-1)}
        assert all(any(f"checkpoint-{step} was passed over" in notice for notice in notices) for step in passed_over)

    @invariant()
    def nothing_of_others_is_lost(self) -> None:
        for name, link in self.foreign.items():
            path = self.run.path / name
            assert path.is_symlink() if link else (path.is_dir() and any(path.iterdir()))


TestRotation = Rotation.TestCase
TestRotation.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestTwoThousandRotations(Rotation.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=2000, stateful_step_count=30, deadline=None)


def test_a_checkpoint_that_is_passed_over_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save(run, 10)
    (save(run, 20) / "state.bin").unlink()
    folder, notices = latest_valid(run)
    assert folder == run.checkpoint(10)
    assert len(notices) == 1 and notices[0].startswith("checkpoint-20 was passed over: ") and "state.bin: missing" in notices[0]
    assert latest_valid(RunDir(tmp_path / "nothing")) == (None, [])


@pytest.mark.parametrize(("limit", "kept"), [(None, [5, 4, 3, 2, 1]), (1, [5, 4]), (2, [5, 4]), (3, [5, 4, 3]), (9, [5, 4, 3, 2, 1])])
def test_rotation_keeps_the_newest_two_at_least(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 6):
        save(run, step)
    assert rotate(run, limit) == []
    assert [step for step, _ in checkpoints(run)] == kept


def test_rotation_counts_only_what_verifies_and_keeps_the_best(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 7):
        save(run, step)
    (run.checkpoint(5) / "state.bin").write_bytes(b"rubbish")
    rotate(run, 2, keep=run.checkpoint(1))
    assert [step for step, _ in checkpoints(run)] == [6, 5, 4, 1]


def test_links_are_no_checkpoints(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    save(RunDir(tmp_path / "other"), 9)
    save(run, 1)
    run.checkpoint(9).symlink_to(tmp_path / "other/checkpoint-9")
    assert latest_valid(run) == (run.checkpoint(1), [])
    assert checkpoints(run) == [(1, run.checkpoint(1))]


def test_rotation_says_what_it_could_not_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        save(run, step)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert rotate(run, 2) == [f"{run.checkpoint(1)} could not be deleted: Permission denied"]
    assert [step for step, _ in checkpoints(run)] == [3, 2, 1]


CHANGED: dict[str, list[str]] = {
    "train.seed": ["train.seed=7"],
    "train.data_seed": ["train.data_seed=7"],
    "train.per_device_train_batch_size": ["train.per_device_train_batch_size=2"],
    "train.gradient_accumulation_steps": ["train.gradient_accumulation_steps=2"],
    "train.num_train_epochs": ["train.num_train_epochs=5"],
    "train.max_steps": ["train.max_steps=50"],
    "train.learning_rate": ["train.learning_rate=2e-4"],
    "train.lr_scheduler_type": ["train.lr_scheduler_type=cosine"],
    "train.warmup_steps": ["train.warmup_ratio=0.1"],
    "train.optim": ["train.optim=adamw_torch_fused"],
    "train.weight_decay": ["train.weight_decay=0.1"],
    "lora.r": ["lora.r=16"],
    "lora.lora_alpha": ["lora.lora_alpha=8"],
    "lora.target_modules": ["lora.target_modules=[l1]"],
    "lora.use_rslora": ["lora.use_rslora=true"],
    "data.max_length": ["data.max_length=64"],
    "data.packing": ["data.packing=none"],
    "data.template": ["data.template=alpaca"],
    "data.system": ["data.system=x"],
    "data.eval": ["data.eval=0.1"],
    "model.dtype": ["model.dtype=float32"],
}
UNCHANGED = [
    "train.output_dir=elsewhere",
    "train.logging_steps=1",
    "train.save_steps=50",
    "train.eval_steps=25",
    "train.save_total_limit=9",
    "train.gradient_checkpointing=true",
    "train.state_offload=gpu",
    "train.cuda_graphs=false",
    "generation.top_k=3",
    "model.backend=reference",
]


@pytest.fixture
def recipe_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(SMALL, encoding="utf-8")
    for name in ("records.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    return tmp_path / "recipe.yaml"


def print_of(recipe_path: Path, overrides: list[str] | None = None, template: str = "t1") -> dict[str, Any]:
    files = {"data": [Path("records.json")], "base": [Path("model.safetensors")], "tokenizer": [Path("tokenizer.model")]}
    return fingerprint(load(recipe_path, overrides or []), files, template=template)


@pytest.mark.parametrize("field", CHANGED)
def test_a_changed_recipe_is_another_run(recipe_path: Path, field: str) -> None:
    assert field in [change[0] for change in compare(print_of(recipe_path), print_of(recipe_path, CHANGED[field]))]


def test_what_does_not_change_the_weights_is_the_same_run(recipe_path: Path) -> None:
    assert compare(print_of(recipe_path), print_of(recipe_path, UNCHANGED)) == []


@pytest.mark.parametrize(("role", "name"), [("data", "records.json"), ("base", "model.safetensors"), ("tokenizer", "tokenizer.model")])
def test_contents_count_and_not_time_or_size(recipe_path: Path, role: str, name: str) -> None:
    before, stamp = print_of(recipe_path), Path(name).stat()
    Path(name).write_text(name.upper(), encoding="utf-8")
    os.utime(name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [change[0] for change in compare(before, print_of(recipe_path))] == [role]
    assert [change[0] for change in compare(print_of(recipe_path), print_of(recipe_path, template="t2"))] == ["template"]


def test_a_large_file_is_hashed_over_its_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnl.run_dir.SAMPLED", 1000)
    path = tmp_path / "model.safetensors"
    size = 40_000_000
    seen = set()
    for place in (None, 0, size // 2, size - 1):
        with path.open("wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        seen.add(hash_files([path]))
    assert len(seen) == 4


def test_the_same_data_elsewhere_is_the_same_run(recipe_path: Path, tmp_path: Path) -> None:
    before = print_of(recipe_path)
    (tmp_path / "copy").mkdir()
    Path("records.json").rename("copy/records.json")
    files = {"data": [Path("copy/records.json")], "base": [Path("model.safetensors")], "tokenizer": [Path("tokenizer.model")]}
    after = fingerprint(load(recipe_path, ["data.train=copy/records.json"]), files, template="t1")
    assert compare(before, after) == []


def test_open_run_new_again_and_finished(tmp_path: Path) -> None:
    run, status = open_run(tmp_path / "a/run", {"train.seed": 1})
    assert status == "new" and run.path == tmp_path / "a/run"
    assert open_run(run.path, {"train.seed": 1})[1] == "unfinished"
    run.update_metadata(status="interrupted", step=30)
    assert open_run(run.path, {"train.seed": 1})[1] == "interrupted"
    run.update_metadata(status="finished")
    assert open_run(run.path, {"train.seed": 1})[1] == run.status == "finished"
    assert run.read_metadata() == {"status": "finished", "step": 30, "fingerprint": {"train.seed": 1}}


def test_open_run_refuses_another_run_and_names_the_change(tmp_path: Path) -> None:
    open_run(tmp_path, {"train.seed": 1, "train.learning_rate": 1e-4})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ModelError) as caught:
        open_run(tmp_path, {"train.seed": 2, "train.learning_rate": 2e-4})
    assert "holds another run (train.seed was 1 there and is 2 now, and 1 more: train.learning_rate)" in str(caught.value)
    assert caught.value.exit_code == 4 and (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(ModelError, match=r"learning_rate was 0\.0001"):
        open_run(tmp_path, {"train.seed": 2, "train.learning_rate": 2e-4}, allow=["train.seed"])
    run, _ = open_run(tmp_path, {"train.seed": 2, "train.learning_rate": 1e-4}, allow=["train.seed"])
    assert run.read_metadata()["allowed_changes"] == [["train.seed", 1, 2]]
    assert open_run(tmp_path, {"train.seed": 2, "train.learning_rate": 1e-4})[1] == "unfinished"


def test_open_run_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ModelError, match=r"holds files that are not of a run \(thesis\.tex\)"):
        open_run(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"run\.json"):
        open_run(tmp_path, {})


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    code = f"from pathlib import Path\nfrom tnl.run_dir import RunDir, hold\nwith hold(RunDir(Path({str(tmp_path)!r}))): pass"

    def second() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    with hold(RunDir(tmp_path)):
        assert "another process is working on this run" in second().stderr
    assert second().returncode == 0


def test_metrics_behind_a_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    trim_metrics(path, 5)
    path.write_text('{"step": 1, "loss": 2}\n{"step": 5}\n{"step": 6}\n{"st', encoding="utf-8")
    trim_metrics(path, 5)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "loss": 2}\n{"step": 5}\n'


def test_a_copied_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save(run, 10)
    run.checkpoint(10).rename(run.checkpoint(99))
    verify(run.checkpoint(99))
    folder, notices = latest_valid(run)
    assert folder is None and "found step 10; needed 99" in notices[0]
