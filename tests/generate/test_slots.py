from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tnl.generate.decode import new_cache, prefill
from tnl.generate.slots import Slots, head, read_chunk, state_shapes
from tnl.kernels.deferred import EVERY
from tnl.model.load import load_model

IDS = torch.randint(3, 6000, (70,), generator=torch.Generator().manual_seed(4)).tolist()


def poisoned(*arguments: Any, **options: Any) -> Slots:
    """Slots whose freed states are NaN."""
    slots = Slots(*arguments, **options)
    slots.poison()
    return slots


def read(model: Any, ids: list[int], size: int = 32) -> tuple[Tensor, list[Tensor]]:
    hidden, states = torch.empty(0), [None] * len(state_shapes(model.config))
    for start in range(0, len(ids), size):
        hidden, states = read_chunk(model, ids[start : start + size], states, start, size)  # type: ignore[arg-type,assignment]
    return hidden, states  # type: ignore[return-value]


@torch.inference_mode()
@pytest.mark.parametrize("n", [1, 31, 32, 33, 70])
def test_chunks_of_one_shape_give_what_prefill_gives(model: Any, n: int) -> None:
    cache = new_cache(model)
    expected = prefill(model, IDS[:n], cache)
    hidden, states = read(model, IDS[:n])
    torch.testing.assert_close(head(model, hidden), expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(states, cache.states):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_every_place_beside_anything(model: Any) -> None:
    _, states = read(model, IDS)
    found: list[tuple[Tensor, ...]] = []
    for slot in range(8):
        slots = Slots(model, 8)
        for _ in range(8):
            slots.take()
        for i, state in enumerate(slots.states):
            state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(slot + 10 * i)) * (torch.nan if slot % 2 else 1))
        slots.ids.random_(3, 6000)
        slots.put(slot, states, len(IDS))
        steps = []
        for token in (77, 78, 79):
            slots.ids[slot] = token
            steps.append(slots.step(model, 8)[slot])
        found.append((*steps, *(state[0] for state in slots.get(slot))))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other))


@torch.inference_mode()
def test_steps_equal_reading_at_once(model: Any) -> None:
    slots = Slots(model, 8)
    slot = slots.take()
    for token in IDS[:10]:
        slots.ids[slot] = token
        logits = slots.step(model, slots.bucket())
    torch.testing.assert_close(logits[slot, None], prefill(model, IDS[:10], new_cache(model)), atol=1e-4, rtol=1e-4)
    assert int(slots.seen[slot]) == 10


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_that_are_written_every_24th_token_are_the_same(base: Path, dtype: str) -> None:
    """Two slots that came at different steps, settled in the middle; poison where nothing has been written is never seen."""
    model = load_model(base, device="cpu", dtype=dtype)
    plain, slots = Slots(model, 8), poisoned(model, 8, deferred=True)
    bound = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    _, states = read(model, IDS)
    for one in (plain, slots):
        one.take()
        one.put(0, states, len(IDS))
    for step in range(60):
        if step == 7:
            for one in (plain, slots):
                one.take()
                one.put(1, states, len(IDS))
        for one in (plain, slots):
            one.ids[:2, 0] = torch.tensor([77 + step, 99 + step])
        expected, found = plain.step(model, 8)[: 1 + (step >= 7)], slots.step(model, 8)[: 1 + (step >= 7)]
        assert (found - expected).norm() < bound * expected.norm(), step
        if step == 40:
            slots.settle(torch.tensor([0]))
        waiting = slots.rows(8)[0].waiting.tolist()
        assert waiting[0] == ((step + 1) % EVERY if step < 40 else step - 40)
        if step >= 7:
            assert waiting[1] == (step - 6) % EVERY
    slots.settle(torch.tensor([0, 1]))
    for mine, theirs in zip(slots.states, plain.states):
        assert (mine[:2] - theirs[:2]).norm() < bound * theirs[:2].norm()
    assert all(layer.copy.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32) for layer in slots.deferred)


def test_a_deferred_slot_is_zero_when_taken_and_poisoned_when_free(model: Any) -> None:
    slots = poisoned(model, 8, deferred=True)
    assert all(bool(x.isnan().all()) for layer in slots.deferred for x in layer[:4])
    slot = slots.take()
    assert not any(bool(x[slot].any()) for layer in slots.deferred for x in (layer.state, layer.copy))
    assert all(bool(x[slot].isnan().all()) for layer in slots.deferred for x in (layer.k, layer.v))
    assert int(slots.start[slot]) == int(slots.seen[slot]) == 0
    slots.release(slot)
    assert all(bool(x.isnan().all()) for layer in slots.deferred for x in layer[:4])
    assert slots.num_bytes > Slots(model, 8).num_bytes


def test_slots_are_zero_when_taken_and_poisoned_when_free(model: Any) -> None:
    slots = poisoned(model, 8)
    assert all(bool(state.isnan().all()) for state in slots.states)
    first, second = slots.take(), slots.take()
    assert (first, second, slots.free) == (0, 1, 6)
    assert not any(bool(state[:2].any()) for state in slots.states)
    slots.release(first)
    assert all(bool(state[0].isnan().all()) for state in slots.states)
    assert slots.take() == 0 and not any(bool(state[0].any()) for state in slots.states)
    slots.release(second)
    with pytest.raises(ValueError, match="free already"):
        slots.release(second)


def test_a_cpu_steps_at_one_shape_of_eights(model: Any) -> None:
    slots = Slots(model, 5)
    assert len(slots) == 8 and slots.buckets == [8] and slots.bucket() == 8
    config = model.config
    width = config.hidden_dim // config.decoder_attention_heads
    assert [tuple(state.shape) for state in slots.states] == [(8, 2, 2 * width, width), (8, 2, width, width)]
    assert slots.num_bytes == sum(state.numel() * 4 for state in slots.states)


def test_no_slot_is_left(model: Any) -> None:
    slots = Slots(model, 8)
    for _ in range(8):
        slots.take()
    with pytest.raises(IndexError):
        slots.take()
