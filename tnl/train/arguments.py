"""The train section as transformers.TrainingArguments, and what of it is ours.

Trainer is handed one batch an optimizer step (batch x accumulation records, accumulation 1); checkpoints, their rotation and the
best one are kept by tnl/train/trainer.py, so save_total_limit and load_best_model_at_end stay here.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from tnl.errors import RecipeError
from tnl.recipe.sections import NOT_TRANSFORMERS, TrainSection
from tnl.train.places import Where, at

REFUSED = {
    "bf16_full_eval": "evaluation uses the numbers of training. Set model.dtype instead",
    "torch_compile": "a step is not run through the compiled module. Leave it out",
    "torch_compile_backend": "a step is not run through a compiled module. Leave it out",
    "torch_compile_mode": "a step is not run through a compiled module. Leave it out",
    "use_liger_kernel": "liger has no kernels for this model, and the logits are never whole anyway. Leave it out",
    "liger_kernel_config": "liger has no kernels for this model. Leave it out",
    "auto_find_batch_size": "memory is planned, and rows are split when it runs out, without it. Leave it out",
    "parallelism_config": "processes share records, or weights by train.fsdp or train.deepspeed. Leave it out",
    "accelerator_config": "batches do not go through accelerate. Leave it out",
    "push_to_hub": "a run uploads nothing. Leave it out, and upload the run's adapter folder afterwards",
    "save_only_model": "such a checkpoint could not be continued. Leave it out",
    "enable_jit_checkpoint": "a signal saves a checkpoint without it. Leave it out",
    "ignore_data_skip": "records would be seen twice or never. Leave it out",
    "restore_callback_states_from_checkpoint": "it sets whatever a checkpoint's file says. Leave it out",
    "resume_from_checkpoint": "the same command again, or tnl resume, continues a run. Leave it out",
    "logging_nan_inf_filter": "a loss that is not finite stops the run. Leave it out",
    "eval_accumulation_steps": "evaluation keeps no predictions. Leave it out",
    "include_for_metrics": "evaluation keeps no predictions. Leave it out",
    "batch_eval_metrics": "evaluation keeps no predictions. Leave it out",
    "eval_use_gather_object": "evaluation keeps no predictions. Leave it out",
    "label_names": "records have labels by their own name. Leave it out",
}
"""Fields of TrainingArguments that would do nothing here, or harm: field -> why, and what to do. What needs no torch to be refused is
refused by tnl/recipe/load.py, before anything is imported."""

DURING_BACKWARD = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
)
DDP = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
ENGINES = ("fsdp", "fsdp_config", "deepspeed", *DDP)
"""What engine_choice.py reads."""
OURS = ("save_total_limit", "load_best_model_at_end", "bf16", "gradient_accumulation_steps", *ENGINES, *NOT_TRANSFORMERS)

RECOMPUTATION = ("gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
"""Ours as well: Trainer would put torch's form in the place of recomputation.py's."""


@dataclass(frozen=True)
class Settings:
    """What of the train section is not Trainer's."""

    records_per_step: int
    save_total_limit: int | None
    keep_best: bool
    """Whether the run's adapter is that of the best measurement."""
    early_stopping_patience: int | None
    """Measurements without a new best after which training stops."""
    plain: bool
    """Lines instead of a live display."""


def build(section: TrainSection, where: Where, run: Path, device: torch.device, measured: bool) -> tuple[TrainingArguments, Settings]:
    """Translate the section. where: the recipe's file, or its `where`, for errors; measured: whether there are held-out records.

    Raises RecipeError for what cannot act here, or what transformers refuses.
    """
    given = section.arguments()
    check(given, where, measured)
    records = section.per_device_train_batch_size * section.gradient_accumulation_steps
    patience = given.get("early_stopping_patience")
    settings = Settings(
        records_per_step=records,
        save_total_limit=section.save_total_limit,
        keep_best=bool(section.load_best_model_at_end and measured and "no" not in (section.save_strategy, section.eval_strategy)),
        early_stopping_patience=patience if measured else None,
        plain=bool(given.get("disable_tqdm")),
    )
    insists = "eval_on_start" in section.model_fields_set
    fields = {name: value for name, value in given.items() if name not in (*OURS, *RECOMPUTATION)}
    fields |= {
        "output_dir": str(run),
        "per_device_train_batch_size": records,
        "gradient_accumulation_steps": 1,
        "eval_strategy": section.eval_strategy if measured else "no",
        "eval_steps": section.eval_steps or section.save_steps,
        "eval_on_start": measured and section.eval_on_start and (section.eval_strategy != "no" or insists),
        "report_to": given.get("report_to") or "none",
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "metric_for_best_model": section.metric_for_best_model or "eval_loss",
    }
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports deepspeed where it is installed, which else looks for a card
    try:
        arguments = TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError, NotImplementedError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(at(where, "train"), f"transformers refuses it: {said.rstrip('.')}", "Change that field.") from error
    check_trackers(list(arguments.report_to or []), where)
    # with several GPUs Trainer would wrap the model in DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments, settings


def check(given: dict[str, Any], where: Where, measured: bool) -> None:
    """Refuse fields that would do nothing, or harm; their defaults may stand."""
    for name, why in REFUSED.items():
        if name in given and given[name] and given[name] != default_of(name):
            reason, _, todo = why.rpartition(". ")
            raise RecipeError(at(where, f"train.{name}"), f"cannot be used here: {reason}", todo)
    if given.get("optim") in DURING_BACKWARD:
        what = f"{given['optim']} changes weights during the backward pass, before the numbers can be checked"
        raise RecipeError(at(where, "train.optim"), what, "Take adamw_torch.")
    if given.get("train_sampling_strategy") == "batch_rebalance":
        raise RecipeError(at(where, "train.train_sampling_strategy"), "batch_rebalance balances several GPUs", "Take random.")
    if given["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy") and not measured:
        raise RecipeError(at(where, "train.lr_scheduler_type"), f"{given['lr_scheduler_type']} needs held-out records", "Set data.eval.")
    if given.get("save_strategy") == "best" and (not measured or given.get("eval_strategy") == "no"):
        raise RecipeError(
            at(where, "train.save_strategy"), "best needs held-out records that are measured", "Set data.eval and eval_strategy."
        )
    metric = given.get("metric_for_best_model") or "eval_loss"
    if metric.removeprefix("eval_") not in ("loss", "perplexity"):
        raise RecipeError(
            at(where, "train.metric_for_best_model"),
            f'"{metric}" is not measured (there are eval_loss, eval_perplexity)',
            "Take eval_loss.",
        )


def check_trackers(wanted: list[str], where: Where) -> None:
    """Every tracker must exist and be installed; Trainer would say so only after the model is loaded."""
    here = get_available_reporting_integrations()
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                at(where, "train.report_to"), f'no tracker is called "{name}" (there are {", ".join(INTEGRATION_TO_CALLBACK)})'
            )
        if name not in here:
            raise RecipeError(
                at(where, "train.report_to"), f"{name} is not installed", f"Install it (pip install {name}), or leave it out."
            )


def default_of(name: str) -> Any:
    """What counts where a field is not given."""
    return TrainSection.model_fields[name].default


def recomputing(section: TrainSection) -> dict[str, Any] | None:
    """What the recipe says of torch.utils.checkpoint, under either of its names in transformers."""
    given = section.arguments()
    return given.get("activation_checkpointing_kwargs") or given.get("gradient_checkpointing_kwargs")


def asks_for_bfloat16(section: TrainSection) -> bool:
    """Whether bf16: true stands in the section: here it means that the frozen weights are bfloat16."""
    return bool(section.arguments().get("bf16"))
