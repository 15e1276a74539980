"""The questions of a run, answered before training and after."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from tnl.data.build import Dataset
from tnl.data.template import TEMPLATES
from tnl.evaluate import generation
from tnl.generate.sampling import Settings as Sampling
from tnl.recipe.load import Recipe
from tnl.train.base import Base, whole_base
from tnl.train.show import say
from tnl.train.signals import StopSignals
from tnl.train.trainer import TnlTrainer


def sample_before(
    recipe: Recipe, base: Base, data: Dataset, trainer: TnlTrainer, folder: Path | None, stop: StopSignals
) -> tuple[list[generation.Sample], list[list[int]]]:
    """Questions and the untrained model's answers; those of an interrupted run are kept."""
    samples, prompts = generation.choose(data.eval or data.train, base.tokenizer, TEMPLATES[recipe.data.template])
    path = trainer.run.samples
    kept = generation.read(path)
    if [sample.question for sample in kept] == [sample.question for sample in samples] and folder is not None:
        return kept, prompts
    if folder is None:
        say(f"asking {len(prompts)} questions before training")
        model = whole_base(recipe, base) if trainer.engine.parts else trainer.net
        answers = ask(recipe, base, model, prompts, stop)
        samples = [replace(sample, before=text) for sample, text in zip(samples, answers)]
        if not stop.requested:
            generation.write(samples, path)
    return samples, prompts


def ask(recipe: Recipe, base: Base, model: nn.Module, prompts: Sequence[Sequence[int]], stop: StopSignals) -> list[str]:
    """An answer a prompt; after a signal nothing more is said."""
    sampling = Sampling.of(recipe.generation.model_dump())
    return generation.answer(model, base.tokenizer, prompts, sampling, recipe.train.seed, stop.asked)
