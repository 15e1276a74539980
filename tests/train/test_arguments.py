"""The train section as TrainingArguments: what is Trainer's, what is ours, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tnl.errors import RecipeError
from tnl.recipe.sections import TrainSection
from tnl.train import arguments

CPU = torch.device("cpu")


def build(measured: bool = True, **fields: Any) -> tuple[TrainingArguments, arguments.Settings]:
    return arguments.build(TrainSection(**fields), "recipe.yaml", Path("run"), CPU, measured)


def test_one_batch_is_one_step() -> None:
    args, settings = build(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.train_batch_size) == (16, 1, 16)
    assert settings.records_per_step == 16 and args.n_gpu <= 1


def test_defaults_that_protect() -> None:
    args, settings = build()
    assert not args.logging_nan_inf_filter and args.report_to == [] and not args.remove_unused_columns and args.disable_tqdm
    assert args.eval_steps == args.save_steps and settings.keep_best
    # Trainer's own rotation and best model are off: both trust whatever is called checkpoint-N
    assert args.save_total_limit is None and not args.load_best_model_at_end


def test_what_is_given_reaches_trainer() -> None:
    args, settings = build(
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        neftune_noise_alpha=5,
        seed=7,
        save_on_each_node=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_total_limit=1,
        disable_tqdm=True,
    )
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == (3e-4, "cosine", 0.1, 0.1)
    assert args.neftune_noise_alpha == 5 and args.seed == 7 and args.save_on_each_node
    assert not args.gradient_checkpointing  # ours (recomputation.py), not Trainer's
    assert settings.save_total_limit == 1 and settings.plain


def test_without_held_out_records_nothing_is_measured() -> None:
    args, settings = build(measured=False)
    assert args.eval_strategy == "no" and not settings.keep_best
    for fields in ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"save_strategy": "best"}):
        with pytest.raises(RecipeError, match="held-out records"):
            build(measured=False, **fields)


@pytest.mark.parametrize("name", sorted(arguments.REFUSED))
def test_what_cannot_act_is_refused_and_its_default_may_stand(name: str) -> None:
    default = arguments.default_of(name)
    build(**{name: default})
    kinds = str(TrainSection.model_fields[name].annotation)
    other: Any = True if "bool" in kinds else {"x": 1} if "dict" in kinds else ["x"] if "list" in kinds else 1 if "int" in kinds else "x"
    with pytest.raises(RecipeError) as caught:
        build(**{name: other})
    assert f"recipe.yaml:train.{name}" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim": "lomo"}, "during the backward pass"),
        ({"train_sampling_strategy": "batch_rebalance"}, "several GPUs"),
        ({"metric_for_best_model": "eval_bleu"}, "not measured"),
        ({"tf32": True}, "transformers refuses it"),
        ({"report_to": ["nonesuch"]}, "nonesuch"),
    ],
)
def test_values_that_cannot_act(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(**fields)


def test_bf16_means_the_weights() -> None:
    args, _ = build(bf16=True)
    assert not args.bf16 and arguments.asks_for_bfloat16(TrainSection(bf16=True)) and not arguments.asks_for_bfloat16(TrainSection())


def test_options_of_recomputation_go_by_either_name() -> None:
    options = {"use_reentrant": True}
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        assert arguments.recomputing(TrainSection(**{name: options})) == options  # type: ignore[arg-type]
    assert arguments.recomputing(TrainSection()) is None
