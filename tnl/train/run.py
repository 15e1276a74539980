"""`tnl train` and `tnl resume`: the pipeline on one screen."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tnl import paths
from tnl.data.build import Dataset, build
from tnl.data.store import lengths_of
from tnl.errors import ModelError
from tnl.evaluate import generation
from tnl.model.load import load_model
from tnl.recipe.load import Recipe, dump, load
from tnl.run_dir import RunDir, open_run
from tnl.storage import storage
from tnl.train import arguments, callbacks, engine_choice, lora, order, plan, recomputation, segments, shared_prompt, together
from tnl.train.base import Base, fingerprint_of, prepare, slow_dtype
from tnl.train.engines import Engine
from tnl.train.graphed import Graphed
from tnl.train.paths_taken import paths_taken, rows_of_a_step, why_eager, words
from tnl.train.questions import sample_before
from tnl.train.result import describe_result, finish, unite
from tnl.train.show import console, say, show_data, show_table
from tnl.train.signals import StopSignals
from tnl.train.step import ROUND, Rows
from tnl.train.trainer import TnlTrainer


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
        raise ModelError(
            run_path, "is a file (needed: the folder of a run)", f"Name a run's folder, or start one: tnl train {paths.quoted(run_path)}"
        )
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
    if line := slow_dtype(recipe, base):
        say(line)
    path = Path(recipe.train.output_dir)
    with crew.together():
        facts = fingerprint_of(recipe, base)
    crew.require_same(together.comparable(recipe, facts))
    # no folder is made before there is something to put into it
    with crew.together():
        finished = crew.saves and occupied(path) and open_run(path, facts, allow)[1] == "finished"
    if crew.share(finished):
        say(f"{paths.shown(path)}: this run is finished. Talk to it: tnl chat {paths.quoted(path)}")
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
            step = rows_of_a_step(recipe.train, recipe.data.packing, trainer.settings.records_per_step, trainer.rows)
            work.update_metadata(data=counts(data), paths=paths, step=step)
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
        say(f"{paths.shown(work.path)}: this run is unfinished; it goes on from {folder.name}")
    dump(recipe, work.recipe)
    versions = {name: version(name) for name in ("tnl", "torch", "transformers", "peft")}
    work.update_metadata(status="unfinished", versions=versions, command=sys.argv)


def stopped_early(work: RunDir, folder: Path | None, stop: StopSignals) -> None:
    """After a signal before training began."""
    if folder is None:
        say("stopped before the first step; the same command starts again")
    else:
        say(f"stopped; {folder.name} is as it was. Go on with: tnl resume {paths.quoted(work.path)}")
    raise SystemExit(stop.exit_code)


def interrupted(work: RunDir, trainer: TnlTrainer, stop: StopSignals) -> None:
    """After a signal: what was saved and how to go on."""
    if not trainer.state.global_step:
        stopped_early(work, None, stop)
    work.update_metadata(status="interrupted")
    callbacks.draw(callbacks.read_metrics(work.metrics), work.plot)
    done = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved"
    say(f"{done}. Go on with: tnl resume {paths.quoted(work.path)}")
    raise SystemExit(stop.exit_code)


@contextlib.contextmanager
def closing(live: callbacks.Live) -> Iterator[None]:
    """Whatever happens, the terminal is left as it was."""
    try:
        yield
    finally:
        live.close()


def counts(data: Dataset) -> dict[str, int]:
    """What was trained on, for run.json."""
    report = data.report
    named = {"records": report.train_records, "held_out": report.eval_records}
    return {**named, "tokens": report.tokens, "learned_tokens": report.supervised}
