"""Which engine a recipe asks for, and whether its configuration and the recipe say the same."""

import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tnl import paths
from tnl.errors import RecipeError, install
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import TrainSection
from tnl.train.crew import Crew
from tnl.train.engines import Engine
from tnl.train.places import Where, at
from tnl.train.sharded import DeepSpeed, Fsdp

DDP = {
    "ddp_find_unused_parameters": "find_unused_parameters",
    "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_broadcast_buffers": "broadcast_buffers",
    "ddp_static_graph": "static_graph",
}
"""Keys of the train section -> options of DistributedDataParallel."""
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers that work on each element by itself, so that their state may be shared out."""
WRAP = ("TRANSFORMER_BASED_WRAP", *(TransnormerForCausalLM._no_split_modules or ()))


def make(section: TrainSection, crew: Crew, device: torch.device, dtype: torch.dtype, where: Where) -> Engine:
    """The engine for a train section. Raises RecipeError, naming the key, for what cannot act or contradicts the recipe."""
    given = section.arguments()
    asked = [name for name in ("fsdp", "deepspeed") if given.get(name)]
    if not asked:
        return Engine(crew, device, **{DDP[name]: value for name, value in given.items() if name in DDP and value is not None})
    name = asked[0]
    if len(asked) > 1:
        raise RecipeError(at(where, "train.deepspeed"), "stands beside train.fsdp", "Keep one.")
    if crew.size == 1:
        todo = "Start it with --num-processes N, torchrun or accelerate launch, or leave it out."
        raise RecipeError(at(where, f"train.{name}"), "needs several processes (found 1)", todo)
    if section.optim not in OPTIMIZERS:
        what = f"{section.optim} cannot be shared out (needed: {', '.join(OPTIMIZERS)})"
        raise RecipeError(at(where, "train.optim"), what, "Take adamw_torch.")
    if section.segment_length is not None:
        what = f"rows are whole under {name}, whose processes must all compute the same number"
        raise RecipeError(at(where, "train.segment_length"), what, "Leave it out, or train without train." + name + ".")
    if name == "fsdp":
        return Fsdp(crew, device, **fsdp_options(given["fsdp"], given.get("fsdp_config"), where))
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(at(where, "train.deepspeed"), "deepspeed is not installed", install("deepspeed"))
    return DeepSpeed(crew, device, deepspeed_config(given["deepspeed"], section, dtype, where))


def words(engine: Engine) -> str:
    """One line: who trains, and what goes otherwise than in one process; empty for one."""
    size = engine.crew.size
    if size == 1:
        return ""
    if not engine.sharded:
        return f"{size} processes, DDP: each computes its share of a step's records"
    shared = "FSDP2: weights, gradients and optimizer states"
    if isinstance(engine, DeepSpeed):
        what = {1: "optimizer states", 2: "gradients and optimizer states", 3: "weights, gradients and optimizer states"}[engine.stage]
        shared = f"DeepSpeed ZeRO-{engine.stage}: {what}"
    limits = "rows are whole, are not shortened where memory runs out, and all processes measure all held-out records"
    return f"{size} processes, {shared} are shared out; {limits}"


def fsdp_options(word: bool | str, config: Any, where: Where) -> dict[str, bool]:
    """Arguments of Fsdp, from the words and settings that Trainer takes."""
    options = {"reshard_after_forward": True, "cpu_offload": False}
    for one in word.split() if isinstance(word, str) else ():
        if one == "shard_grad_op":
            options["reshard_after_forward"] = False
        elif one == "offload":
            options["cpu_offload"] = True
        elif one not in ("true", "full_shard", "auto_wrap"):
            raise RecipeError(at(where, "train.fsdp"), f'"{one}" cannot be used here (needed: true)', "Write true.")
    place, values = read(config or {}, "fsdp_config", where)
    for key, value in values.items():
        name = key.removeprefix("fsdp_")
        if name in options and isinstance(value, bool):
            options[name] = value
        elif not harmless(name, value):
            todo = (
                "Leave it out (train.gradient_checkpointing recomputes layers)." if name == "activation_checkpointing" else "Leave it out."
            )
            raise RecipeError(f"{place}{key}", f"cannot be used here (found {json.dumps(value)})", todo)
    return options


def harmless(name: str, value: Any) -> bool:
    """Whether an FSDP setting says what is done anyway."""
    if name in ("auto_wrap_policy", "transformer_layer_cls_to_wrap"):
        return all(one in WRAP for one in ([value] if isinstance(value, str) else value or ()))
    kept: dict[str, tuple[Any, ...]] = {"version": (2,), "state_dict_type": ("FULL_STATE_DICT",), "activation_checkpointing": (False,)}
    return value in kept.get(name, ()) or (name == "min_num_params" and value == 0)


def deepspeed_config(config: Any, section: TrainSection, dtype: torch.dtype, where: Where) -> dict[str, Any]:
    """The configuration as it is handed to DeepSpeed. Raises RecipeError for a key that contradicts the recipe."""
    place, values = read(config, "deepspeed", where)
    values = copy.deepcopy(dict(values))
    for key, name, wanted in said_by_recipe(section, dtype):
        found = look_up(values, key)
        if found not in (None, "auto", wanted):
            what = f"is {json.dumps(found)}, and {name} is {json.dumps(wanted)}"
            raise RecipeError(f"{place}{key}", what, 'Write "auto" there, or make them equal.')
    check_sections(values, place, section)
    stage = look_up(values, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise RecipeError(f"{place}zero_optimization.stage", f"is {json.dumps(stage)} (needed: 1, 2 or 3)", "Write 2 or 3.")
    for name in ("optimizer", "scheduler", "train_batch_size"):
        values.pop(name, None)
    # a step's records are shared out before DeepSpeed sees them, so it counts rows alone
    return values | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(section.max_grad_norm),
        "bf16": {**values.get("bf16", {}), "enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def said_by_recipe(section: TrainSection, dtype: torch.dtype) -> Iterator[tuple[str, str, Any]]:
    """DeepSpeed's key, the recipe's, and the recipe's value."""
    batch, steps = section.per_device_train_batch_size, section.gradient_accumulation_steps
    yield "train_batch_size", "train.per_device_train_batch_size x train.gradient_accumulation_steps", batch * steps
    yield "train_micro_batch_size_per_gpu", "train.per_device_train_batch_size", batch
    yield "gradient_accumulation_steps", "train.gradient_accumulation_steps", steps
    yield "gradient_clipping", "train.max_grad_norm", section.max_grad_norm
    yield "bf16.enabled", "the base's bfloat16 (model.dtype)", dtype == torch.bfloat16
    yield "fp16.enabled", "float16, which overflows in this model,", False
    yield "optimizer.params.lr", "train.learning_rate", section.learning_rate
    yield "optimizer.params.betas", "train.adam_beta1, adam_beta2", [section.adam_beta1, section.adam_beta2]
    yield "optimizer.params.eps", "train.adam_epsilon", section.adam_epsilon
    yield "optimizer.params.weight_decay", "train.weight_decay", section.weight_decay


def check_sections(values: Mapping[str, Any], place: str, section: TrainSection) -> None:
    """The recipe's optimizer and schedule count: sections of DeepSpeed's may only repeat them."""
    kind = look_up(values, "optimizer.type")
    if kind is not None and not (kind in ("Adam", "AdamW") and section.optim.startswith("adamw")):
        raise RecipeError(f"{place}optimizer.type", f"is {kind}, and train.optim is {section.optim}", "Leave the section out.")
    for key, value in (look_up(values, "scheduler.params") or {}).items():
        if value != "auto":
            what = f"is {json.dumps(value)}, and train.lr_scheduler_type, {section.lr_scheduler_type}, is what counts"
            raise RecipeError(f"{place}scheduler.params.{key}", what, "Leave the section out.")
    for key in ("offload_optimizer", "offload_param"):
        device = look_up(values, f"zero_optimization.{key}.device")
        if device not in (None, "none", "cpu"):
            raise RecipeError(f"{place}zero_optimization.{key}.device", f"is {device} (needed: none or cpu)", "Write cpu.")


def look_up(values: Any, key: str) -> Any:
    """The value of a key such as a.b.c; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def read(config: Any, key: str, where: Where) -> tuple[str, dict[str, Any]]:
    """A configuration written in the recipe, or in a JSON file: what an error's place begins with, and the values."""
    if isinstance(config, Mapping):
        return f"{at(where, f'train.{key}')}.", dict(config)
    path = Path(str(config))
    if not path.exists():
        raise RecipeError(at(where, f"train.{key}"), f"{path}: {paths.missing(path)[0]}", paths.missing(path)[1])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(at(where, f"train.{key}"), f"{path} cannot be read ({error.strerror})", "Name a JSON file.") from None
    except ValueError as error:
        raise RecipeError(path, f"is not JSON ({error})", "Mend it.") from None
    if not isinstance(values, dict):
        raise RecipeError(path, f"holds a {type(values).__name__} (needed: an object)", "Mend it.")
    return f"{path}:", values
