"""`tnl check`: what a recipe would do, without training and without reading a weight."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.table import Table
from rich.text import Text

from tnl import paths
from tnl.data.build import Dataset, Report, build
from tnl.data.store import lengths_of
from tnl.errors import MemoryBudgetError
from tnl.evaluate.perplexity import IGNORED, count_supervised
from tnl.hubs.files import WEIGHTS
from tnl.model.convert import HEAD, check_keys, headers, weight_files
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.load import Recipe, load
from tnl.run_dir import RunDir, changes
from tnl.train import arguments, calibrate, engine_choice, order, plan, recomputation, segments, shared_prompt
from tnl.train.base import Base, fingerprint_of, prepare, slow_dtype
from tnl.train.crew import Crew
from tnl.train.run import occupied
from tnl.train.show import console, say, show_table

LEARNED, READ = "bold green", "dim"
CARDS = (12, 16, 24, 40, 80)
"""GiB of the cards that the memory table is for, beside this machine's."""
TRANSCRIPT_RECORDS = 5
SHOWN = 600
"""Tokens of a record that are shown, and of all records of a transcript together; of longer ones their beginning and end."""


def run(recipe_path: Path, overrides: Sequence[str] = (), *, memory: float | None = None, allow_change: Sequence[str] = ()) -> None:
    """Print data statistics, records with what is learned in colour, the trainable modules and the memory plan.

    memory: GiB of the card to plan for (default: this machine's). allow_change: as training takes it; nothing is recorded.
    Raises what training would raise before its first step.
    """
    recipe = load(recipe_path, overrides)
    for line in recipe.notices:
        say(line)
    base = prepare(recipe, weights=False)
    output = Path(recipe.train.output_dir)
    if not has_weights(base.folder) and not paths.looks_like_path(recipe.model.path):
        say(f"{recipe.model.path}: config and tokenizer are here; tnl train fetches the weights")
    else:
        check_weights(base)
        if occupied(output):
            for name, old, new in changes(RunDir(output), fingerprint_of(recipe, base), allow_change):
                say(f"{name} was {old} in the run that is there and is {new} now, as --allow-change permits")
    data = build(recipe.data, base.tokenizer, seed=recipe.train.seed)  # type: ignore[arg-type]
    _, settings = arguments.build(recipe.train, recipe.where, Path(recipe.train.output_dir), base.device, bool(data.eval))
    if recipe.train.fsdp or recipe.train.deepspeed:
        engine_choice.make(recipe.train, Crew(0, 2), base.device, base.dtype, recipe.where)  # says what contradicts the recipe
    show_statistics(data.report, recipe)
    shown = data.train[: TRANSCRIPT_RECORDS if data.report.speakers else 1]
    for record in shown:
        show_record(record, base, SHOWN // len(shown))
    say("")
    with torch.device("meta"):
        model = plan.build(base.config, recipe.lora, base.dtype, "reference", recipe.where)
    show_table(model)
    layout = show_memory(recipe, base, data, memory)
    prompt = shared_prompt.choose(recipe, data.train, layout.choice.budget or 1)
    if prompt.line:
        say(prompt.line)
    units = order.units_of(recipe.data, lengths_of(data.train), layout.choice.budget or 1, prompt.tokens)
    many = (recipe.train, len(units), settings.records_per_step)
    say(order.words(*many, order.UNITS[recipe.data.packing]))
    if memory is None:
        if line := slow_dtype(recipe, base):
            say(line)
        show_time(recipe, base, data, layout, prompt.spared, (order.count_steps(*many), max(order.steps_an_epoch(*many), 1)))


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds more than config and tokenizer."""
    return any(path for kind in WEIGHTS for path in folder.glob(kind))


def check_weights(base: Base) -> None:
    """Hold the names, shapes and dtypes of the base's weights against its config; no tensor is read. Raises ModelError."""
    with torch.device("meta"):
        bare = TransnormerForCausalLM(base.config)
    expected = {name: tuple(value.shape) for name, value in bare.state_dict().items()}
    found = {file: headers(file) for file in weight_files(base.folder)}
    check_keys(base.folder, found, expected, optional={HEAD} if base.config.tie_word_embeddings else set())


def show_statistics(report: Report, recipe: Recipe) -> None:
    """Files, rows, records, lengths, and every row that is not trained on."""
    for source in report.sources:
        say(f"{paths.shown(source.path)}: {source.size:,} bytes")
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    table.add_row("format", ", ".join(f"{name} ({count} file{'s' * (count > 1)})" for name, count in report.formats.items()))
    table.add_row("rows read", f"{report.rows:,}")
    table.add_row("records", f"{report.train_records:,} to train on, {report.eval_records:,} held out")
    for what, count in report.passed.items():
        table.add_row(what, f"{count:,}")
    table.add_row("cut, dropped", f"{report.truncated:,}, {report.dropped:,} (max_length {recipe.data.max_length}, {recipe.data.overlong})")
    table.add_row("duplicates", f"{report.duplicates:,}")
    lengths = ", ".join(f"{value:,} ({share}%)" for share, value in report.percentiles.items())
    table.add_row("tokens a record", f"at most {lengths}; longest {report.longest:,}, {paths.shown(report.longest_id)}")
    table.add_row("tokens", f"{report.tokens:,}, of which {report.supervised:,} are learned ({report.supervised / report.tokens:.0%})")
    table.add_row("template", f"{report.template} ({report.template_hash[:12]})")
    console.print(table, markup=False)
    for line in report.notices:
        say(paths.nearby(line))
    if report.speakers:
        show_speakers(report.speakers, recipe.data.persona)


def show_speakers(speakers: dict[str, int], persona: str | None) -> None:
    """Who speaks how often; the persona is the one that is learned."""
    table = Table("speaker", "lines", box=None, pad_edge=False)
    for name, count in list(speakers.items())[:20]:
        table.add_row(Text(name, LEARNED if name == persona else ""), f"{count:,}")
    console.print(table)
    if len(speakers) > 20:
        say(f"and {len(speakers) - 20} more speakers")


def show_record(record: dict[str, Any], base: Base, most: int = SHOWN) -> None:
    """One record as the model reads it, at most so many tokens of it, the learned ones in colour, the end token written out."""
    brackets = console.color_system is None
    how = "between [[ and ]]" if brackets else "green"
    say("")
    say(f"{paths.shown(record['id'])}: {len(record['input_ids'])} tokens, {count_supervised(record)} learned ({how})")
    size, half = len(record["input_ids"]), most // 2
    if size <= most:
        console.print(coloured(record, base.tokenizer, brackets))
        return
    for part in (slice(0, half), slice(size - half, size)):
        shown = {name: record[name][part] for name in ("input_ids", "labels")}
        console.print(coloured(shown, base.tokenizer, brackets))
        if part.start == 0:
            say(f"... {size - 2 * half:,} tokens ...")


def coloured(record: dict[str, Any], tokenizer: Any, brackets: bool) -> Text:
    """The record's text in stretches of read and learned tokens; each stretch is decoded whole, so no character is cut.

    brackets: mark what is learned where there are no colours.
    """
    text = Text()
    ids, labels = (numpy.asarray(record[name]).tolist() for name in ("input_ids", "labels"))
    start = 0
    for end in range(1, len(ids) + 1):
        over = ids[end - 1] == tokenizer.eos_token_id
        if end == len(ids) or over or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            # beside an end token a text would be decoded with a blank before it that is not there
            part = tokenizer.decode(ids[start : end - over], skip_special_tokens=False) + tokenizer.eos_token * over
            learned = labels[start] != IGNORED
            text.append(f"[[{part}]]" if learned and brackets else part, LEARNED if learned else READ)
            start = end
    return text


def show_time(recipe: Recipe, base: Base, data: Dataset, layout: segments.Layout, spared: float, steps: tuple[int, int]) -> None:
    """How long training will take here, without measuring and saving, from a calibration of a few seconds.

    spared: share of the tokens that rows have in common; steps: of the run, and of an epoch.
    """
    lengths = lengths_of(data.train)
    longest = max(lengths)
    segment = layout.segment_length
    tokens = min(segment or layout.choice.budget or longest, sum(lengths))
    backend, level = recipe.model.backend, layout.choice.level
    speed = calibrate.measure(base.config, recipe.lora, base.dtype, base.device, backend, tokens, level)
    if speed is None:
        return
    seconds = (1 - spared) * sum(speed.seconds(length, segment, layout.every) for length in lengths)
    rate = sum(lengths) / seconds
    words = f"about {rate:,.{0 if rate >= 10 else 1}f} tokens/s on this {base.device.type.upper()}"
    whole, step, row = clock(seconds * steps[0] / steps[1]), clock(seconds / steps[1]), clock(speed.seconds(longest, segment, layout.every))
    say(f"{words}: {whole} for the run, {step} a step, {row} for its longest record")


def clock(seconds: float) -> str:
    """A duration as people say it."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 100 * 60 else f"{minutes / 60 / 24:.0f} days"


def show_memory(recipe: Recipe, base: Base, data: Dataset, memory: float | None) -> segments.Layout:
    """What fits this machine, and common cards. Raises MemoryBudgetError where it does not fit this one."""
    longest = max([*lengths_of(data.train), *lengths_of(data.eval)])
    device = base.device if memory is None else torch.device("cuda")
    card_dtype = torch.bfloat16 if recipe.lora else base.dtype
    dtype = base.dtype if device == base.device else card_dtype
    here = memory * plan.GIB if memory is not None and base.device.type != "cuda" else plan.here(base.device, memory)
    needs = plan.make(base.config, recipe.lora, dtype, device, recipe.train.optim, backend=recipe.model.backend)
    card = plan.make(base.config, recipe.lora, card_dtype, torch.device("cuda"), recipe.train.optim, backend=recipe.model.backend)
    say("")
    table = Table("memory", "longest row", "computed again", "needs", box=None, pad_edge=False)
    layout = segments.lay_out(needs, base.config, device, here, longest, recipe.train)
    chosen = layout.choice
    table.add_row(*row("this run" if memory is None else f"{memory:g} GiB", chosen))
    cards: list[tuple[list[int], list[str]]] = []
    for size in CARDS:
        with contextlib.suppress(MemoryBudgetError):
            choice, _ = segments.fitting(card, base.config, torch.device("cuda"), size * plan.GIB, longest, recipe.train)
            _, *cells = row("", choice)
            if cards and cards[-1][1] == cells:
                cards[-1][0].append(size)
            else:
                cards.append(([size], cells))
    for sizes, cells in cards:
        table.add_row(f"cards of {sizes[0]} to {sizes[-1]} GiB" if len(sizes) > 1 else f"a card of {sizes[0]} GiB", *cells)
    console.print(table)
    if not torch.cuda.is_available() and recipe.model.backend != "reference":
        say("no GPU is here to try our kernels on: cards are planned with the plain PyTorch forms, which take more memory")
    plain, glu, recomputed = (needs.curve(level).per_token / 1e6 for level in ("none", "glu", needs.levels(True)[0]))
    token = f"{plain:.2f} MB a token of a row, {glu:.2f} with GLUs computed again, {recomputed:.2f} with layers"
    say(f"the longest record has {longest:,} tokens; frozen weights {needs.weights / plan.GIB:.1f} GiB, {token}")
    if layout.line:
        say(layout.line)
    if recipe.train.fsdp or recipe.train.deepspeed:
        say("planned for one process: train.fsdp and train.deepspeed share weights and states out over their number (docs/scale.md)")
        return layout
    try:
        plan.require(needs, chosen, longest)
    except MemoryBudgetError:
        say("this run does not fit:")
        raise
    return layout


def row(name: str, choice: plan.Choice) -> tuple[str, str, str, str]:
    """One line of the memory table."""
    if choice.budget is None:
        return name, "does not fit", "", f"{choice.needed / plan.GIB:.1f} GiB"
    return name, f"{choice.budget:,} tokens", recomputation.WORDS[choice.level], f"{choice.needed / plan.GIB:.1f} GiB"
