"""Every recipe that ships: it loads, it is complete, it opens with the command that runs it."""

from pathlib import Path

import pytest

from tnl.hub import resolve
from tnl.recipe.load import dump, load
from tnl.recipe.sections import SECTIONS

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
NAMES = ["7b-24gb", "alpaca-7b", "huanhuan-385m", "huanhuan-7b", "transcript"]


def test_how_many_there_are() -> None:
    assert [path.name for path in RECIPES] == [f"{name}.yaml" for name in NAMES]


def test_the_demo_s_recipe_loads_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(FOLDER.parent / "tnl/demo/recipe.yaml")
    assert recipe.notices == [] and recipe.model.path == "demo" and (resolve("demo") / "model.safetensors").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_complete_and_without_a_notice(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(path)
    assert recipe.notices == []
    text = path.read_text(encoding="utf-8")
    assert [line.rstrip(":") for line in text.splitlines() if line and line[0].isalpha()] == list(SECTIONS)
    assert any(line.startswith(f"#   tnl train recipes/{path.name}") for line in text.splitlines()[:6])
    assert Path(recipe.train.output_dir).is_relative_to(tmp_path)
    dump(recipe, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == recipe


def test_the_tutorial_value_by_value() -> None:
    recipe = load(FOLDER / "huanhuan-7b.yaml")
    assert recipe.lora is not None
    assert {key: recipe.lora.arguments()[key] for key in ("r", "lora_alpha", "lora_dropout")} == {
        "r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
    }
    said = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "logging_steps": 10,
        "num_train_epochs": 3,
        "save_steps": 100,
        "learning_rate": 1e-4,
        "save_on_each_node": True,
        "gradient_checkpointing": False,  # the one that differs: the published code ignored it
    }
    assert {key: recipe.train.arguments()[key] for key in said} == said
    assert Path(recipe.train.output_dir) == Path.cwd() / "output/TransNormerLLM-7B-Lora"
    assert recipe.data.train == str(Path.cwd() / "dataset/huanhuan.json")
    assert (recipe.data.max_length, recipe.data.template, recipe.data.system) == (384, "chatml", "现在你要扮演皇帝身边的女人--甄嬛")
    assert (recipe.model.path, recipe.model.dtype) == ("OpenNLPLab/TransNormerLLM-7B", "bfloat16")
    assert recipe.generation.max_new_tokens == 512
    assert recipe.data.eval == 0.05


def test_alpaca_is_the_same_run_with_other_data() -> None:
    tutorial, alpaca = load(FOLDER / "huanhuan-7b.yaml").as_dict(), load(FOLDER / "alpaca-7b.yaml").as_dict()
    differs = {f"{name}.{key}" for name in SECTIONS for key in tutorial[name] if tutorial[name][key] != alpaca[name][key]}
    assert differs == {"data.train", "data.system", "train.output_dir"}
    assert alpaca["data"]["train"] == str(Path.cwd() / "dataset/alpaca_data.json")
