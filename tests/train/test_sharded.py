"""FSDP2 and DeepSpeed on two CPU processes: the losses of one process, the same files, and runs that change engines."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.processes import assert_same_run, command, tnl, together
from tests.train.test_processes import assert_same_adapter, write
from tnl.errors import RecipeError
from tnl.model.load import load_model
from tnl.recipe.sections import TrainSection
from tnl.run_dir import RunDir, checkpoints
from tnl.train import engine_choice
from tnl.train import run as training
from tnl.train.crew import Crew
from tnl.train.engines import Engine
from tnl.train.sharded import DeepSpeed, Fsdp, keep_exact

DEEPSPEED = Path(__file__).resolve().parents[2] / "recipes" / "deepspeed"
ENGINES = {
    "ddp": [],
    "fsdp": ["train.fsdp=true"],
    "zero2": [f"train.deepspeed={DEEPSPEED / 'zero2.json'}"],
    "zero3": [f"train.deepspeed={DEEPSPEED / 'zero3.json'}"],
}
FULL = ["lora=null", "train.learning_rate=2.0e-3", "train.weight_decay=0.1"]


@pytest.fixture(scope="module")
def alone(base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter's run in one process."""
    return training.run(write(tmp_path_factory.mktemp("alone"), base, records)).path


@pytest.fixture(scope="module")
def alone_full(base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process that trains every weight."""
    return training.run(write(tmp_path_factory.mktemp("full"), base, records), FULL).path


def train(folder: Path, base: Path, records: Path, *overrides: str, processes: int = 2) -> Path:
    done = tnl("train", str(write(folder, base, records)), "--num-processes", str(processes), *overrides)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_an_adapter_is_trained_as_in_one_process(engine: str, alone: Path, base: Path, records: Path, tmp_path: Path) -> None:
    run = train(tmp_path, base, records, *ENGINES[engine])
    assert_same_run(run, alone)
    assert_same_adapter(run, alone)
    evaluated = tnl("evaluate", str(run))
    assert evaluated.returncode == 0 and "adapter: loss" in evaluated.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_weight_is_trained_as_in_one_process(engine: str, alone_full: Path, base: Path, records: Path, tmp_path: Path) -> None:
    run = train(tmp_path, base, records, *ENGINES[engine], *FULL, "train.gradient_checkpointing=true")
    assert_same_run(run, alone_full)
    mine, theirs = (load_file(one / "model" / "model.safetensors") for one in (run, alone_full))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=1e-3)


SHARED = ["data.system=现在你要扮演皇帝身边的女人甄嬛，说话要有分寸。", "data.max_length=128", "data.shared_prompt=true"]


@pytest.fixture(scope="module")
def alone_shared(base: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process whose rows have the prompt once."""
    return training.run(write(tmp_path_factory.mktemp("shared"), base, records), SHARED).path


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_a_shared_prompt_is_shared_in_every_process(engine: str, alone_shared: Path, base: Path, records: Path, tmp_path: Path) -> None:
    """With dropout, the same of it in all records of a step, whichever process has them."""
    run = train(tmp_path, base, records, *ENGINES[engine], *SHARED)
    assert "the first" in RunDir(run).read_metadata()["paths"]["rows"]
    assert_same_run(run, alone_shared)
    assert_same_adapter(run, alone_shared)


STOPPED = """
import os, signal
from tnl.train.guard import Guard
check = Guard.check
def checked(self, *a):
    check(self, *a)
    if self.steps == 5: os.kill(os.getpid(), signal.SIGTERM)
Guard.check = checked
"""
SWITCHES = [("ddp", "zero3", 2), ("zero3", "fsdp", 3), ("fsdp", "zero2", 2), ("zero2", "", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "processes"), SWITCHES)
def test_a_run_goes_on_under_another_engine(
    first: str, second: str, processes: int, alone: Path, base: Path, records: Path, tmp_path: Path
) -> None:
    """The first engine is stopped after step 5 of 10."""
    recipe, run = write(tmp_path, base, records), RunDir(tmp_path / "run")
    words = command(["train", str(recipe), *ENGINES[first]], STOPPED)
    done = together([words, words])
    assert [one.returncode for one in done] == [143, 143], done[0].stderr
    assert checkpoints(run)[0][0] == 5
    again = ENGINES.get(second, [])
    done_ = tnl("train", str(recipe), *again, *(["--num-processes", str(processes)] if processes > 1 else []))
    assert done_.returncode == 0, done_.stderr
    assert "goes on from checkpoint-5" in done_.stdout
    assert_same_run(run.path, alone)
    assert_same_adapter(run.path, alone)


@pytest.mark.slow
def test_bfloat16_weights_are_shared_out_too(base: Path, records: Path, tmp_path: Path) -> None:
    """Trained weights are computed in bfloat16 by DeepSpeed, their exact values kept and saved in float32."""
    (tmp_path / "one").mkdir()
    one = training.run(write(tmp_path / "one", base, records), ["model.dtype=bfloat16"]).path
    for engine, full in (("fsdp", []), ("zero3", []), ("fsdp", FULL), ("zero3", FULL)):
        folder = tmp_path / f"{engine}{len(full)}"
        folder.mkdir()
        run = train(folder, base, records, "model.dtype=bfloat16", *ENGINES[engine], *full)
        assert_same_run(run, one, 6e-2) if not full else None
        tensors = load_file(run / ("checkpoint-10/model.safetensors" if full else "adapter/adapter_model.safetensors"))
        rounded = [name for name, x in tensors.items() if x.dtype == torch.bfloat16 or torch.equal(x, x.bfloat16().float())]
        assert not rounded if (engine, full) != ("fsdp", FULL) else rounded, "FSDP2 keeps the digits that the model has"


@pytest.mark.slow
def test_a_stopped_run_in_bfloat16_goes_on_with_every_digit(base: Path, records: Path, tmp_path: Path) -> None:
    """Whole weights that DeepSpeed computes in bfloat16 come back from a checkpoint as they were kept, in float32."""
    for name in ("through", "stopped"):
        (tmp_path / name).mkdir()
    options = ["model.dtype=bfloat16", *FULL, *ENGINES["zero3"]]
    through = train(tmp_path / "through", base, records, *options)
    words = command(["train", str(write(tmp_path / "stopped", base, records)), *options], STOPPED)
    assert [one.returncode for one in together([words, words])] == [143, 143]
    stopped = train(tmp_path / "stopped", base, records, *options)
    assert_same_run(stopped, through)


def make(size: int = 2, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return engine_choice.make(TrainSection(**fields), Crew(0, size), torch.device("cpu"), dtype, "recipe.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping: is 0.5, and train.max_grad_norm is 1.0"),
        ({"train_batch_size": 64}, "train_batch_size: is 64, and train.per_device_train_batch_size x train.gradient_accumulation_steps is"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu: is 8, and train.per_device_train_batch_size is 4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: is 1, and train.gradient_accumulation_steps is 4"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: is true, and the base's bfloat16 (model.dtype) is false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: is true, and float16, which overflows"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr: is 0.001, and train.learning_rate is 0.0001"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: is Lamb, and train.optim is adamw_torch"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "scheduler.params.warmup_num_steps: is 10"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: is 0 (needed: 1, 2 or 3)"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device: is nvme"),
    ],
)
def test_a_configuration_that_contradicts_the_recipe_is_named_by_its_key(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = {**json.loads((DEEPSPEED / "zero3.json").read_text(encoding="utf-8")), **change}
    (tmp_path / "ds.json").write_text(json.dumps(values), encoding="utf-8")
    for config, place in ((str(tmp_path / "ds.json"), f"{tmp_path / 'ds.json'}:"), (values, "recipe.yaml:train.deepspeed.")):
        with pytest.raises(RecipeError) as caught:
            make(deepspeed=config)
        assert str(caught.value).startswith(place) and said in str(caught.value)


def test_a_configuration_may_repeat_the_recipe() -> None:
    values = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 16,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto"}},
    }
    found = engine_choice.deepspeed_config(values, TrainSection(), torch.bfloat16, "recipe.yaml")
    assert found["bf16"] == {"enabled": True} and "optimizer" not in found and "scheduler" not in found and values["train_batch_size"] == 16


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fsdp": True, "size": 1}, r"train\.fsdp: needs several processes \(found 1\). Start it with --num-processes N"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {}}}, r"train\.deepspeed: stands beside train\.fsdp"),
        ({"fsdp": "shard_op"}, r'train\.fsdp: "shard_op" cannot be used here'),
        (
            {"fsdp": True, "fsdp_config": {"fsdp_activation_checkpointing": True}},
            r"activation_checkpointing.*train\.gradient_checkpointing",
        ),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, r"train\.fsdp_config\.version: cannot be used here \(found 1\)"),
        ({"fsdp": True, "optim": "adafactor"}, r"train\.optim: adafactor cannot be shared out"),
        ({"fsdp": True, "segment_length": 64}, r"train\.segment_length: rows are whole under fsdp"),
        ({"deepspeed": "nowhere.json"}, r"train\.deepspeed: nowhere\.json: no such file"),
    ],
)
def test_what_cannot_act_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make(**fields)


def test_deepspeed_is_asked_for_by_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else real(name, *a))
    with pytest.raises(RecipeError, match=r"deepspeed is not installed. .*pip install -c constraints.txt -e \"\.\[deepspeed\]\""):
        make(deepspeed={"zero_optimization": {"stage": 3}})


def test_ddp_s_options_reach_it() -> None:
    assert make(ddp_bucket_cap_mb=5, ddp_static_graph=False).options == {"bucket_cap_mb": 5, "static_graph": False}


def test_a_base_that_is_shared_out_waits_in_host_memory() -> None:
    gpu, config = torch.device("cuda", 1), {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}
    assert Engine(Crew(1, 2), gpu).home == gpu and DeepSpeed(Crew(1, 2), gpu, config).home == gpu
    for engine in (Fsdp(Crew(1, 2), gpu), DeepSpeed(Crew(1, 2), gpu, {**config, "zero_optimization": {"stage": 3}})):
        assert engine.parts and engine.home.type == "cpu"


def test_what_deepspeed_would_round_is_out_of_its_sight(base: Path) -> None:
    model = load_model(base, dtype="bfloat16", device="cpu").requires_grad_(False)
    names, ids = model.state_dict().keys(), torch.arange(60)[None]
    before = model(input_ids=ids).logits
    keep_exact(model)
    for p in model.parameters():  # as DeepSpeed does
        p.data = p.data.bfloat16()
    exact = model.get_buffer("model.layers.0.token_mixer.lrpe.theta")
    assert exact.dtype == torch.float32 and model.state_dict().keys() == names
    assert torch.equal(model(input_ids=ids).logits, before)


def test_what_goes_otherwise_is_said_in_one_line() -> None:
    assert engine_choice.words(make(1)) == ""
    assert engine_choice.words(make()) == "2 processes, DDP: each computes its share of a step's records"
    line = engine_choice.words(make(deepspeed={"zero_optimization": {"stage": 2}}))
    assert line.startswith("2 processes, DeepSpeed ZeRO-2: gradients and optimizer states are shared out; rows are whole")
    assert "\n" not in engine_choice.words(make(fsdp="full_shard auto_wrap"))
