"""The recurrent state: all that a sequence leaves behind, of one size whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class TransnormerCache(Cache):
    """A transformers Cache that never grows: one state [B, H, K, V] float32 a layer, and how many tokens made it.

    It travels as an argument (`past_key_values`), never as an attribute of a module, so that any number of
    conversations can share one model.
    """

    is_compileable = False

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor | None] = [None] * layers
        self.seen: Tensor | None = None
        """[B] int64: real tokens each row has read; padding does not count."""
        self.columns = 0
        """Columns of input_ids consumed, padding included: what generate() slices by."""

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"TransnormerCache(layers={len(self)}, columns={self.columns}, bytes={self.num_bytes})"

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return sum(state.numel() * state.element_size() for state in self.states if state is not None)

    def advance(self, columns: int, tokens: Tensor) -> None:
        """Count a call's columns and each row's real tokens [B]."""
        self.columns += columns
        self.seen = tokens if self.seen is None else self.seen + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen is not None

    def clone(self) -> TransnormerCache:
        """A copy that goes its own way: a branch of the conversation."""
        copy = TransnormerCache(len(self))
        copy.states = [None if state is None else state.clone() for state in self.states]
        copy.seen = None if self.seen is None else self.seen.clone()
        copy.columns = self.columns
        return copy

    @classmethod
    def join(cls, caches: Sequence[TransnormerCache]) -> TransnormerCache:
        """One cache whose rows are those of several, each of which has read something."""
        joined = cls(len(caches[0]))
        joined.states = [torch.cat(states) for states in zip(*(cache.states for cache in caches))]
        joined.seen = torch.cat([cache.seen for cache in caches if cache.seen is not None])
        joined.columns = max(cache.columns for cache in caches)
        return joined

    def _map(self, function: Any) -> None:
        self.states = [None if state is None else function(state) for state in self.states]
        self.seen = None if self.seen is None else function(self.seen)

    def reset(self) -> None:
        self.states = [None] * len(self)
        self.seen, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a recurrent state cannot forget its last tokens: keep a clone() from before them")

    def to(self, device: torch.device | str) -> TransnormerCache:
        """This cache on another device, in place."""
        self._map(lambda x: x.to(device))
        return self
