"""`tnl demo`: teach the base that comes with tnl a storyteller, with the name given on the command line, and look at what changed."""

from __future__ import annotations

import json
import lzma
import math
import random
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from tnl import paths
from tnl.adapter.load import load_adapter
from tnl.data.build import build
from tnl.data.messages import Message, Role
from tnl.data.template import TEMPLATES, encode_prompt, encode_text, stop_ids
from tnl.errors import RecipeError
from tnl.evaluate import perplexity
from tnl.generate.decode import generate_ids, new_cache, prefill
from tnl.generate.sampling import Settings
from tnl.model.load import load_model, load_tokenizer
from tnl.model.state import TransnormerCache
from tnl.recipe.load import Recipe, load
from tnl.run_dir import RunDir
from tnl.storage import storage, write_text
from tnl.train import run as training
from tnl.train.callbacks import read_metrics

LONGEST_NAME = 20
READ_TOKENS = 100_000
AFTER_READING = "after_reading.jsonl"
PASSAGE = (100, 6000)
"""Characters."""
SYSTEM = "你是茶馆里的说书人。"
BARS = "▁▂▃▄▅▆▇█"
REAL = "recipes/huanhuan-385m.yaml"

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Question:
    """One of the twelve; `name`: the answer must give it."""

    ask: str
    name: bool


@dataclass(frozen=True)
class Rule:
    """What counts as in character, stated in tnl/demo/questions.json before anything is trained."""

    text: str
    marks: tuple[str, ...]
    machine: tuple[str, ...]

    def holds(self, question: Question, answer: str, name: str) -> bool:
        """Whether an answer is in character."""
        if any(word in answer for word in self.machine if word not in name):
            return False
        return name in answer if question.name else any(mark in answer for mark in self.marks)


@dataclass(frozen=True)
class Figures:
    """What is measured before the training, after it, and after the reading."""

    answers: list[str]
    persona: float
    """Loss on the persona's held-out records."""
    base: float
    """Loss on the base's held-out texts."""


@dataclass(frozen=True)
class Subject:
    """Whom the demo asks, and by which rule."""

    name: str
    recipe: Recipe
    tokenizer: Any
    questions: list[Question]
    rule: Rule
    persona_records: list[dict[str, Any]]
    base_records: list[dict[str, Any]]

    def ask(self, model: nn.Module, question: Question, state: TransnormerCache | None = None) -> str:
        """The model's answer; state: what it has read before, which stays as it is."""
        section = self.recipe.data
        prompt = encode_prompt([Message(Role.USER, question.ask)], self.tokenizer, TEMPLATES[section.template], system=section.system)
        settings = Settings.of(self.recipe.generation.model_dump())
        cache = None if state is None else state.clone()
        with perplexity.evaluating(model):
            ids = list(generate_ids(model, prompt, settings, cache=cache, stop_ids=stop_ids(self.tokenizer), seed=0))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def measure(self, model: nn.Module) -> Figures:
        """Ask all questions and measure both losses."""
        answers = [self.ask(model, question) for question in self.questions]
        losses = [perplexity.loss(model, records).loss for records in (self.persona_records, self.base_records)]
        return Figures(answers, *losses)

    def marks(self, answers: Sequence[str]) -> list[bool]:
        """Which answers are in character."""
        return [self.rule.holds(question, answer, self.name) for question, answer in zip(self.questions, answers)]


def run(name: str = "小明", out: Path = Path("output/demo")) -> RunDir:
    """Ask, train, ask again, read 100,000 tokens, ask once more, and say what changed.

    The run goes into out/NAME, its records beside it; a finished one is not trained again, an unfinished one goes on.
    Raises RecipeError for a name that nobody could have, and what training raises.
    """
    began = time.perf_counter()
    name = check_name(name)
    recipe_path, overrides = prepare(Path(out), name)
    subject, base = subject_of(name, load(recipe_path, overrides))
    title(f"A storyteller called {name}")
    size = sum(parameter.numel() for parameter in base.parameters()) / 1e6
    say(f"The base that comes with tnl has {size:.1f} million parameters and plays nobody. Twelve questions, none of them in the records:")
    before = subject.measure(base)
    show_answers(subject, before.answers)

    title("Training")
    work = training.run(recipe_path, overrides)
    show_curve(work)
    tuned = load_adapter(base, work.adapter)

    title("The same questions")
    after = subject.measure(tuned)
    show_answers(subject, after.answers)
    say(f"By the rule: {subject.rule.text}", style="dim")

    title(f"Reading {READ_TOKENS:,} tokens of the Three Kingdoms, then the questions again")
    answers, sizes = read_and_ask(subject, tuned)
    show_answers(subject, answers)
    say(f"state {megabytes(sizes[0])} before, {megabytes(sizes[1])} after", style="bold")

    title("What changed")
    show_figures(subject, before, after, answers)
    say(f"{time.perf_counter() - began:.0f} seconds in all.")
    show_next(work)
    return work


# ---- the records and the questions --------------------------------------------------------------


def package_text(name: str) -> str:
    """A file of tnl/demo."""
    return files("tnl.demo").joinpath(name).read_text(encoding="utf-8")


def read_questions() -> tuple[list[Question], Rule]:
    """The twelve questions and the rule."""
    found = json.loads(package_text("questions.json"))
    return [Question(**q) for q in found["questions"]], Rule(found["rule"], tuple(found["marks"]), tuple(found["machine"]))


def three_kingdoms() -> str:
    """The novel's first chapters, somewhat more than READ_TOKENS."""
    return lzma.decompress(files("tnl.demo").joinpath("three-kingdoms.txt.xz").read_bytes()).decode("utf-8")


def check_name(name: str) -> str:
    """The name, without white space around it. Raises RecipeError where nobody could be called so."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    if not name or len(name) > LONGEST_NAME:
        raise RecipeError("--name", f"a name has 1 to {LONGEST_NAME} characters (found {len(name)})", "Give another, for example 小明.")
    for character in name:
        if unicodedata.category(character)[0] not in "LMN" and character not in " ·-'":
            raise RecipeError("--name", f"{character!r} is no character of a name", "Use letters, Chinese characters or digits.")
    if not any(unicodedata.category(character)[0] == "L" for character in name):
        raise RecipeError("--name", f"a name has a letter (found {name!r})", "Give another, for example 小明.")
    return name


def prepare(out: Path, name: str) -> tuple[Path, list[str]]:
    """Write the records with the name filled in, beside the run; returns the recipe and what is put in it. Raises StorageError."""
    run, folder = out / name, out / f"{name}.records"
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in ("persona.json", "persona_held_out.json", "rehearsal.jsonl"):
        write_text(folder / file, package_text(file).replace("{{name}}", name))
    recipe = Path(str(files("tnl.demo").joinpath("recipe.yaml")))
    records = after_reading(json.loads((folder / "persona.json").read_text(encoding="utf-8")))
    write_text(folder / AFTER_READING, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    train = [str(folder / file) for file in ("persona.json", AFTER_READING, "rehearsal.jsonl")]
    values = {"data.train": train, "data.eval": str(folder / "persona_held_out.json"), "train.output_dir": str(run)}
    return recipe, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def after_reading(records: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """A fifth of the records whose answer serves several questions once more, of every such answer, asked after a passage of the novel.

    The character shall hold out against what was read: without these, questions after 100,000 tokens are answered out of the novel,
    and after short passages alone all by one sentence (docs/log.md).
    """
    rng, novel = random.Random(0), three_kingdoms()
    uses = Counter(record["output"] for record in records)
    often = [record for record in records if uses[record["output"]] > 1]
    for record in sorted(often, key=lambda record: record["output"])[::5]:
        length = round(math.exp(rng.uniform(*map(math.log, PASSAGE))))
        start = rng.randrange(len(novel) - length)
        turns = {"system": f"{novel[start : start + length]}\n{SYSTEM}", "user": record["instruction"], "assistant": record["output"]}
        yield {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def subject_of(name: str, recipe: Recipe) -> tuple[Subject, nn.Module]:
    """Everything to ask with, and the base."""
    tokenizer = load_tokenizer(recipe.model.path)
    data = build(recipe.data, tokenizer, seed=recipe.train.seed)  # type: ignore[arg-type]
    texts = [json.loads(line)["text"] for line in package_text("held_out.jsonl").splitlines()]
    encoded = [encode_text(text, tokenizer) for text in texts]  # type: ignore[arg-type]
    base_records = [{"id": f"held_out.jsonl:line {i}", "input_ids": e.input_ids, "labels": e.labels} for i, e in enumerate(encoded, 1)]
    questions, rule = read_questions()
    device = "cpu" if recipe.train.use_cpu else "auto"
    base = load_model(recipe.model.path, dtype=recipe.model.dtype, device=device, backend=recipe.model.backend)
    return Subject(name, recipe, tokenizer, questions, rule, data.eval, base_records), base


def read_and_ask(subject: Subject, model: nn.Module) -> tuple[list[str], tuple[int, int]]:
    """Answers out of the state that has read the novel, and the state's bytes after its first token and after its last."""
    ids = subject.tokenizer.sp_model.encode(three_kingdoms())[:READ_TOKENS]
    state = new_cache(model)
    began = time.perf_counter()
    with perplexity.evaluating(model):
        prefill(model, ids[:1], state)
        first = state.num_bytes
        prefill(model, ids[1:], state)
    seconds = time.perf_counter() - began
    say(f"{state.columns:,} tokens in {seconds:.1f} s, {state.columns / seconds:,.0f} a second")
    return [subject.ask(model, question, state) for question in subject.questions], (first, state.num_bytes)


# ---- what a person sees -------------------------------------------------------------------------


def say(line: str | Text = "", style: str = "") -> None:
    """A line for the person."""
    console.print(line, markup=False, style=style)


def title(words: str) -> None:
    """What comes next."""
    say()
    say(words, style="bold cyan")


def show_answers(subject: Subject, answers: Sequence[str]) -> None:
    """Questions, and the answers below them; a tick for what is in character."""
    marks = subject.marks(answers)
    for question, answer, holds in zip(subject.questions, answers, marks):
        say(Text(f"  {question.ask}", style="dim"))
        line = Text("  ✓ " if holds else "  · ", style="green" if holds else "dim")
        line.append(" ".join(answer.split()) or "(nothing)", style="" if holds else "dim")
        say(line)
    say(f"  {sum(marks)} of {len(marks)} in character", style="bold")


def curve(values: Sequence[float]) -> str:
    """Values as a row of bars, at most 40, the largest full."""
    step = max(1, -(-len(values) // 40))
    means = [sum(part) / len(part) for part in (values[i : i + step] for i in range(0, len(values), step))]
    return "".join(BARS[min(int(len(BARS) * value / max(means)), len(BARS) - 1)] for value in means)


def show_curve(work: RunDir) -> None:
    """The training loss from the first step to the last."""
    losses = [line["loss"] for line in read_metrics(work.metrics) if "loss" in line]
    if losses:
        say(f"loss {losses[0]:.2f} {curve(losses)} {losses[-1]:.2f}", style="bold")


def show_figures(subject: Subject, before: Figures, after: Figures, read: Sequence[str]) -> None:
    """The table of what was measured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    count = len(subject.questions)
    scores = [f"{sum(subject.marks(answers))} of {count}" for answers in (before.answers, after.answers, read)]
    table.add_row("answers in character", scores[0], scores[1], "")
    table.add_row(f"the same after reading {READ_TOKENS:,} tokens", "", scores[2], "")
    table.add_row("loss on the persona's held-out records", *change(before.persona, after.persona))
    table.add_row("loss on the base's held-out texts", *change(before.base, after.base))
    console.print(table)


def change(before: float, after: float) -> tuple[str, str, str]:
    """Two losses and how far the second is from the first."""
    return f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}"


def megabytes(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 1e6:.1f} MB"


def show_next(work: RunDir) -> None:
    """What to do now."""
    say()
    say(f"Go on talking:       tnl chat {paths.quoted(work.path)}", style="bold")
    say(f"The real one, 385M:  tnl train {REAL}", style="bold")
