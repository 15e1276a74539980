"""Prefix states: what a model remembers after a prompt's beginning or a conversation, kept in host memory or in a file."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tnl import paths
from tnl.adapter.load import base_of
from tnl.errors import ModelError
from tnl.generate.slots import state_shapes
from tnl.model.state import TransnormerCache
from tnl.storage import STAGED, storage, sync

FORMAT = 1
RECENT = 64
"""Prompts that a new one is compared with, to find what they share."""
HEADER = "tnl_state"
Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class State:
    """States [1, H, K, V], one a layer, that have read exactly ids. Never changed once made: any number may go on from it."""

    ids: tuple[int, ...]
    states: tuple[Tensor, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a file says besides: messages, template, system."""
    ready: torch.cuda.Event | None = None
    """Where the states are still being copied: what has to happen before they are read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the states and ids."""
        return sum(state.numel() * state.element_size() for state in self.states) + 4 * len(self.ids)

    def cache(self, device: torch.device | str = "cpu") -> TransnormerCache:
        """A cache of its own that goes on from here: a branch."""
        cache = TransnormerCache(len(self.states))
        cache.states = [state.to(device, copy=True) for state in self.states]
        cache.seen = torch.tensor([len(self.ids)], device=device)
        cache.columns = len(self.ids)
        return cache

    @classmethod
    def of(cls, cache: TransnormerCache, ids: Sequence[int], about: Mapping[str, Any] | None = None) -> State:
        """The state of a cache of one row that has read ids. Raises ValueError where it has read another number."""
        if cache.columns != len(ids) or any(state is None for state in cache.states):
            raise ValueError(f"the cache has read {cache.columns} tokens, not {len(ids)}")
        return cls(tuple(ids), tuple(state.detach().to("cpu", copy=True) for state in cache.states if state is not None), about or {})


class Prefixes:
    """States by what made them (model, adapter, ids) under a byte budget, the least recently used out first.

    grid: where a shared beginning is cut, in tokens. A prompt read by chunks of that size gives the same bits whether its
    beginning was found here or read anew; a conversation's end lies anywhere, and going on from it equals reading all anew within rounding.
    demote: copies a state from the device to the host; then the budget bounds either place, and what is pushed out of the device
    goes to the host before it is forgotten.
    """

    def __init__(self, budget: int, grid: int, demote: Callable[[State], State] | None = None) -> None:
        self.budget, self.grid, self.demote = budget, grid, demote
        self._demoted: set[tuple[str, bytes]] = set()
        self.demoted_bytes = 0
        """Bytes of `used` that are on the host."""
        self.used = self.hits = self.misses = self.saved_tokens = 0
        self._states: OrderedDict[tuple[str, bytes], State] = OrderedDict()
        self._lengths: dict[str, dict[int, int]] = {}
        """Scope -> length -> how many states of that length."""
        self._recent: deque[tuple[str, np.ndarray]] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    def find(self, scope: str, ids: Ids) -> State | None:
        """The longest state that leaves at least one of ids to read."""
        with self._lock:
            lengths = sorted(length for length in self._lengths.get(scope, ()) if length < len(ids))
            found = None
            for key in reversed(digests(ids, lengths)):
                if found := self._states.get((scope, key)):
                    self._states.move_to_end((scope, key))
                    break
            self.hits, self.misses = self.hits + bool(found), self.misses + (not found)
            self.saved_tokens += len(found.ids) if found else 0
            return found

    def get(self, scope: str, ids: Ids) -> State | None:
        """The state of exactly these ids."""
        with self._lock:
            return self._states.get((scope, digests(ids, [len(ids)])[0]))

    def shared(self, scope: str, ids: Ids) -> int:
        """How many leading ids (a multiple of the grid, at least one id left to read) stood at the beginning of a recent prompt too.

        Remembers the prompt: so the second that begins alike makes the state, and the third finds it.
        """
        mine = np.asarray(ids, dtype=np.int32)
        with self._lock:
            longest = max((common(mine, other) for of, other in self._recent if of == scope), default=0)
            if self.budget:
                self._recent.append((scope, mine))
        return min(longest, len(ids) - 1) // self.grid * self.grid

    def put(self, scope: str, state: State) -> None:
        """Keep a state; one that is not finite, or larger than the budget, is not kept."""
        if state.num_bytes > self.budget or not state.ids or not finite(state):
            return
        key = (scope, digests(state.ids, [len(state.ids)])[0])
        with self._lock:
            if key in self._states:
                self._states.move_to_end(key)
                return
            self._states[key] = state
            self.used += state.num_bytes
            counts = self._lengths.setdefault(scope, {})
            counts[len(state.ids)] = counts.get(len(state.ids), 0) + 1
            while self.used - self.demoted_bytes > self.budget:
                oldest = next(one for one in self._states if one not in self._demoted)
                if self.demote is None:
                    self._drop(oldest)
                else:
                    self._states[oldest] = self.demote(self._states[oldest])
                    self._demoted.add(oldest)
                    self.demoted_bytes += self._states[oldest].num_bytes
            while self.demoted_bytes > self.budget:
                self._drop(next(one for one in self._states if one in self._demoted))

    def _drop(self, key: tuple[str, bytes]) -> None:
        state = self._states.pop(key)
        self.used -= state.num_bytes
        if key in self._demoted:
            self._demoted.remove(key)
            self.demoted_bytes -= state.num_bytes
        counts = self._lengths[key[0]]
        counts[len(state.ids)] -= 1
        if not counts[len(state.ids)]:
            del counts[len(state.ids)]


def finite(state: State) -> bool:
    """Whether a state holds no NaN or infinity. On a GPU that is not looked at: the engine keeps what sound logits have come from."""
    return all(one.is_cuda or bool(one.isfinite().all()) for one in state.states)


def digests(ids: Ids, lengths: Sequence[int]) -> list[bytes]:
    """SHA-256 of the first n ids for each n of lengths (ascending), in one pass."""
    total, done, found = hashlib.sha256(), 0, []
    packed = np.asarray(ids, dtype=np.int32) if lengths else np.empty(0, np.int32)
    for length in lengths:
        total.update(packed[done:length].tobytes())
        done = length
        found.append(total.copy().digest())
    return found


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many leading values are equal."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def model_key(model: nn.Module) -> str:
    """SHA-256 over samples of every weight as it is in memory, adapters and merges included, as float32: whose states are whose."""
    total = hashlib.sha256()
    for name, weight in sorted(base_of(model).named_parameters()):
        flat = weight.detach().flatten()
        if flat.numel() > 4096:
            starts = torch.linspace(0, flat.numel() - 256, 16, dtype=torch.float64).long().tolist()
            flat = torch.cat([flat[start : start + 256] for start in starts])
        total.update(f"{name}{list(weight.shape)}\0".encode())
        total.update(flat.float().cpu().numpy().tobytes())
    return total.hexdigest()


def save_state(path: Path, state: State, scope: str) -> None:
    """Write a state as one safetensors file, its settings as JSON in the header: whole or not at all. Raises StorageError.

    scope: whose state it is, as `load_state` will be asked: model_key(model), and "+" and the adapter's key where it is apart.
    """
    about = {"format": FORMAT, "scope": scope, "tokens": len(state.ids), "about": dict(state.about)}
    tensors = {f"layers.{i}": one.contiguous() for i, one in enumerate(state.states)}
    tensors["ids"] = torch.tensor(state.ids, dtype=torch.int32)
    staged = path.with_name(f"{STAGED}{path.name}")
    with storage(path, state.num_bytes):
        try:
            save_file(tensors, staged, metadata={HEADER: json.dumps(about, ensure_ascii=False, allow_nan=False)})
            sync(staged)
            staged.replace(path)
            sync(path.parent)
        finally:
            staged.unlink(missing_ok=True)


def load_state(path: Path, model: nn.Module, scope: str) -> State:
    """Read what `save_state` wrote, for a model of the same scope; nothing of it is trusted. Raises ModelError."""
    todo = "Name the file of a saved state"
    if not path.is_file():
        raise ModelError(path, *paths.missing(path)) if not path.exists() else ModelError(path, "is no file", todo)
    config = base_of(model).config
    shapes = {f"layers.{i}": (1, *shape) for i, shape in enumerate(state_shapes(config))}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get(HEADER, "null"))
            if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(about.get("about"), dict):
                raise ModelError(path, "is no saved conversation of this version", todo)
            if about.get("scope") != scope:
                what = "was saved with another model or adapter"
                raise ModelError(path, what, "Load the model and adapter that it was saved with")
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if {**shapes, "ids": found.get("ids", ())} != found or len(found["ids"]) != 1:
                raise ModelError(path, "holds other tensors than this model's states", todo)
            ids = file.get_tensor("ids")
            states = tuple(file.get_tensor(name) for name in shapes)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(path, f"cannot be read as a saved conversation ({str(error)[:100]})", todo) from None
    sound = ids.dtype == torch.int32 and bool(((ids >= 0) & (ids < config.vocab_size)).all()) and len(ids) == about.get("tokens")
    if not sound or not all(state.dtype in (torch.float32, torch.float64) and bool(state.isfinite().all()) for state in states):
        raise ModelError(path, "is damaged (ids or states are not what such a file holds)", "Copy the file anew")
    return State(tuple(ids.tolist()), states, about["about"])
