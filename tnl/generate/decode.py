"""Ids in, ids out: read a prompt into the state by chunks, then one token at a time. Memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tnl.adapter.load import base_of
from tnl.generate.sampling import History, Settings, sample, seeded
from tnl.model.state import TransnormerCache

PREFILL = 2048
"""Tokens read at once."""


def new_cache(model: nn.Module) -> TransnormerCache:
    """An empty state for one conversation with the model."""
    return TransnormerCache(base_of(model).config.decoder_layers)


@torch.inference_mode()
def read(model: nn.Module, ids: Tensor, cache: TransnormerCache) -> Tensor:
    """Read ids [B, T] into the cache, in place; returns the logits after each row's last, [B, V] float32."""
    logits: Tensor = base_of(model)(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].float()


def prefill(model: nn.Module, ids: Sequence[int], cache: TransnormerCache, chunk: int = PREFILL) -> Tensor:
    """Read ids (at least one) into the cache, in place; returns the logits after the last, [1, V] float32.

    However the ids are cut into calls, the state is the same within rounding.
    """
    if not ids:
        raise ValueError("there is nothing to read")
    inner: Any = base_of(model)
    device = inner.model.embed_tokens.weight.device
    for start in range(0, len(ids), chunk):
        logits = read(model, torch.tensor([ids[start : start + chunk]], device=device), cache)
    return logits


def draws(
    model: nn.Module,
    logits: Tensor,  # [B, V]
    cache: TransnormerCache,
    settings: Settings,
    history: History | None,
    generators: Sequence[torch.Generator],
) -> Iterator[list[int]]:
    """The next id of every row, again and again; what was drawn is read when more is asked for."""
    while True:
        tokens = sample(logits, settings, history, generators)
        yield tokens.tolist()
        if history is not None:
            history.add(tokens)
        logits = read(model, tokens[:, None], cache)


def generate_ids(
    model: nn.Module,
    ids: Sequence[int],
    settings: Settings,
    *,
    cache: TransnormerCache | None = None,
    stop_ids: Sequence[int],
    seed: int | torch.Generator | None = None,
    before: Sequence[int] = (),
) -> Iterator[int]:
    """The answer's ids as they are drawn, the one that ends it left out; at most settings.max_new_tokens.

    ids: what the model reads first (at least one). cache: where an earlier part of the conversation left off, continued in place; it has
    read all ids and every yielded id but the last, and the last too where a stop id ended the answer. before: the ids that the cache
    has read, for repetition_penalty. seed: the same gives the same ids; a generator goes on from where it stands.
    Raises NumbersError where the logits are not finite.
    """
    cache = new_cache(model) if cache is None else cache
    generator = seed if isinstance(seed, torch.Generator) else seeded(seed)
    logits = prefill(model, ids, cache)
    history = History.start([[*before, *ids]], logits.shape[-1], logits.device) if settings.penalises else None
    for (token,) in islice(draws(model, logits, cache, settings, history, [generator]), settings.max_new_tokens):
        if token in stop_ids:
            return
        yield token


def generate_together(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    stop_ids: Sequence[int],
    seed: int | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The ids of an answer to each prompt, as generate_ids draws them with this seed, one step for all (so equal within rounding).

    ended: asked before every step; True ends all answers where they are.
    """
    if not prompts:
        return []
    caches = [new_cache(model) for _ in prompts]
    logits = torch.cat([prefill(model, ids, cache) for ids, cache in zip(prompts, caches)])
    history = History.start(prompts, logits.shape[-1], logits.device) if settings.penalises else None
    steps = draws(model, logits, TransnormerCache.join(caches), settings, history, [seeded(seed) for _ in prompts])
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for tokens in islice(steps, settings.max_new_tokens):
        going -= {row for row in going if tokens[row] in stop_ids}
        for row in going:
            answers[row].append(tokens[row])
        if not going or ended():
            break
    return answers
