"""Names that people bring along: those that transformers dropped are translated, those of other tools are explained."""

from typing import Any

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "xpu_backend": "ddp_backend",
    "torchdynamo": "torch_compile_backend",
}
"""Fields of TrainingArguments that transformers renamed: the value is taken over as it is."""

DROPPED = {
    "overwrite_output_dir": "a folder that holds another run is never overwritten",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "metrics.jsonl stands in the run's folder",
    "use_mps_device": "an Apple GPU is found without it",
    "use_ipex": "transformers 5 has no such path",
    "jit_mode_eval": "transformers 5 has no such path",
    "fp16_backend": "torch decides",
    "half_precision_backend": "torch decides",
    "fp16_opt_level": "torch decides",
    "past_index": "the recurrent state travels as an argument",
    "ray_scope": "hyperparameter search is not part of a run",
    "tpu_num_cores": "transformers 5 has no such path",
    "tpu_metrics_debug": "transformers 5 has no such path",
    "mp_parameters": "transformers 5 has no such path",
    "include_tokens_per_second": "tokens a second are always shown",
}
"""Fields of TrainingArguments that are gone, with the reason they are not missed."""

SYNONYMS = {
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "targets": "lora.target_modules",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "model_max_length": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "dataset_path": "data.train",
    "val_size": "data.eval",
    "val_set_size": "data.eval",
    "test_size": "data.eval",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "sample_packing": "data.packing",
    "system_prompt": "data.system",
    "default_system": "data.system",
    "prompt_template": "data.template",
    "chat_template": "data.template",
    "name_or_path": "model.path",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "model_id": "model.path",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "accumulation_steps": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "output": "train.output_dir",
    "out_dir": "train.output_dir",
    "max_tokens": "generation.max_new_tokens",
    "max_new_token": "generation.max_new_tokens",
}
"""Names of other tools, or of before, for keys of ours: named in the error, never taken over in silence."""


def translate(train: dict[str, Any], *, replace: bool = False) -> list[tuple[str, str, str]]:
    """Rewrite, in place, the names in a train section that transformers dropped.

    Returns for each its old name, its new one (empty: left out) and a line that says so. Where both stand,
    the old one counts if replace is true (it came later, from the command line), else KeyError(old, new) is raised.
    """
    done = []
    for old in [name for name in train if name in RENAMED or name in DROPPED or name in _SPECIAL]:
        value = train.pop(old)
        if old in DROPPED:
            done.append((old, "", f"train.{old} is gone from transformers 5 and was left out: {DROPPED[old]}"))
            continue
        new, value = (RENAMED[old], value) if old in RENAMED else _SPECIAL[old](value)
        if new in train and not replace:
            raise KeyError(old, new)
        if new:
            train[new] = value
        done.append(
            (
                old,
                new,
                f"train.{old} is called {new} in transformers 5: {new}: {value} is used"
                if new
                else f"train.{old} is gone from transformers 5",
            )
        )
    return done


_SPECIAL = {
    # a warmup_steps below 1 is a share of all steps
    "warmup_ratio": lambda value: ("warmup_steps", value),
    "group_by_length": lambda value: ("train_sampling_strategy", "group_by_length") if value else ("", value),
    "adafactor": lambda value: ("optim", "adafactor") if value else ("", value),
    "include_inputs_for_metrics": lambda value: ("include_for_metrics", ["inputs"]) if value else ("", value),
}
