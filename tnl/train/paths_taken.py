"""Which form each part of a step takes on this machine, said once a run and kept in its metadata: nothing falls back in silence."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from tnl.evaluate.perplexity import causal_lm
from tnl.kernels.lora import hindrance
from tnl.recipe.sections import TrainSection
from tnl.train.engines import Engine
from tnl.train.graphed import why_not
from tnl.train.order import UNITS
from tnl.train.recomputation import WORDS, level_of
from tnl.train.step import Rows, plain_head

FUSED = "fused"


def paths_taken(model: nn.Module, rows: Rows, eager: str) -> dict[str, str]:
    """Part -> form: attention, lora, loss, rows, recomputed, step.

    eager: why the step is not recorded in CUDA graphs (`why_eager`), or empty.
    """
    base: Any = causal_lm(model)
    packed = f"packed, the first {rows.shared} tokens of their records once" if rows.shared else "packed"
    return {
        "attention": "Triton" if base.backend == "triton" else "plain PyTorch",
        "lora": lora_form(model),
        "loss": f"in chunks of {rows.chunk}" if plain_head(base.get_output_embeddings(), rows) else "by the head's own forward",
        "rows": packed if rows.padded is None else f"padded, {rows.padded} records at once",
        "recomputed": WORDS[level_of(model)],
        "step": f"eager, since {eager}" if eager else "in CUDA graphs",
    }


def why_eager(model: nn.Module, rows: Rows, engine: Engine, wanted: bool) -> str:
    """What keeps a run's steps from being CUDA graphs, or an empty string."""
    if not wanted:
        return "train.cuda_graphs is false"
    if engine.crew.size > 1:
        return "several processes train"
    if rows.padded is not None:
        return "records are padded"
    if why := why_not(model):
        return why
    plain = plain_head(causal_lm(model).get_output_embeddings(), rows)
    return "" if plain and lora_form(model) == FUSED else "a part falls to a form of its own"


def rows_of_a_step(section: TrainSection, packing: str, size: int, rows: Rows) -> str:
    """How a step's batches become rows. size: what batches count (order.UNITS) of a step."""
    batches = f"{section.per_device_train_batch_size} x {section.gradient_accumulation_steps}"
    step = f"{size} {UNITS[packing]} a step (batch x accumulation: {batches})"
    if rows.padded is not None:
        return f"{step}, padded, {rows.padded} at once"
    filled = "" if rows.multiple == 1 else f", filled up to multiples of {rows.multiple}"
    longer = "" if rows.segment_length is None else f"; longer ones in segments of {rows.segment_length:,}"
    return f"{step}, end to end in rows of at most {rows.budget:,} tokens{filled}{longer}"


def lora_form(model: nn.Module) -> str:
    """How the adapters are computed, and what keeps some of them from being fused."""
    hindrances = [hindrance(module) for module in adapters(model)]
    outside = Counter(why for why in hindrances if why)
    if causal_lm(model).backend != "triton" or not hindrances:
        return "plain PyTorch" if hindrances else "none"
    if not outside:
        return FUSED
    why, count = outside.most_common(1)[0]
    return f"by PEFT's own forward in {count} of {len(hindrances)} modules, because of {why}"


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that an adapter wraps inside layers."""
    layers: Any = causal_lm(model).model.layers
    return (module for module in layers.modules() if hasattr(module, "base_layer") and hasattr(module, "lora_A"))


def words(paths: dict[str, str]) -> str:
    """One line."""
    return "computed: " + "; ".join(f"{part.replace('lora', 'LoRA')} {form}" for part, form in paths.items())
