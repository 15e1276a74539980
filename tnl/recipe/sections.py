"""The five sections of a recipe.

The docstring of a field is its help text, and its value here the only place where a default stands. lora and train take every
field of peft.LoraConfig and transformers.TrainingArguments (tnl/recipe/fields.py) beside those that are written out below.
"""

from typing import Any, Literal

from pydantic import Field

from tnl.recipe.fields import LoraFields, Optimizer, Scheduler, Strict, TrainingFields


class ModelSection(Strict):
    """The base model."""

    path: str
    """A folder, a repository of the hub (owner/name), or demo: the small base that comes with tnl."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where a repository is fetched from; a folder is never looked for on the net."""
    revision: str | None = None
    """The commit, tag or branch of the repository; null is its newest."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The numbers of the frozen weights; auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Which kernels compute; auto is Triton's on a GPU that runs them, else reference: plain PyTorch."""


class DataSection(Strict):
    """The records, and how they become tokens."""

    train: str | list[str]
    """A file, a folder, or a list of these: .json, .jsonl, .csv, .parquet or .txt."""
    eval: int | float | str | list[str] | None = 0.05
    """The share of the records that is held out to measure the loss, or files of its own; 0 or null measures nothing."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "transcript", "text"] = "auto"
    """How a record is written; auto finds out and says so."""
    columns: dict[str, str] | None = None
    """Names of the file's columns where they differ, such as {instruction: prompt, output: response}."""
    encoding: str | None = None
    """The encoding of text files; null is UTF-8, and nothing is guessed."""
    template: Literal["chatml", "chatml-tutorial", "alpaca", "human-assistant"] = "chatml"
    """How turns are written for the model; saved with the adapter, so that it is asked as it was taught."""
    system: str | None = None
    """The system prompt of every record that has none of its own."""
    persona: str | None = None
    """In transcripts, the speaker whose lines are learned."""
    max_length: int | None = Field(1024, ge=8)
    """Tokens a record may have; what is longer is treated as overlong says; null cuts nothing."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """A record that is too long: cut (its end token is kept), left out, or a reason to stop."""
    packing: Literal["batch", "fill", "none"] = "batch"
    """batch: a step's records end to end in one row; none: padded (the loss is the same); fill: rows of row_tokens, which batches count."""
    row_tokens: int | None = Field(None, ge=8)
    """With packing fill, the tokens of a row; null is what fits into memory and keeps the machine busy."""
    shared_prompt: bool | Literal["auto"] = "auto"
    """Compute the tokens that all records begin with once a row; auto: where nothing is dropped; true: with one dropout for all records."""


class LoraSection(LoraFields):
    """The fields of peft.LoraConfig by their own names; these are the ones with a default of ours."""

    r: int = Field(8, ge=1, le=16384)
    """Rank of the update."""
    lora_alpha: int = Field(32, ge=1, le=65536)
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: int | float = Field(0.1, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped while training."""
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or all-linear; LLaMA's names (q_proj ... down_proj) are understood."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well."""

    def arguments(self) -> dict[str, Any]:
        """Return what is handed to peft.LoraConfig: our defaults and all that the recipe gives."""
        return given(self)


class TrainSection(TrainingFields):
    """The fields of transformers.TrainingArguments by their own names; these are the ones with a default of ours."""

    output_dir: str = ""
    """The run's folder; empty is output/ and the recipe's name."""
    num_train_epochs: int | float = Field(3, gt=0, le=100_000)
    """How often every record is seen."""
    min_steps: int | None = Field(None, ge=1)
    """Where the records are so few that the epochs make fewer optimizer steps, there are more epochs; null adds none."""
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; -1 leaves it to num_train_epochs."""
    per_device_train_batch_size: int = Field(4, ge=1, le=65536)
    """Records that are computed at once."""
    gradient_accumulation_steps: int = Field(4, ge=1, le=65536)
    """Batches an optimizer step."""
    per_device_eval_batch_size: int = Field(4, ge=1, le=65536)
    """Records that are computed at once in an evaluation."""
    learning_rate: int | float = Field(1e-4, gt=0, le=1)
    """The largest step size of the schedule."""
    lr_scheduler_type: Scheduler = "linear"
    """How the step size falls."""
    warmup_steps: int | float = Field(0, ge=0)
    """Steps in which the step size rises from 0; a value below 1 is a share of all steps."""
    weight_decay: int | float = Field(0.0, ge=0, le=1)
    """How fast weights shrink by themselves."""
    adam_beta1: int | float = Field(0.9, ge=0, lt=1)
    """Memory of Adam's mean gradient."""
    adam_beta2: int | float = Field(0.999, ge=0, lt=1)
    """Memory of Adam's mean squared gradient."""
    adam_epsilon: int | float = Field(1e-8, gt=0, le=1)
    """What keeps Adam from dividing by 0."""
    max_grad_norm: int | float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping them: less memory, a third more time; false: only what must be."""
    segment_length: int | None = Field(None, ge=1)
    """A longer row is computed in segments of so many tokens, in constant memory and with the gradients of one pass; null: if it must."""
    state_offload: Literal["auto", "gpu", "host"] = "auto"
    """Where the states between segments wait; auto is the host beside a GPU, and computes some again where memory is short."""
    cuda_graphs: bool = True
    """On a GPU, record a step's launches once for each length of row and start them at once; the log says where it cannot be."""
    logging_steps: int | float = Field(10, gt=0)
    """Steps between two lines of metrics.jsonl."""
    logging_nan_inf_filter: bool = False
    """transformers hides a loss that is not finite; here it stops the run."""
    eval_on_start: bool = True
    """Measure the held-out loss before the first step as well, unless eval_strategy is no."""
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When the held-out loss is measured."""
    eval_steps: int | float | None = Field(None, gt=0)
    """Steps between two measurements; null is save_steps."""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """When a checkpoint is saved; the last step is always saved."""
    save_steps: int | float = Field(100, gt=0)
    """Steps between two checkpoints; a step of more than a minute is saved at once."""
    save_total_limit: int | None = Field(3, ge=1)
    """Checkpoints that are kept, beside the best one; null keeps all."""
    load_best_model_at_end: bool = True
    """Whether the adapter of the run is that of the lowest held-out loss, or that of the last step."""
    metric_for_best_model: str | None = "eval_loss"
    """What the best checkpoint has the lowest of."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Measurements without a new best after which training stops; null never stops early."""
    fsdp: bool | str | None = None  # type: ignore[assignment]  # transformers has text alone, and takes true
    """Share weights, gradients and optimizer state out over the processes with FSDP2: true; fsdp_config has its settings."""
    deepspeed: str | dict[str, Any] | None = None
    """Share them out with DeepSpeed: a configuration, such as recipes/deepspeed/zero3.json."""
    optim: Optimizer = "adamw_torch"
    """The optimizer."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Where all randomness starts: the order of records, dropout, the first adapter weights, sample answers."""

    def arguments(self) -> dict[str, Any]:
        """Return our defaults and all that the recipe gives; all but those in NOT_TRANSFORMERS are TrainingArguments' own."""
        return given(self)


NOT_TRANSFORMERS = ("min_steps", "early_stopping_patience", "segment_length", "state_offload", "cuda_graphs")
"""Keys of the train section that TrainingArguments does not have."""


class GenerationSection(Strict):
    """How answers are sampled, by the names of transformers.GenerationConfig."""

    max_new_tokens: int = Field(512, ge=1, le=1_048_576)
    """Tokens an answer may have."""
    do_sample: bool = True
    """Draw from the probabilities; false always takes the most probable token."""
    temperature: int | float = Field(0.7, ge=0, le=100)
    """Below 1 sharpens the probabilities, above 1 flattens them; 0 is the same as do_sample: false."""
    top_p: int | float = Field(0.9, gt=0, le=1)
    """Draw from the most probable tokens that together reach this share."""
    top_k: int = Field(50, ge=0)
    """Draw from this many of the most probable tokens; 0 is all."""
    min_p: int | float = Field(0.0, ge=0, le=1)
    """Leave out tokens less probable than this share of the most probable one's probability."""
    repetition_penalty: int | float = Field(1.03, gt=0, le=100)
    """Above 1 makes tokens that have stood before less probable."""


COLUMNS = (
    *("instruction", "input", "output", "system", "history", "messages", "role", "content", "tools"),
    *("conversations", "from", "value", "name", "line", "scene", "text"),
)
"""What data.columns may name on the left: the columns of all formats."""

SECTIONS: dict[str, type[Strict]] = {
    "model": ModelSection,
    "data": DataSection,
    "lora": LoraSection,
    "train": TrainSection,
    "generation": GenerationSection,
}


def given(section: Strict) -> dict[str, Any]:
    """Return a section's fields as plain values: those with a default of ours, and those that were set."""
    ours = type(section).__annotations__
    names = [*ours, *(name for name in type(section).model_fields if name not in ours and name in section.model_fields_set)]
    return {name: getattr(section, name) for name in names}
