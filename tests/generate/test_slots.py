from typing import Any

import pytest
import torch
from torch import Tensor

from tnl.generate.decode import new_cache, prefill
from tnl.generate.slots import Slots, head, read_chunk, state_shapes

IDS = torch.randint(3, 6000, (70,), generator=torch.Generator().manual_seed(4)).tolist()


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


def test_slots_are_zero_when_taken_and_poisoned_when_free(model: Any) -> None:
    slots = Slots(model, 8, poison=True)
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
