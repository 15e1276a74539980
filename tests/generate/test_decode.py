from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tnl.errors import NumbersError
from tnl.generate.decode import generate_ids, generate_together, new_cache, prefill
from tnl.generate.sampling import Settings
from tnl.model.load import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
GREEDY = Settings(do_sample=False, max_new_tokens=24)


@pytest.mark.parametrize("name", ["base", "bias-elu", "long"])
def test_greedy_equals_generate(name: str) -> None:
    model = load_model(GOLDEN / name, device="cpu")
    for row in load_file(GOLDEN / name / "expected.safetensors")["input_ids"][:2]:
        theirs = model.generate(row[None], do_sample=False, max_new_tokens=24, repetition_penalty=1.0, eos_token_id=None)[0, len(row) :]
        assert list(generate_ids(model, row.tolist(), GREEDY, stop_ids=())) == theirs.tolist()


def test_the_repetition_penalty_equals_generate(model: Any) -> None:
    ids = [5, 9, 700, 9, 31]
    settings = Settings(do_sample=False, max_new_tokens=12, repetition_penalty=1.5)
    theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, repetition_penalty=1.5, eos_token_id=None)[0, 5:]
    assert list(generate_ids(model, ids, settings, stop_ids=())) == theirs.tolist()


@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
def test_prefill_does_not_depend_on_the_chunks(model: Any, chunk: int) -> None:
    ids = torch.randint(3, 6000, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    whole, parts = new_cache(model), new_cache(model)
    expected = prefill(model, ids, whole)
    torch.testing.assert_close(prefill(model, ids, parts, chunk), expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(parts.states, whole.states):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert parts.columns == whole.columns == 150


def test_continuing_equals_reading_all_again(model: Any) -> None:
    settings = Settings(do_sample=False, max_new_tokens=6, repetition_penalty=1.2)
    first, second = [11, 12, 13, 400], [21, 22, 5000]
    cache = new_cache(model)
    answer = list(generate_ids(model, first, settings, cache=cache, stop_ids=()))
    assert cache.columns == len(first) + len(answer) - 1
    said = [*first, *answer]
    rest = [answer[-1], *second]
    continued = list(generate_ids(model, rest, settings, cache=cache, stop_ids=(), before=said[:-1]))
    assert continued == list(generate_ids(model, [*said, *second], settings, stop_ids=()))


def test_a_stop_id_ends_the_answer_and_is_left_out(model: Any) -> None:
    free = list(generate_ids(model, [8, 9], GREEDY, stop_ids=()))
    stop = free[5]
    cache = new_cache(model)
    assert list(generate_ids(model, [8, 9], GREEDY, cache=cache, stop_ids=[stop])) == free[: free.index(stop)]
    assert cache.columns == 2 + free.index(stop)


def test_the_same_seed_gives_the_same_ids(model: Any) -> None:
    settings = Settings(max_new_tokens=10, temperature=1.5)

    def answer(seed: int) -> list[int]:
        return list(generate_ids(model, [3, 4], settings, stop_ids=(), seed=seed))

    assert answer(1) == answer(1) != answer(2)


def test_two_answers_at_a_time_do_not_disturb_each_other(model: Any) -> None:
    expected = [list(generate_ids(model, [i, 9], GREEDY, stop_ids=())) for i in (50, 60)]
    assert [list(pair) for pair in zip(*zip(*(generate_ids(model, [i, 9], GREEDY, stop_ids=()) for i in (50, 60))))] == expected


@pytest.mark.parametrize(
    "settings", [GREEDY, Settings(max_new_tokens=24, temperature=1.5, repetition_penalty=1.3)], ids=["greedy", "drawn"]
)
def test_answers_drawn_together_are_those_drawn_alone(model: Any, settings: Settings) -> None:
    """Of prompts of any lengths; each ends by itself."""
    prompts = [[50, 9], list(range(100, 170)), [7], [50, 9, 11]]
    free = list(generate_ids(model, prompts[0], settings, stop_ids=(), seed=3))
    stops = [free[4], free[20]]
    alone = [list(generate_ids(model, ids, settings, stop_ids=stops, seed=3)) for ids in prompts]
    assert generate_together(model, prompts, settings, stop_ids=stops, seed=3) == alone
    assert len({len(ids) for ids in alone}) > 1 and generate_together(model, [], settings, stop_ids=stops) == []


def test_answers_drawn_together_end_when_they_are_to(model: Any) -> None:
    asked = iter([False, False, True])
    answers = generate_together(model, [[50, 9], [60, 9]], GREEDY, stop_ids=(), ended=lambda: next(asked))
    assert [len(ids) for ids in answers] == [3, 3]


def test_numbers_that_are_not_finite_end_it(base: Path) -> None:
    broken = load_model(base, device="cpu")
    with torch.no_grad():
        broken.model.layers[0].channel_mixer.l3.weight[0, 0] = torch.nan
    with pytest.raises(NumbersError, match="not finite"):
        list(generate_ids(broken, [5], GREEDY, stop_ids=()))


def test_nothing_to_read_is_a_mistake(model: Any) -> None:
    with pytest.raises(ValueError, match="nothing to read"):
        list(generate_ids(model, [], GREEDY, stop_ids=()))
