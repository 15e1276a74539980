"""Trainer around our step: order, guard, best, patience, and that nothing of a run depends on when it was stopped."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from tnl.errors import ModelError, NumbersError, RecipeError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection, TrainSection
from tnl.run_dir import RunDir, checkpoints, latest_valid
from tnl.train import arguments, checkpoint, lora, recomputation
from tnl.train import trainer as module
from tnl.train.graphed import Graphed
from tnl.train.order import StepSampler
from tnl.train.step import Rows
from tnl.train.trainer import Record, TnlTrainer

SIZES = {"vocab_size": 30, "decoder_embed_dim": 8, "hidden_dim": 8, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 12}


def make_records(count: int, prefix: str = "r", seed: int = 0) -> list[Record]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 30, (4 + i % 5,), generator=generator).tolist() for i in range(count)]
    return [{"id": f"{prefix}:{i}", "input_ids": ids, "labels": [-100, *ids[1:]]} for i, ids in enumerate(rows)]


class Seen(TrainerCallback):
    """The ids of the records of every step, in order."""

    def __init__(self) -> None:
        self.ids: list[str] = []


def make(run: Path, *, records: int = 22, section: LoraSection | None = None, watch: Seen | None = None, **train: Any) -> TnlTrainer:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(TransnormerConfig(**SIZES, init_std=0.2))
    model = lora.attach(base, section or LoraSection(r=2, lora_dropout=0.3), "recipe.yaml", 3, lambda line: None)
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 5e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "use_cpu": True,
    }
    args, settings = arguments.build(TrainSection(**{**values, **train}), "recipe.yaml", run, torch.device("cpu"), measured=True)
    trainer = TnlTrainer(model, args, settings, Rows(1000, say=lambda line: None), make_records(records), make_records(4, "e", 1))
    if watch is not None:
        real = trainer.training_step

        def seen(model: nn.Module, inputs: Any, count: Any = None) -> Any:
            loss = real(model, inputs, count)
            watch.ids += inputs.ids
            return loss

        trainer.training_step = seen  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(
    ("train", "stop_at"),
    [
        *(({}, stop_at) for stop_at in (2, 5, 6, 7)),
        ({"train_sampling_strategy": "sequential"}, 6),
        ({"train_sampling_strategy": "group_by_length"}, 7),
        ({"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}, 7),
    ],
)
def test_every_record_once_an_epoch_and_in_the_same_order_after_a_stop(tmp_path: Path, train: dict[str, Any], stop_at: int) -> None:
    whole, first, second = Seen(), Seen(), Seen()
    trainer = make(tmp_path / "whole", watch=whole, **train)
    trainer.train()
    names = [f"r:{i}" for i in range(22)]
    assert Counter(whole.ids[:22]) == Counter(whole.ids[22:]) == Counter(names)  # 6 steps an epoch, the last one of 2 records
    if not train:
        assert whole.ids[:22] != whole.ids[22:] != names
    stopped = make(tmp_path / "run", watch=first, **train)
    stopped.stop_requested = lambda: stopped.state.global_step >= stop_at
    stopped.train()
    folder, _ = latest_valid(RunDir(tmp_path / "run"))
    assert folder is not None and folder.name == f"checkpoint-{stop_at}"
    make(tmp_path / "run", watch=second, **train).train(resume_from_checkpoint=str(folder))
    assert first.ids + second.ids == whole.ids
    a, b = (load_file(tmp_path / name / "checkpoint-12" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = StepSampler([3] * 10, 4, seed=1)
    first = list(sampler)
    assert [len(batch) for batch in first] == [4, 4, 2] == [len(batch) for batch in first] and list(sampler) == first
    torch.manual_seed(99)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(list(StepSampler([3] * 10, 4, seed=1, drop_last=True))) == 2
    assert list(StepSampler([3] * 10, 4, seed=2)) != first


# ---- numbers ------------------------------------------------------------------------------------


def nan_weight(trainer: TnlTrainer, step: int) -> None:
    trainer.net.get_base_model().model.layers[1].channel_mixer.l1.base_layer.weight.data[0, 0] = float("nan")


def inf_embedding(trainer: TnlTrainer, step: int) -> None:
    trainer.net.get_base_model().model.embed_tokens.weight.data[:, 0] = float("inf")


def nan_state(trainer: TnlTrainer, step: int) -> None:
    state = trainer.optimizer.state[trainer.guard.parameters[0][1]]
    state["exp_avg"].view(-1)[0] = float("nan")


def nan_gradient(trainer: TnlTrainer, step: int) -> None:
    trainer.guard.parameters[1][1].register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while the next step is computed"])
@pytest.mark.parametrize(
    ("harm", "named", "at"),
    [
        *(
            (harm, named, at)
            for harm, named in ((nan_weight, "weight"), (inf_embedding, "embed_tokens"), (nan_gradient, "gradient"))
            for at in (1, 3)
        ),
        (nan_state, "optimizer state", 2),  # the optimizer keeps nothing before its first update
    ],
)
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path: Path, harm: Any, named: str, at: int, late: bool) -> None:
    trainer = make(tmp_path, save_steps=1000 if late else 1, eval_steps=1000)
    trainer.guard.late = late
    real, weights = trainer.training_step, {}

    def harmed(model: nn.Module, inputs: Any, count: Any = None) -> Any:
        if trainer.state.global_step + 1 == at:
            harm(trainer, at)
            weights.update({name: p.detach().clone() for name, p in trainer.guard.parameters})
        return real(model, inputs, count)

    trainer.training_step = harmed  # type: ignore[method-assign]
    with pytest.raises(NumbersError) as caught:
        trainer.train()
    assert caught.value.exit_code == 5 and caught.value.where == f"step {at}"
    assert named in str(caught.value) and "records: r:" in str(caught.value)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.guard.parameters)
    assert all(line["step"] < at for line in trainer.state.log_history)
    for step, folder in checkpoints(RunDir(tmp_path)):
        assert step < at
        for value in load_file(folder / "adapter_model.safetensors").values():
            assert torch.isfinite(value).all()


def test_one_guilty_record_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with torch.no_grad():
        trainer.net.get_base_model().model.embed_tokens.weight[2] = float("nan")  # no record but one has token 2
    trainer.net.get_base_model().lm_head.weight = nn.Parameter(torch.randn(30, 8), requires_grad=False)
    trainer.train_records[7]["input_ids"][1] = 2
    with pytest.raises(NumbersError, match=r"records: r:7;"):
        trainer.train()


def test_a_measurement_that_is_not_finite_stops(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with torch.no_grad():
        trainer.net.get_base_model().model.embed_tokens.weight[2] = float("nan")
    trainer.net.get_base_model().lm_head.weight = nn.Parameter(torch.randn(30, 8), requires_grad=False)
    trainer.eval_records[1]["input_ids"][0] = 2
    with pytest.raises(NumbersError, match="e:1"):
        trainer.train()


def test_a_learning_rate_that_breaks_everything_saves_nothing_broken(tmp_path: Path) -> None:
    trainer = make(tmp_path, learning_rate=1.0, max_grad_norm=0, save_steps=1, eval_steps=1000, num_train_epochs=50)
    for group in trainer.create_optimizer().param_groups:
        group["lr"] = 1e30
    trainer.create_scheduler(100)
    trainer.lr_scheduler.base_lrs = [1e38 for _ in trainer.lr_scheduler.base_lrs]
    with pytest.raises(NumbersError):
        trainer.train()
    for _, folder in checkpoints(RunDir(tmp_path)):
        assert all(torch.isfinite(value).all() for value in load_file(folder / "adapter_model.safetensors").values())


def test_an_adapter_without_gradient_stops_before_step_5(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    dead = trainer.net.get_base_model().model.layers[1].channel_mixer.l3
    dead.scaling["default"] = 0.0  # the adapter is there and has no effect
    with pytest.raises(
        NumbersError, match=r"2 of 20 adapter matrices have had no gradient .*layers\.1\.channel_mixer\.l3\.lora_A"
    ) as caught:
        trainer.train()
    assert caught.value.where == "step 4"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_fewer_steps_is_judged_at_its_end(tmp_path: Path, steps: int) -> None:
    make(tmp_path / "sound", max_steps=steps).train()
    trainer = make(tmp_path / "dead", max_steps=steps)
    trainer.net.get_base_model().model.layers[1].channel_mixer.l3.scaling["default"] = 0.0
    with pytest.raises(NumbersError, match=r"2 of 20 adapter matrices have had no gradient .*layers\.1\.channel_mixer\.l3\.lora_A"):
        trainer.train()


def test_a_warm_up_from_zero_is_not_taken_for_a_dead_adapter(tmp_path: Path) -> None:
    make(tmp_path, warmup_steps=6).train()


# ---- best, patience, schedule -------------------------------------------------------------------


def test_the_best_checkpoint_outlives_the_rotation(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_train_epochs=4, save_total_limit=1, learning_rate=0.5)
    trainer.train()
    best = trainer.state.best_global_step
    kept = [step for step, _ in checkpoints(RunDir(tmp_path))]
    assert best in kept and len(kept) <= 3 and kept[0] == 24
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert losses[best] == min(losses.values())
    assert trainer.load_best() == (None if best == 24 else best)
    again = trainer.evaluate()["eval_loss"]
    assert again == pytest.approx(losses[best], rel=1e-6)


def test_a_new_best_is_saved_whatever_save_steps_says(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_steps=1000, eval_steps=1)
    trainer.train()
    assert trainer.best_checkpoint is not None and trainer.best_checkpoint.is_dir()


def test_a_long_step_is_saved_at_once_unless_saving_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_STEP", 0)
    monkeypatch.setattr(module, "SAVING", 0)
    given = {"save_steps": 1000, "load_best_model_at_end": False, "save_total_limit": None}
    for name, train, steps in (("all", {}, list(range(1, 13))), ("epochs", {"save_strategy": "epoch"}, [6, 12])):
        make(tmp_path / name, **given, **train).train()
        assert [step for step, _ in checkpoints(RunDir(tmp_path / name))][::-1] == steps
    monkeypatch.setattr(module, "SAVING", 10**9)
    make(tmp_path / "one", **given).train()
    assert [step for step, _ in checkpoints(RunDir(tmp_path / "one"))] == [12, 1], "the first, when nobody knows yet, and the last"


def test_patience(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_train_epochs=10, learning_rate=0.9, eval_steps=1)
    object.__setattr__(trainer.settings, "early_stopping_patience", 2)
    trainer.train()
    assert trainer.state.global_step == trainer.state.best_global_step + 2 < trainer.state.max_steps


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the run has 12"):
        make(tmp_path, warmup_steps=13).train()


def test_scheduler_kwargs_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.lr_scheduler_kwargs"):
        make(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"nonesuch": 1}).train()


def test_an_optimizer_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.optim"):
        make(tmp_path, optim="galore_adamw", optim_target_modules=["l1"]).train()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop"])
def test_other_optimizers_stop_and_go_on(tmp_path: Path, optim: str) -> None:
    make(tmp_path / "whole", optim=optim, learning_rate=1e-3).train()
    stopped = make(tmp_path / "run", optim=optim, learning_rate=1e-3)
    stopped.stop_requested = lambda: stopped.state.global_step >= 5
    stopped.train()
    make(tmp_path / "run", optim=optim, learning_rate=1e-3).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    for name in (checkpoint.ADAPTER_WEIGHTS, checkpoint.OPTIMIZER):
        assert (tmp_path / "whole" / "checkpoint-12" / name).read_bytes() == (tmp_path / "run" / "checkpoint-12" / name).read_bytes()


# ---- resuming -----------------------------------------------------------------------------------


def test_a_run_that_has_all_its_steps_trains_no_more(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    seen = Seen()
    trainer = make(tmp_path, max_steps=4, watch=seen)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen.ids == [] and trainer.state.global_step == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    make(folder, max_steps=4).train()
    return folder


FILES = ["optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors", "adapter_config.json"]


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, how) for name in FILES for how in ("missing", "cut", "a bit")), *((name, "another step's") for name in FILES[:-1])],
)
def test_whatever_is_wrong_with_a_file_is_found_before_it_is_used(saved: Path, tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint-4" / name
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "a bit":
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
    else:
        file.write_bytes((tmp_path / "checkpoint-2" / name).read_bytes())
    trainer = make(tmp_path, max_steps=4)
    before = {key: p.detach().clone() for key, p in trainer.guard.parameters}
    with pytest.raises(ModelError, match=name) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert caught.value.exit_code == 4
    assert all(torch.equal(p, before[key]) for key, p in trainer.guard.parameters)


def test_another_rank_or_scale_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for section, words in ((LoraSection(r=2, lora_alpha=1, lora_dropout=0.3), "lora_alpha"), (LoraSection(r=3, lora_dropout=0.3), " r ")):
        with pytest.raises(ModelError, match=words):
            make(tmp_path, max_steps=4, section=section).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_split_rows_stay_split_after_a_stop(tmp_path: Path) -> None:
    stopped = make(tmp_path, max_steps=4)
    stopped.rows.budget, stopped.rows.chunk = 8, 16
    stopped.stop_requested = lambda: stopped.state.global_step >= 2
    stopped.train()
    trainer = make(tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (trainer.rows.budget, trainer.rows.chunk) == (8, 16)


def test_a_run_that_went_on_recomputing_is_not_recorded_when_it_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recomputation.Kept
    monkeypatch.setattr(recomputation, "Kept", lambda device, host: real(device, host=True))  # as on a GPU
    for name, recomputes in (("plain", False), ("recomputed", True)):
        stopped = make(tmp_path / name, max_steps=4)
        if recomputes:
            recomputation.use(stopped.net, "host")  # as Rows.shrink does
        stopped.stop_requested = lambda stopped=stopped: stopped.state.global_step >= 2
        stopped.train()
        trainer = make(tmp_path / name, max_steps=4)
        trainer.graphed = Graphed(trainer.net)
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        assert (trainer.graphed is None) == (recomputation.level_of(trainer.net) == "host") == recomputes
