"""Static slots of constant-size states: one row a running answer, stepped together at few fixed shapes, zeroed before they are reused."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnl.kernels.deferred import EVERY, Deferred, fold_
from tnl.kernels.dispatch import Ops
from tnl.kernels.reference import Rows
from tnl.model.layer import LayerWeights, decoder_layer

Wrap = Callable[[LayerWeights, int], LayerWeights]
"""A layer's weights and its number -> the weights with the adapters of this call's rows on them."""


def state_shapes(config: Any) -> list[tuple[int, int, int]]:
    """[H, K, V] of each layer's state; a layer with LRPE has twice the key dims."""
    H = config.decoder_attention_heads
    V = config.hidden_dim // H
    lrpe = config.linear_use_lrpe_list or [0] * config.decoder_layers
    return [(H, 2 * V if lrpe[layer] else V, V) for layer in range(config.decoder_layers)]


def forward(
    model: Any,  # TransnormerForCausalLM
    ids: Tensor,  # [B, T]
    states: Sequence[Tensor | Deferred | None],  # one [B, H, K, V] a layer
    rows: Rows,
    wrap: Wrap | None = None,
    ops: Ops | None = None,
) -> tuple[Tensor, list[Any]]:
    """All layers in the form `ops` (None: the model's); hidden [B, T, D] before the final norm, and the new states.

    Reads nothing back to the host.
    """
    inner = model.model
    x = inner.embed_tokens(ids) * inner.scale
    after = []
    for layer, state in enumerate(states):
        weights = inner.layers[layer].weights()
        x, state = decoder_layer(x, state, weights if wrap is None else wrap(weights, layer), rows, ops or inner.ops)
        after.append(state)
    return x, after


def head(model: Any, hidden: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """[..., D] to logits [..., vocabulary] in float32; project: the head with adapters on it."""
    return (project or model.lm_head)(model.model.final_norm(hidden)).float()


def copy_states(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy states into others of their shapes; on one device in a few launches."""
    torch._foreach_copy_(list(targets), list(sources), non_blocking=True)


class Slots:
    """The states of all running answers: per layer [slots, H, K, V], addresses fixed for good, so that a step can be a CUDA graph.

    Row i of a step is slot i. `buckets` are the shapes that steps have; the lowest free slots are taken first, so few running
    answers mean a small shape. A CPU has one bucket of a multiple of 8: there the bits of a row depend on the shape, never (at
    multiples of 8) on its neighbours or its place, so that an answer is the same alone and in a full batch.
    deferred: a state is written every 24th token alone (`kernels.deferred`), counted from where its prompt ended, so that what an
    answer is told does not depend on its slot and those that came at different steps write at different steps. A bfloat16 model
    reads a bfloat16 copy of it. Then `states` are what they were some tokens ago, until `settle`.
    """

    def __init__(self, model: Any, count: int, *, deferred: bool = False) -> None:
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.count = -(-count // 8) * 8 if self.device.type == "cpu" else count
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.states = [torch.zeros(self.count, *shape, dtype=dtype, device=self.device) for shape in state_shapes(model.config)]
        self.deferred = [waiting_room(state, weight.dtype) for state in self.states] if deferred else []
        """One a layer, where states are written every 24th token."""
        self.decays = [layer.weights().mixer.log_decay for layer in model.model.layers]
        self.ids = torch.zeros(self.count, 1, dtype=torch.long, device=self.device)
        """[slots, 1]: the token that each row reads next."""
        self.seen = torch.zeros(self.count, dtype=torch.long, device=self.device)
        """[slots]: tokens that each row has read."""
        self.start = torch.zeros_like(self.seen)
        """[slots]: how many of them its state had read when it was put there: from there on every 24th writes."""
        powers = [1 << i for i in range(self.count.bit_length()) if 1 << i < self.count]
        self.buckets = [self.count] if self.device.type == "cpu" else [*powers, self.count]
        self._free = list(range(self.count))
        self._poison = False
        self._used: set[int] = set()

    def poison(self) -> None:
        """Fill states with NaN whenever they are free; for tests, before the first is taken."""
        self._poison = True
        self._fill(slice(None), torch.nan)

    def __len__(self) -> int:
        return self.count

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states, and of what waits beside them."""
        return sum({x.data_ptr(): x.nbytes for layer in self._memory() for x in layer}.values())

    def take(self) -> int:
        """The lowest free slot, its state zero. Raises IndexError where none is free."""
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        self._fill(slot, 0.0)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. Raises ValueError where it is free already."""
        if slot not in self._used:
            raise ValueError(f"slot {slot} is free already")
        self._used.remove(slot)
        heapq.heappush(self._free, slot)
        if self._poison:
            self._fill(slot, torch.nan)

    def put(self, slot: int, states: Sequence[Tensor | None], seen: int) -> None:
        """Copy states [1, H, K, V] that have read `seen` tokens into a slot."""
        pairs = [(target[slot], state[0]) for target, state in zip(self.states, states) if state is not None]
        if pairs and pairs[0][0].data_ptr() != pairs[0][1].data_ptr():
            copy_states(*zip(*pairs))
        if copies := self._copies():
            copy_states([copy[slot] for copy in copies], [state[slot] for state in self.states])
        self.seen[slot] = self.start[slot] = seen

    def settle(self, which: Tensor, fold: Callable[[Deferred, Tensor, Tensor], None] = fold_) -> None:
        """Write what waits into the states of the slots `which` [n]: they have read all that the slot has. Nothing is read back."""
        if self.deferred:
            for state, log_decay in zip(self.rows(self.count), self.decays):
                fold(state, log_decay, which)
            self.start.index_copy_(0, which, self.seen.index_select(0, which))

    def rows(self, size: int) -> list[Any]:
        """What a step of the first `size` rows reads and writes, a Tensor or a Deferred a layer."""
        if not self.deferred:
            return [state[:size] for state in self.states]
        waiting = (self.seen[:size] - self.start[:size]) % EVERY
        return [Deferred(*(x[:size] for x in layer))._replace(waiting=waiting) for layer in self.deferred]

    def get(self, slot: int) -> list[Tensor]:
        """Copies of a slot's states, [1, H, K, V] a layer."""
        copies = [torch.empty_like(state) for state in self.views(slot)]
        copy_states(copies, self.views(slot))
        return copies

    def views(self, slot: int) -> list[Tensor]:
        """A slot's states where they lie, [1, H, K, V] a layer."""
        return [state[slot : slot + 1] for state in self.states]

    def bucket(self) -> int:
        """Rows of the next step: the smallest shape that holds every taken slot."""
        highest = max(self._used, default=-1) + 1
        return next(size for size in self.buckets if size >= highest)

    def step(self, model: Any, size: int, wrap: Wrap | None = None, project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Read one token in each of the first `size` rows; returns logits [size, vocabulary] float32. Rows that nobody has do no harm."""
        hidden, after = forward(model, self.ids[:size], self.rows(size), Rows(self.seen[:size, None]), wrap)
        for state, new in zip(self.states, after):
            if isinstance(new, Tensor):
                state[:size].copy_(new)
        self.seen[:size] += 1
        return head(model, hidden[:, 0], project)

    def _memory(self) -> list[list[Tensor]]:
        """Per layer all that has a row for each slot."""
        return [list(layer[:4]) for layer in self.deferred] or [[state] for state in self.states]

    def _copies(self) -> list[Tensor]:
        """What steps read in the states' stead."""
        return [layer.copy for layer in self.deferred if layer.copy is not layer.state]

    def _fill(self, slot: int | slice, value: float) -> None:
        if value == 0:
            torch._foreach_zero_([x[slot] for x in (*self.states, *self._copies())])
        else:
            for layer in self._memory():
                for x in layer:
                    x[slot] = value
        for number in (self.ids, self.seen, self.start):
            number[slot] = 0


def waiting_room(state: Tensor, dtype: torch.dtype) -> Deferred:
    """Room beside states [slots, H, K, V] for what waits to be written there by a model of `dtype`."""
    N, H, K, V = state.shape
    copy = state.to(dtype) if dtype == torch.bfloat16 else state
    k, v = (torch.zeros(N, H, EVERY - 1, dim, dtype=dtype, device=state.device) for dim in (K, V))
    return Deferred(state, copy, k, v, torch.zeros(N, dtype=torch.long, device=state.device))


def read_chunk(
    model: Any,
    ids: Sequence[int],  # at most `size`
    states: Sequence[Tensor | None],  # one [1, H, K, V] a layer
    seen: int,
    size: int,
    wrap: Wrap | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Read ids on top of the states at the one shape [1, size]; returns the last id's hidden [1, D] and the new states."""
    device = model.model.embed_tokens.weight.device
    n = len(ids)
    padded = torch.zeros(1, size, dtype=torch.long)
    padded[0, :n] = torch.tensor(ids)
    positions = torch.arange(seen, seen + size, device=device)[None]
    real = lengths = None
    if n < size:
        real, lengths = (torch.arange(size, device=device) < n)[None], torch.tensor([n], device=device)
    hidden, after = forward(model, padded.to(device), states, Rows(positions, None, real, lengths), wrap)
    return hidden[:, n - 1], after
