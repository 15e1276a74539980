"""Drawing on the device against `generate.sampling`, from the same uniform numbers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.generate.sampling import History, Settings, penalise, sample, warp
from tnl.kernels.draw import COLUMNS, NOT_FINITE, PROMPT, draw_

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SETTINGS = [
    Settings(do_sample=False),
    Settings(),
    Settings(temperature=0.5),
    Settings(temperature=1.7, top_k=5),
    Settings(top_p=0.9),
    Settings(temperature=0.8, top_k=40, top_p=0.7),
    Settings(min_p=0.05),
    Settings(top_p=0.5, min_p=0.3),
    Settings(top_k=1),
    Settings(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    Settings(do_sample=False, repetition_penalty=1.8),
    Settings(temperature=2.0, top_p=0.95, top_k=100, min_p=0.01, frequency_penalty=0.4),
]


def table(settings: list[Settings], uniform: Tensor) -> Tensor:
    """The control table, every slot live."""
    rows = torch.zeros(len(settings), COLUMNS)
    for row, one in zip(rows, settings):
        warmth = 0.0 if one.greedy else one.temperature
        values = [1, 0, warmth, one.top_k, one.top_p, one.min_p, one.repetition_penalty, one.presence_penalty, one.frequency_penalty]
        row[:9] = torch.tensor(values)
    rows[:, 9] = uniform
    return rows.to(DEVICE)


def test_draws_are_those_of_sampling() -> None:
    V, turns = 4999, 2
    torch.manual_seed(0)
    B = len(SETTINGS)
    logits = torch.randn(turns, B, V) * 3
    prompts = [[3, 4, 5, int(logits[0, i].argmax())] for i in range(B)]
    history = torch.zeros(B, V, dtype=torch.int32)
    for row, prompt in zip(history, prompts):
        row[torch.tensor(prompt)] = PROMPT
    history = history.to(DEVICE)
    ids, seen = torch.zeros(B, dtype=torch.long, device=DEVICE), torch.zeros(B, dtype=torch.long, device=DEVICE)
    generators = [torch.Generator().manual_seed(i) for i in range(B)]
    uniform = torch.stack([torch.rand(turns, generator=one, dtype=torch.float64) for one in generators], 1).float()  # [turns, B]
    past = [History.start([prompt], V, "cpu") for prompt in prompts]
    again = [torch.Generator().manual_seed(i) for i in range(B)]
    for turn in range(turns):
        control = table(SETTINGS, uniform[turn])
        found = draw_(logits[turn].to(DEVICE), control, ids, seen, history=history, advance=True)
        for i, settings in enumerate(SETTINGS):
            expected = sample(logits[turn, i : i + 1], settings, past[i], [again[i]])
            past[i].add(expected)
            if int(found[i]) != int(expected):  # the last bits of a sum may put the point into the neighbour
                left = warp(penalise(logits[turn, i : i + 1], settings, past[i]), settings)[0]
                assert left.isfinite()[int(found[i])], (turn, settings)
        agree = sum(int(found[i]) == int(ids[i]) for i in range(B))
        assert agree == B and seen.tolist() == [turn + 1] * B
    counts = history.cpu() & (PROMPT - 1)
    assert torch.equal(counts, torch.cat([one.counts for one in past]))  # every draw was the same after all


def test_first_tokens_of_one_prompt_go_to_their_slots() -> None:
    V = 200
    control = table([Settings()] * 6, torch.tensor([0.1, 0.5, 0.9, 0.2, 0.3, 0.999999]))
    ids, seen = torch.full((6,), 7, device=DEVICE), torch.full((6,), 3, device=DEVICE)
    logits = torch.randn(1, V, device=DEVICE)
    slots = torch.tensor([5, 0, 2], device=DEVICE)
    found = draw_(logits.expand(3, V), control, ids, seen, slots=slots)
    cumulative = logits[0].double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, control[slots, 9].double(), right=True)
    assert torch.equal(found.long(), expected) and torch.equal(ids[slots], expected)
    assert ids[[1, 3, 4]].tolist() == [7] * 3 and seen.tolist() == [3] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_says_so_alone(bad: float) -> None:
    logits = torch.randn(3, 300, device=DEVICE)
    control = table([Settings(top_k=3), Settings(top_p=0.4), Settings(do_sample=False)], torch.rand(3))
    ids, seen = torch.zeros(3, dtype=torch.long, device=DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE)
    alone = draw_(logits, control, ids, seen)
    logits[1, 290] = bad
    found = draw_(logits, control, ids, seen)
    assert found.tolist() == [int(alone[0]), NOT_FINITE, int(alone[2])] and 0 <= int(ids[1]) < 300


def test_a_slot_that_is_not_live_is_left_alone() -> None:
    control = table([Settings()] * 2, torch.rand(2))
    control[0, 0] = 0
    ids, seen = torch.full((2,), 9, device=DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE)
    history = torch.zeros(2, 50, dtype=torch.int32, device=DEVICE)
    draw_(torch.full((2, 50), torch.nan, device=DEVICE), control, ids, seen, history=history, advance=True)
    assert ids[0] == 9 and seen.tolist() == [0, 1] and not history[0].any()


def test_bad_input_is_refused() -> None:
    control, ids = torch.zeros(2, COLUMNS, device=DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="logits are"):
        draw_(torch.zeros(2, 9, dtype=torch.float64, device=DEVICE), control, ids, ids)
    with pytest.raises(ValueError, match="int64"):
        draw_(torch.zeros(2, 9, device=DEVICE), control, ids.int(), ids)
