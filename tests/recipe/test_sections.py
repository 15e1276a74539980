"""Sections: every key explains itself, its words are those of the rooms, and docs/recipe.md is what they say."""

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest

from tnl.recipe.sections import COLUMNS, SECTIONS, DataSection, ModelSection, TrainSection

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_ours_says_what_it_is(name: str) -> None:
    section = SECTIONS[name]
    for key in section.__annotations__:
        text = section.model_fields[key].description
        assert text and text.endswith(".") and "\n" not in text, key


def choices(section: Any, key: str) -> set[str]:
    return set(get_args(section.model_fields[key].annotation))


def test_templates_are_those_of_data() -> None:
    from tnl.data.template import TEMPLATES

    assert choices(DataSection, "template") == set(TEMPLATES)


def test_columns_are_those_of_the_formats() -> None:
    from tnl.data import formats

    assert set(COLUMNS) == {name for names in formats.COLUMNS.values() for name in names}


def test_backends_are_those_of_kernels() -> None:
    from tnl.kernels.dispatch import BACKENDS

    assert choices(ModelSection, "backend") == set(BACKENDS)


def test_every_key_of_generation_acts() -> None:
    from dataclasses import fields

    from tnl.generate.sampling import Settings
    from tnl.recipe.sections import GenerationSection

    assert set(GenerationSection.model_fields) <= {field.name for field in fields(Settings)}


def test_what_is_handed_on_is_ours_and_what_was_set() -> None:
    plain, more = TrainSection().arguments(), TrainSection(neftune_noise_alpha=5, bf16=True).arguments()
    assert list(plain) == list(TrainSection.__annotations__)
    assert more == {**plain, "neftune_noise_alpha": 5, "bf16": True}


def test_the_reference_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts/generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.generate() == (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
