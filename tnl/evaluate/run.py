"""`tnl evaluate`: the loss of a recipe's base model, or of a run's result, on the held-out records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tnl import hub, paths
from tnl.adapter.load import base_folder, load_adapter
from tnl.data.build import build
from tnl.errors import DataError, ModelError
from tnl.evaluate import perplexity
from tnl.model.load import load_model, load_tokenizer, pick_device
from tnl.recipe.load import Recipe, load
from tnl.run_dir import RunDir

console = Console(highlight=False, soft_wrap=True)


def run(recipe_or_run: Path, overrides: Sequence[str] = ()) -> dict[str, perplexity.Perplexity]:
    """Print and return loss and perplexity on the held-out records: of the base, and, for a run, of what it made of it.

    recipe_or_run: a recipe (its base model) or a run's folder (base and adapter). Raises DataError where nothing is held out.
    """
    if paths.is_recipe(recipe_or_run):
        measured = {"base": measure_base(load(recipe_or_run, overrides))}
    else:
        work = RunDir(paths.existing(recipe_or_run, ModelError))
        measured = measure_run(of_run(work, overrides), work)
    for name, result in measured.items():
        counted = f"{result.tokens:,} tokens of {result.records:,} held-out records"
        console.print(f"{name}: loss {result.loss:.4f}, perplexity {result.value:.2f} ({counted})", markup=False)
        for bucket in result.by_position:
            words = f"  tokens {bucket.start:,} to {bucket.stop - 1:,} of their records: perplexity {bucket.value:.2f} ({bucket.tokens:,})"
            console.print(words, markup=False)
    return measured


def of_run(work: RunDir, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run. Raises ModelError where the folder is none."""
    if not work.recipe.is_file():
        raise ModelError(work.path, "is not the folder of a run (recipe.yaml is missing)", "Name a recipe, or a run's folder.")
    return load(work.recipe, overrides)


def held_out(recipe: Recipe, folder: Path) -> list[dict[str, object]]:
    """The records that are measured, the same that training holds out."""
    data = build(recipe.data, load_tokenizer(folder), seed=recipe.train.seed)  # type: ignore[arg-type]
    if not data.eval:
        raise DataError(f"{recipe.path}:data.eval", "no record is held out", "Set data.eval to a share or a file.")
    return data.eval


def measure_base(recipe: Recipe) -> perplexity.Perplexity:
    """Loss of the model that a recipe starts from."""
    folder = hub.resolve(recipe.model.path, recipe.model.hub, recipe.model.revision)
    records = held_out(recipe, folder)
    return perplexity.loss(loaded(recipe, folder), records)


def measure_run(recipe: Recipe, work: RunDir) -> dict[str, perplexity.Perplexity]:
    """Loss of a run's base, and with its adapter on; of a run without LoRA, of the model it saved."""
    whole = work.path / "model"
    if (whole / "config.json").is_file():
        records = held_out(recipe, whole)
        return {"base": measure_base(recipe), "trained": perplexity.loss(loaded(recipe, whole), records)}
    if not work.adapter.is_dir():
        raise ModelError(work.path, "has no adapter yet", f"Finish the run first: tnl resume {paths.quoted(work.path)}")
    folder = base_folder(work.adapter)
    records = held_out(recipe, folder)
    model = loaded(recipe, folder)
    before = perplexity.loss(model, records)
    return {"base": before, "adapter": perplexity.loss(load_adapter(model, work.adapter), records)}


def loaded(recipe: Recipe, folder: Path) -> torch.nn.Module:
    """A model in the numbers that the recipe trains in."""
    device = pick_device("cpu" if recipe.train.use_cpu else "auto")
    return load_model(folder, dtype=recipe.model.dtype, device=device, backend=recipe.model.backend)
