"""Ids in, ids out: read a prompt into the state by chunks, then one token at a time. Memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
def prefill(model: nn.Module, ids: Sequence[int], cache: TransnormerCache, chunk: int = PREFILL) -> Tensor:
    """Read ids (at least one) into the cache, in place; returns the logits after the last, [1, V] float32.

    However the ids are cut into calls, the state is the same within rounding.
    """
    if not ids:
        raise ValueError("there is nothing to read")
    inner: Any = base_of(model)
    device = inner.model.embed_tokens.weight.device
    for start in range(0, len(ids), chunk):
        part = torch.tensor([ids[start : start + chunk]], device=device)
        logits = inner(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].float()


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
    stops = set(stop_ids)
    logits = prefill(model, ids, cache)
    history = History.start([[*before, *ids]], logits.shape[-1], logits.device) if settings.penalises else None
    for count in range(1, settings.max_new_tokens + 1):
        token = sample(logits, settings, history, [generator])
        token_id = int(token)
        if token_id in stops:
            return
        yield token_id
        if count < settings.max_new_tokens:
            if history is not None:
                history.add(token)
            logits = prefill(model, [token_id], cache)
