"""The tokens that all records of a run begin with: whether they are computed once a row, and what that spares."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tnl.data.packing import LEAST, shared_tokens
from tnl.data.store import lengths_of
from tnl.recipe.load import Recipe


class Prompt(NamedTuple):
    """What became of data.shared_prompt."""

    tokens: int = 0
    """That a row has once; 0: every record is computed whole."""
    spared: float = 0.0
    """Share of the records' tokens that is not computed."""
    line: str = ""
    """For the person; empty where there is nothing to say."""


def choose(recipe: Recipe, records: Sequence[dict[str, Any]], budget: int) -> Prompt:
    """Whether the rows of a run, of at most `budget` tokens, have once what its training records begin with.

    How many tokens that are depends on recipe and records alone, so that a run that goes on elsewhere lays out its rows as before.
    """
    data, train = recipe.data, recipe.train
    fill = data.packing == "fill"
    lengths = lengths_of(records)
    together = len(lengths) if fill else train.per_device_train_batch_size * train.gradient_accumulation_steps
    if data.shared_prompt is False or data.packing == "none" or min(together, len(lengths)) < 2:
        return Prompt()
    tokens, random = shared_tokens(records), randomness(recipe)
    if tokens < LEAST:
        few = f"data.shared_prompt: the records have {tokens} first tokens in common that none learns, too few to share (needed {LEAST})"
        return Prompt(line=few if data.shared_prompt is True else "")
    spared = share(tokens, lengths, together, (fill and data.row_tokens) or budget)
    if random and data.shared_prompt == "auto":
        advice = f"data.shared_prompt=true computes them once a row: {spared:.0%} fewer tokens, one {random} for all records of a step"
        return Prompt(line=f"all records begin with the same {tokens} tokens; {advice}")
    line = f"the {tokens} tokens that all records begin with are computed once a row: {spared:.0%} fewer tokens"
    return Prompt(tokens, spared, f"{line}, one {random} for all records of a step" if random else line)


def randomness(recipe: Recipe) -> str:
    """What of a step's computing is drawn for every token: sharing tokens then shares what is drawn."""
    if recipe.lora is not None and recipe.lora.lora_dropout:
        return "dropout"
    return "noise" if recipe.train.neftune_noise_alpha else ""


def share(tokens: int, lengths: Sequence[int], together: int, budget: int) -> float:
    """Share of all tokens that is spared where so many records of these lengths lie together in rows of `budget` tokens."""
    mean = sum(lengths) / len(lengths)
    together = min(together, len(lengths))
    rows = min(math.ceil(together * (mean - tokens) / max(budget - tokens, 1)), together)
    return tokens * (together - rows) / (together * mean)
