"""What a run ends with: the best weights saved, loaded anew and compared, and its questions answered by them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnl import paths
from tnl.adapter.load import load_adapter
from tnl.adapter.metadata import Metadata, describe, write_metadata
from tnl.data.template import TEMPLATES
from tnl.errors import NumbersError
from tnl.evaluate import generation
from tnl.evaluate.perplexity import causal_lm, evaluating
from tnl.recipe.load import Recipe
from tnl.run_dir import RunDir
from tnl.storage import staged
from tnl.train import callbacks, checkpoint, lora
from tnl.train.base import Base, whole_base
from tnl.train.questions import ask
from tnl.train.show import say, show_samples
from tnl.train.signals import StopSignals
from tnl.train.trainer import TnlTrainer

TOLERANCE = 1e-4
"""How far the logits of the saved adapter, loaded anew, may be from those of the one in memory, relative to the largest."""


def unite(recipe: Recipe, base: Base, trainer: TnlTrainer) -> None:
    """Where weights are shared out: for the processes that save, the whole model anew, with the weights as they were trained."""
    engine, net = trainer.engine, trainer.net
    if not engine.sharded:
        return
    weights = engine.whole(lambda: checkpoint.trained_tensors(net))
    if engine.crew.saves:
        trainer.net = lora.attach(whole_base(recipe, base), recipe.lora, recipe.where, recipe.train.seed, lambda line: None)
        checkpoint.put_weights(trainer.net, weights)


def finish(
    work: RunDir,
    recipe: Recipe,
    base: Base,
    trainer: TnlTrainer,
    samples: tuple[list[generation.Sample], list[list[int]]],
    stop: StopSignals,
) -> None:
    """Keep the best weights, save them, load them anew and compare, answer the questions again, draw the curve."""
    stop.words = "the trained weights are saved first"
    best = trainer.load_best()
    lines = callbacks.read_metrics(work.metrics)
    if note := callbacks.overfitting(lines, best is not None):
        say(note)
    trainer.optimizer_mode("eval")
    folder, model = save(work, base, trainer.net, recipe.model.path, trainer.about)
    asked, prompts = samples
    answers = ask(recipe, base, model, prompts, stop)
    if stop.requested:
        work.update_metadata(status="interrupted")
        say(f"stopped; training is done and saved in {paths.shown(folder)}. The same command finishes the run")
        raise SystemExit(stop.exit_code)
    asked = [replace(sample, after=text) for sample, text in zip(asked, answers)]
    generation.write(asked, work.samples)
    callbacks.draw(lines, work.plot)
    work.update_metadata(status="finished", steps=trainer.state.global_step, best_step=trainer.state.best_global_step)
    show_samples(asked)
    say(f"saved in {paths.shown(folder)}. Talk to it: tnl chat {paths.quoted(work.path)}")


def result_folder(work: RunDir, adapted: bool) -> Path:
    """Where the run's adapter will lie (without LoRA: the whole model)."""
    return work.adapter if adapted else work.path / "model"


def describe_result(work: RunDir, recipe: Recipe, adapted: bool) -> Metadata:
    """What the result, and every checkpoint beside it, says of its base and of how it was taught."""
    section = recipe.model
    return describe(
        result_folder(work, adapted),
        section.path,
        hub_name=section.hub,
        revision=section.revision,
        template=TEMPLATES[recipe.data.template],
        system=recipe.data.system,
        generation=recipe.generation.model_dump(),
    )


def save(work: RunDir, base: Base, model: nn.Module, path: str, about: Metadata | None) -> tuple[Path, nn.Module]:
    """Write the adapter (without LoRA: the whole model) with what is needed to use it.

    Returns its folder and the model to ask: the base with the saved adapter, loaded anew and compared.
    """
    adapted = lora.is_adapted(model)
    final = result_folder(work, adapted)
    with staged(final, None, checkpoint.estimate_bytes(model)) as folder:
        checkpoint.save_weights(model, folder, path)
        if about is not None:
            write_metadata(folder, about)
        if not adapted:
            base.tokenizer.save_pretrained(folder)
    return final, compare(model, final, base) if adapted else model


def compare(model: nn.Module, folder: Path, base: Base) -> nn.Module:
    """Put the saved adapter on the base anew and hold its logits against those in memory; the old one is gone from it.

    Returns the base with the saved adapter. Raises NumbersError where they differ.
    """
    probe = torch.arange(16, device=causal_lm(model).device)[None] % base.config.vocab_size
    with evaluating(model), torch.inference_mode():
        mine = model(input_ids=probe).logits.float()
        bare: Any = model.unload()  # type: ignore[operator]  # the base alone, as it is now: nobody trains any more
        loaded = load_adapter(bare, folder)
        theirs = loaded(input_ids=probe).logits.float()
    difference = float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1e-9))
    if not difference <= TOLERANCE:
        raise NumbersError(folder, f"the saved adapter answers differently from the trained one (by {difference:.1e})", "Please report it.")
    return loaded
