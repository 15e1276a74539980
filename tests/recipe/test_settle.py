"""Measuring and saving agree; what the recipe leaves open follows what it says."""

from pathlib import Path

import pytest

from tnl.errors import RecipeError
from tnl.recipe.load import load

SMALL = "model:\n  path: demo\ndata:\n  train: records.json\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    path = Path("recipe.yaml")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("train", "eval_", "expected"),
    [
        ("", "0.05", ("steps", 100, "steps", 100, True)),
        ("save_steps: 30", "0.05", ("steps", 30, "steps", 30, True)),
        ("eval_steps: 20", "0.05", ("steps", 20, "steps", 20, True)),
        ("eval_strategy: epoch", "0.05", ("epoch", None, "epoch", 100, True)),
        ("save_strategy: epoch", "0.05", ("epoch", None, "epoch", 100, True)),
        ('eval_strategy: "no"', "0.05", ("no", None, "steps", 100, False)),
        ("save_strategy: no", "0.05", ("steps", 10, "no", 100, False)),
        ("save_strategy: best", "0.05", ("steps", 10, "best", 100, True)),
        ("", "0", ("no", None, "steps", 100, False)),
        ("", "null", ("no", None, "steps", 100, False)),
        ("{load_best_model_at_end: true, eval_strategy: epoch}", "0", ("no", None, "steps", 100, False)),
        ("{load_best_model_at_end: false, eval_steps: 7}", "0.05", ("steps", 7, "steps", 100, False)),
    ],
)
def test_evaluation_and_saving_agree(train: str, eval_: str, expected: tuple[object, ...]) -> None:
    body = train if train.startswith("{") else "{" + train + "}"
    section = load(write(SMALL + f"  eval: {eval_}\ntrain: {body}\n")).train
    assert (
        section.eval_strategy,
        section.eval_steps,
        section.save_strategy,
        section.save_steps,
        section.load_best_model_at_end,
    ) == expected


@pytest.mark.parametrize(
    ("train", "eval_", "reason"),
    [
        ("save_strategy: best", "0", "data.eval is 0"),
        ('load_best_model_at_end: true, eval_strategy: "no"', "0.05", "there is no best checkpoint"),
        ('load_best_model_at_end: true, save_strategy: "no"', "0.05", "there is no best checkpoint"),
        ("save_strategy: steps, eval_strategy: epoch", "0.05", "needed: the same"),
        ("save_steps: 100, eval_steps: 30", "0.05", "no multiple of train.eval_steps, 30"),
    ],
)
def test_evaluation_and_saving_that_contradict_are_refused(train: str, eval_: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:line") as caught:
        load(write(SMALL + f"  eval: {eval_}\ntrain: {{{train}}}\n"))
    assert reason in str(caught.value)


def test_a_measurement_yields_where_nothing_is_held_out() -> None:
    recipe = load(write(SMALL + "train: {eval_strategy: steps, load_best_model_at_end: true}\n"), ["data.eval=0"])
    assert recipe.notices == ["train.eval_strategy and train.load_best_model_at_end: data.eval is 0, so nothing is measured"]
    assert load(write(SMALL + "  eval: 0\n")).notices == [] and recipe.train.eval_strategy == "no"
