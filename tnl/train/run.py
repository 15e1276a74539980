"""`tnl train` and `tnl resume`: the pipeline on one screen."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tnl import hub, paths
from tnl.adapter.load import load_adapter
from tnl.adapter.metadata import Metadata, describe, write_metadata
from tnl.data.build import Dataset, build
from tnl.data.files import find_files
from tnl.data.store import lengths_of
from tnl.data.template import TEMPLATES
from tnl.errors import ModelError, NumbersError
from tnl.evaluate import generation
from tnl.evaluate.perplexity import causal_lm, evaluating
from tnl.generate.sampling import Settings as Sampling
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.convert import read_config, weight_files
from tnl.model.load import load_model, load_tokenizer, pick_device
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.recipe.load import Recipe, dump, load
from tnl.run_dir import RunDir, fingerprint, open_run
from tnl.storage import staged, storage
from tnl.train import arguments, callbacks, checkpoint, engine_choice, lora, order, plan, recomputation, segments, shared_prompt, together
from tnl.train.engines import Engine
from tnl.train.graphed import Graphed
from tnl.train.paths_taken import paths_taken, why_eager, words
from tnl.train.signals import StopSignals
from tnl.train.step import ROUND, Rows
from tnl.train.trainer import TnlTrainer

console = Console(highlight=False, soft_wrap=True)
TOLERANCE = 1e-4
"""How far the logits of the saved adapter, loaded anew, may be from those of the one in memory, relative to the largest."""


def run(recipe_path: Path, overrides: Sequence[str] = (), *, memory: float | None = None, allow_change: Sequence[str] = ()) -> RunDir:
    """Train as the recipe says; an unfinished run of the same fingerprint goes on, a finished one is left as it is.

    memory: GiB of the GPU that this process may use (default: what there is). allow_change: fields of the fingerprint that may
    differ from an unfinished run's, which is recorded there. Returns the run's folder.
    Raises a TnlError for whatever a person can mend, SystemExit 143 or 130 after a signal and a safe save.
    """
    return train(load(recipe_path, overrides), memory, allow_change)


def resume(run_path: Path, *, memory: float | None = None, allow_change: Sequence[str] = ()) -> RunDir:
    """Continue the run in a folder by its own recipe. Raises ModelError where it is none."""
    found = RunDir(paths.existing(run_path, ModelError))
    if not found.path.is_dir():
        raise ModelError(run_path, "is a file (needed: the folder of a run)", f"Name a run's folder, or start one: tnl train {run_path}")
    if not found.read_metadata() or not found.recipe.is_file():
        raise ModelError(run_path, "is not the folder of a run (run.json or recipe.yaml is missing)", "Start one with tnl train RECIPE.")
    return train(load(found.recipe, [f"train.output_dir={found.path}"]), memory, allow_change)


def train(recipe: Recipe, memory: float | None, allow: Sequence[str] = ()) -> RunDir:
    """The pipeline: recipe, tokenizer, data, model, LoRA, trainer, save; on several processes, each step of it together."""
    crew = together.join(recipe.train)
    console.quiet = not crew.leads
    for line in recipe.notices:
        say(line)
    base = together.in_turn(crew, lambda: prepare(recipe, memory))
    path = Path(recipe.train.output_dir)
    with crew.together():
        facts = fingerprint_of(recipe, base)
    crew.require_same(together.comparable(recipe, facts))
    # no folder is made before there is something to put into it
    with crew.together():
        finished = crew.saves and occupied(path) and open_run(path, facts, allow)[1] == "finished"
    if crew.share(finished):
        say(f"{path}: this run is finished: tnl chat {path}")
        return RunDir(path)
    data = together.read(crew, lambda: build(recipe.data, base.tokenizer, seed=recipe.train.seed))  # type: ignore[arg-type]
    show_data(data)
    with crew.together():
        args, settings = arguments.build(recipe.train, recipe.where, path, base.device, bool(data.eval))
        engine = engine_choice.make(recipe.train, crew, base.device, base.dtype, recipe.where)
        rows = plan_rows(recipe, base, data, memory, engine)
    together.same_rows(crew, rows)
    with crew.together():
        row_tokens = RunDir(path).read_metadata().get("row_tokens") or rows.budget  # a resumed run's rows are those it began with
        units = order.units_of(recipe.data, lengths_of(data.train), row_tokens, rows.shared)
        args.num_train_epochs = order.epochs(recipe.train, len(units), settings.records_per_step)
        say(order.words(recipe.train, len(units), settings.records_per_step, order.UNITS[recipe.data.packing]))
        loaded = load_model(base.folder, dtype=base.dtype, device=engine.home, backend=recipe.model.backend, mapped=engine.parts)
        loaded.model.pick_kernels(device=base.device)
        model = lora.attach(loaded, recipe.lora, recipe.where, recipe.train.seed, say)
        recomputation.use(model, rows.level, arguments.recomputing(recipe.train), own=not engine.sharded)
    show_table(model)
    live = callbacks.Live(console, settings.plain)
    with together.held(crew, path, facts, allow) as (work, folder, notices), StopSignals() as stop, closing(live):
        watchers = [callbacks.Metrics(work.metrics), live] if crew.leads else []
        trainer = TnlTrainer(model, args, settings, rows, data.train, data.eval, watchers, stop.asked)
        trainer.engine, trainer.stop, trainer.units = engine, stop, units
        if crew.saves:
            work.update_metadata(row_tokens=row_tokens)
        stop.quiet = not crew.leads
        if crew.size > 1:
            trainer.stop_requested = lambda: False  # until all have heard of it
        rows.say = live.say
        trainer.where = recipe.where
        samples = first_words(recipe, base, data, trainer, stop, folder, notices)
        with crew.said_once():
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
        if not stop.requested:
            unite(recipe, base, trainer)
        with crew.together():
            if stop.requested and crew.saves:
                interrupted(work, trainer, stop)
            if crew.saves:
                finish(work, recipe, base, trainer, samples, stop)
    return work


def occupied(path: Path) -> bool:
    """Whether anything lies where the run is to be written: a run of its own, or what open_run refuses."""
    with storage(path):
        return path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())


@dataclass(frozen=True)
class Base:
    """The base model of a run, its weights not yet loaded."""

    folder: Path
    config: TransnormerConfig
    tokenizer: BaiChuanTokenizer
    device: torch.device
    dtype: torch.dtype


def prepare(recipe: Recipe, memory: float | None = None, *, weights: bool = True) -> Base:
    """Find the base model and decide where it is trained, and in which numbers. weights: False leaves those of a repository there."""
    for paths_of_records in (recipe.data.train, recipe.data.eval):
        if isinstance(paths_of_records, (str, list)):
            find_files(paths_of_records)  # gigabytes are not fetched for records that are not there
    folder = hub.resolve(recipe.model.path, recipe.model.hub, recipe.model.revision, weights=weights)
    config = read_config(folder)
    device = together.own_device(pick_device("cpu" if recipe.train.use_cpu else "auto"))
    # read when cuBLAS first runs: the same recipe gives the same bits on a GPU too
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # read when memory is first taken: rows of many lengths, and their graphs, leave no holes
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if memory is not None:
        plan.cap(device, memory)
    wanted = recipe.model.dtype
    if wanted == "auto":
        # every weight in bfloat16 would lose most of its updates to rounding
        half = arguments.asks_for_bfloat16(recipe.train) or (device.type == "cuda" and torch.cuda.is_bf16_supported() and recipe.lora)
        wanted = "bfloat16" if half else "float32"
    return Base(folder, config, load_tokenizer(folder, config), device, getattr(torch, wanted))


def fingerprint_of(recipe: Recipe, base: Base) -> dict[str, Any]:
    """What makes this run this run: the recipe's values, the contents of every file it reads."""
    files = {"data": find_files(recipe.data.train)[0], "base": [base.folder / "config.json", *weight_files(base.folder)]}
    if isinstance(recipe.data.eval, (str, list)):
        files["eval"] = find_files(recipe.data.eval)[0]
    tokenizer = base.folder / "tokenizer.model"
    files["tokenizer"] = [tokenizer] if tokenizer.is_file() else []
    return fingerprint(recipe, files, template=TEMPLATES[recipe.data.template].hash, dtype=str(base.dtype))


def whole_base(recipe: Recipe, base: Base) -> nn.Module:
    """The base where it can be whole beside what is shared out: on this process's device, or on the CPU."""
    device = plan.roomy(base.config, base.dtype, base.device)
    if device != base.device:
        say("the whole model does not fit this GPU: questions are answered on the CPU, which takes minutes")
    return load_model(base.folder, dtype=base.dtype, device=device, backend=recipe.model.backend, mapped=True)


def unite(recipe: Recipe, base: Base, trainer: TnlTrainer) -> None:
    """Where weights are shared out: for the processes that save, the whole model anew, with the weights as they were trained."""
    engine, net = trainer.engine, trainer.net
    if not engine.sharded:
        return
    weights = engine.whole(lambda: checkpoint.trained_tensors(net))
    if engine.crew.saves:
        trainer.net = lora.attach(whole_base(recipe, base), recipe.lora, recipe.where, recipe.train.seed, lambda line: None)
        checkpoint.put_weights(trainer.net, weights)


def plan_rows(recipe: Recipe, base: Base, data: Dataset, memory: float | None, engine: Engine | None = None) -> Rows:
    """Rows that fit this machine, said in one line. Raises MemoryBudgetError before any weight is loaded."""
    longest = max([*lengths_of(data.train), *lengths_of(data.eval)])
    parts = engine is not None and engine.parts
    needs = plan.make(base.config, recipe.lora, base.dtype, base.device, recipe.train.optim, recipe.where, recipe.model.backend, parts)
    room = plan.here(base.device, memory)
    if engine is not None and engine.sharded:
        needs = engine.spread(needs)
        most = plan.longest_row(base.device, longest, recipe.train)
        layout = segments.Layout(plan.choose(needs, room, longest, recipe.train.gradient_checkpointing, most))
    else:
        layout = segments.lay_out(needs, base.config, base.device, room, longest, recipe.train)
    choice = layout.choice
    budget = plan.require(needs, choice, longest)
    say(plan.words(needs, choice))
    if layout.line:
        say(layout.line)
    if choice.level in ("layer", "host") and not recipe.train.gradient_checkpointing:
        say("train.gradient_checkpointing is on, though the recipe has it off: without it nothing fits")
    padded = recipe.train.per_device_train_batch_size if recipe.data.packing == "none" else None
    rows = Rows(budget, padded, label_smoothing=recipe.train.label_smoothing_factor, say=say)
    rows.level, rows.segment_length, rows.offload = choice.level, layout.segment_length, recipe.train.state_offload
    rows.multiple = ROUND if base.device.type == "cuda" else 1
    prompt = shared_prompt.choose(recipe, data.train, budget)
    rows.shared = prompt.tokens
    if prompt.line:
        say(prompt.line)
    return rows


def first_words(
    recipe: Recipe, base: Base, data: Dataset, trainer: TnlTrainer, stop: StopSignals, folder: Path | None, notices: Sequence[str]
) -> tuple[list[generation.Sample], list[list[int]]]:
    """Say where the run starts, and answer its questions before training; ends where a signal has come."""
    crew, work = trainer.engine.crew, trainer.run
    eager = why_eager(trainer.net, trainer.rows, trainer.engine, recipe.train.cuda_graphs)
    trainer.graphed = None if eager else Graphed(trainer.net)
    paths = paths_taken(trainer.net, trainer.rows, eager)
    say(words(paths))
    if line := engine_choice.words(trainer.engine):
        say(line)
    samples: tuple[list[generation.Sample], list[list[int]]] = ([], [])
    with crew.together():
        if crew.saves:
            begin(work, recipe, folder, notices)
            trainer.about = describe_result(work, recipe, lora.is_adapted(trainer.net))
            work.update_metadata(data=counts(data), paths=paths)
            trainer.preflight()
        if crew.leads:
            samples = sample_before(recipe, base, data, trainer, folder, stop)
    stop.requested = next((number for number in crew.gather(stop.requested) if number), None)
    if stop.requested:
        stopped_early(work, folder, stop)
    return samples


def begin(work: RunDir, recipe: Recipe, folder: Path | None, notices: Sequence[str]) -> None:
    """Say where the run starts, and leave its recipe in its folder."""
    for line in notices:
        say(line)
    if folder is not None:
        say(f"{work.path}: this run is unfinished; it goes on from {folder.name}")
    dump(recipe, work.recipe)
    versions = {name: version(name) for name in ("tnl", "torch", "transformers", "peft")}
    work.update_metadata(status="unfinished", versions=versions, command=sys.argv)


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
    """An answer a prompt; after a signal no further one is asked for."""
    sampling, answers = Sampling.of(recipe.generation.model_dump()), list[str]()
    for prompt in prompts:
        if not stop.requested:
            answers += generation.answer(model, base.tokenizer, [prompt], sampling, recipe.train.seed)
    return answers


def stopped_early(work: RunDir, folder: Path | None, stop: StopSignals) -> None:
    """After a signal before training began."""
    if folder is None:
        say("stopped before the first step; the same command starts again")
    else:
        say(f"stopped; {folder.name} is as it was. Go on with: tnl resume {work.path}")
    raise SystemExit(stop.exit_code)


def interrupted(work: RunDir, trainer: TnlTrainer, stop: StopSignals) -> None:
    """After a signal: what was saved and how to go on."""
    if not trainer.state.global_step:
        stopped_early(work, None, stop)
    work.update_metadata(status="interrupted")
    callbacks.draw(callbacks.read_metrics(work.metrics), work.plot)
    say(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved. Go on with: tnl resume {work.path}")
    raise SystemExit(stop.exit_code)


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
        say(f"stopped; training is done and saved in {folder}. The same command finishes the run")
        raise SystemExit(stop.exit_code)
    asked = [replace(sample, after=text) for sample, text in zip(asked, answers)]
    generation.write(asked, work.samples)
    callbacks.draw(lines, work.plot)
    work.update_metadata(status="finished", steps=trainer.state.global_step, best_step=trainer.state.best_global_step)
    show_samples(asked)
    say(f"saved in {folder}. Talk to it: tnl chat {work.path}")


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


@contextlib.contextmanager
def closing(live: callbacks.Live) -> Iterator[None]:
    """Whatever happens, the terminal is left as it was."""
    try:
        yield
    finally:
        live.close()


def say(line: str) -> None:
    """A line for the person."""
    console.print(line, markup=False)


def counts(data: Dataset) -> dict[str, int]:
    """What was trained on, for run.json."""
    report = data.report
    named = {"records": report.train_records, "held_out": report.eval_records}
    return {**named, "tokens": report.tokens, "learned_tokens": report.supervised}


def show_data(data: Dataset) -> None:
    """What was read, in a line or two."""
    report = data.report
    held = f", {report.eval_records:,} held out" if report.eval_records else ""
    lost = "".join(f", {count:,} {what}" for count, what in ((report.truncated, "cut"), (report.dropped, "dropped")) if count)
    learned = f"{report.tokens:,} tokens, {report.supervised:,} of them learned ({report.template})"
    say(f"data: {report.train_records:,} records{held}{lost}; {learned}")
    for line in report.notices:
        say(f"data: {line}")


def show_table(model: nn.Module) -> None:
    """Name, layers, parameters of all that is trained."""
    table = Table("trained", "layers", "parameters", box=None, pad_edge=False)
    for row in lora.table(model):
        table.add_row(row.name, str(row.layers), f"{row.parameters:,}")
    console.print(table)
    trained, everything = lora.count_parameters(model)
    say(f"{trained:,} of {everything:,} parameters are trained ({trained / everything:.2%})")


def show_samples(samples: Sequence[generation.Sample]) -> None:
    """Answers before and after, side by side."""
    table = Table("question", "before", "after", show_lines=True)
    for sample in samples[:3]:
        table.add_row(*(generation.short(text) for text in (sample.question, sample.before, sample.after)))
    console.print(table, markup=False)
