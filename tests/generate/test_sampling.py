import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tnl.errors import NumbersError
from tnl.generate.sampling import History, Settings, draw, finite_rows, penalise, sample, seeded, warp

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 2.0, "top_p": 0.3},
        {"top_k": 1},
        {"min_p": 0.5},
        {"top_p": 1e-9},
    ],
)
def test_warping_agrees_with_transformers(values: dict[str, float]) -> None:
    settings = Settings.of(values)
    theirs = LogitsProcessorList()
    theirs.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        theirs.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        theirs.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        theirs.append(MinPLogitsWarper(settings.min_p))
    torch.testing.assert_close(warp(LOGITS, settings), theirs(torch.zeros(4, 1, dtype=torch.long), LOGITS))


def test_the_repetition_penalty_agrees_with_transformers() -> None:
    prompts = [[1, 2, 3], [4, 4, 4], [0, 49, 7], [9, 8, 9]]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(prompts), LOGITS.clone())
    torch.testing.assert_close(penalise(LOGITS, Settings(repetition_penalty=1.3), History.start(prompts, 50, "cpu")), expected)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    history = History.start([[5], [5], [5], [5]], 50, "cpu")
    history.add(torch.tensor([7, 7, 8, 9]))
    history.add(torch.tensor([7, 8, 8, 9]))
    found = LOGITS - penalise(LOGITS, Settings(presence_penalty=0.5, frequency_penalty=0.25), history)
    assert found[0, 7].item() == pytest.approx(1.0) and found[1, 7].item() == pytest.approx(0.75)
    assert found[0].count_nonzero() == 1 and found[1].count_nonzero() == 2


def test_drawing_follows_the_probabilities() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    generator = seeded(3)
    drawn = torch.cat([draw(probabilities, [generator]) for _ in range(4000)]).bincount(minlength=6) / 4000
    torch.testing.assert_close(drawn, probabilities[0], atol=0.03, rtol=0)
    assert drawn[[0, 2, 5]].sum() == 0


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    settings = Settings(temperature=1.5)
    together = sample(LOGITS, settings, None, [seeded(i) for i in range(4)])
    alone = [sample(LOGITS[i : i + 1], settings, None, [seeded(i)]) for i in range(4)]
    assert together.tolist() == [int(one) for one in alone]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    def draws(seed: int | None) -> list[int]:
        generator = seeded(seed)
        return [int(draw(torch.full((1, 1000), 1e-3), [generator])) for _ in range(8)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("settings", [Settings(do_sample=False), Settings(temperature=0)])
def test_greedy_takes_the_largest(settings: Settings) -> None:
    assert sample(LOGITS, settings, None, []).tolist() == LOGITS.argmax(-1).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", [Settings(), Settings(do_sample=False)])
def test_a_row_that_is_not_finite_is_named(value: float, settings: Settings) -> None:
    logits = LOGITS.clone()
    logits[2, 3] = value
    assert finite_rows(logits).tolist() == [True, True, False, True]
    with pytest.raises(NumbersError, match=r"rows \[2\]") as found:
        sample(logits, settings, None, [seeded(0)] * 4)
    assert found.value.exit_code == 5


def test_settings_from_other_configs() -> None:
    settings = Settings.of({"max_new_tokens": 9, "temperature": None, "eos_token_id": 2, "top_k": 5})
    assert settings == Settings(max_new_tokens=9, top_k=5)
    assert settings.changed(temperature=0.0, top_p=None).greedy
    assert not settings.changed(temperature=0.0).changed(temperature=0.5).greedy
