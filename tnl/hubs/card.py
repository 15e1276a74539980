"""The model card of a run: base, data, recipe, losses, samples. No path of the machine that trained it stands in it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from tnl.recipe.load import Recipe, load, text_of
from tnl.run_dir import RunDir


@dataclass(frozen=True)
class Base:
    """What a run was trained on, as others know it."""

    name: str
    """owner/name, demo, or the name of a folder."""
    hub: str
    local: bool
    """It is a folder that nobody can fetch."""


SHOWN = 400
"""Characters of an answer that are shown."""


def write(work: RunDir, repo: str, hub: str, base: Base, adapted: bool) -> str:
    """README.md for the result of a run, which is to lie at `repo` of `hub`."""
    recipe = load(work.recipe)
    kind = "LoRA adapter for" if adapted else "Full fine-tune of"
    settings = text_of(shown(recipe, base))
    fence = max(["``", *re.findall("`+", settings)], key=len) + "`"  # a text within cannot end the block
    parts = [
        header(base.name, adapted),
        f"# {repo.partition('/')[2]}",
        f"{kind} {cell(base.name)}, trained with tnl {versions(work)}.",
        f"```bash\n{use(repo, hub, base, adapted)}\n```",
        "## Data",
        data(work, recipe),
        "## Losses",
        losses(lines_of(work.metrics)),
        "## Samples",
        samples(lines_of(work.samples)),
        "## Recipe",
        f"{fence}yaml\n{settings}{fence}",
    ]
    return "\n\n".join(parts) + "\n"


def use(repo: str, hub: str, base: Base, adapted: bool) -> str:
    """The command that talks to it."""
    place = "" if hub == "huggingface" else f" --hub {hub}"
    override = " --base FOLDER_OF_THE_BASE" if adapted and base.local else ""
    return f"tnl chat {repo}{place}{override}"


def header(base: str, adapted: bool) -> str:
    """What hubs read of a card."""
    kind = ["library_name: peft", "base_model_relation: adapter"] if adapted else ["base_model_relation: finetune"]
    named = [f"base_model: {base}"] if "/" in base else []
    tags = "[transnormer, tnl, lora]" if adapted else "[transnormer, tnl]"
    return "\n".join(["---", *named, *kind, "pipeline_tag: text-generation", f"tags: {tags}", "---"])


def versions(work: RunDir) -> str:
    """Versions of what trained."""
    found = work.read_metadata().get("versions", {})
    others = ", ".join(f"{name} {number}" for name, number in found.items() if name != "tnl")
    return f"{found.get('tnl', '')} ({others})"


def data(work: RunDir, recipe: Recipe) -> str:
    """Files by name, how many records and tokens, and how turns were written."""
    names = [recipe.data.train] if isinstance(recipe.data.train, str) else recipe.data.train
    counts = work.read_metadata().get("data", {})
    told = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items())
    return f"{cell(', '.join(Path(name).name for name in names))}{': ' if told else ''}{told}. Template: {recipe.data.template}."


def losses(lines: Sequence[dict[str, Any]]) -> str:
    """First and last training loss; first, lowest and last held-out loss."""
    rows = []
    for key, name in (("loss", "training"), ("eval_loss", "held out")):
        found = [line for line in lines if isinstance(line.get(key), (int, float))]
        lowest = min(found, key=lambda line: line[key], default=None)
        for word, line in (("first", found[0]), ("lowest", lowest), ("last", found[-1])) if found else ():
            assert line is not None
            rows.append(f"| {name}, {word} | {line['step']} | {line[key]:.4f} |")
    return "\n".join(["| loss per supervised token | step | |", "|---|---|---|", *rows]) if rows else "None was logged."


def samples(lines: Sequence[dict[str, Any]]) -> str:
    """Questions, and the answers before and after."""
    rows = [f"| {' | '.join(cell(line.get(name)) for name in ('question', 'before', 'after'))} |" for line in lines]
    return "\n".join(["| question | before | after |", "|---|---|---|", *rows]) if rows else "None was asked."


def cell(text: str | None) -> str:
    """A text as a table can hold it: one line, no markup, nothing that hubs would show as HTML or an image."""
    line = " ".join((text or "").split())
    shown = line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
    for mark in "\\`*_{}[]<>#|!$":
        shown = shown.replace(mark, f"\\{mark}")
    return shown


def shown(recipe: Recipe, base: Base) -> dict[str, Any]:
    """The recipe, files by their names alone."""
    values = recipe.as_dict()
    if base.name != recipe.model.path:
        values["model"] |= {"path": base.name, "hub": base.hub, "revision": None}
    values["data"] |= {name: bare(values["data"][name]) for name in ("train", "eval")}
    values["train"] = bare(values["train"])
    return values


def bare(value: Any) -> Any:
    """A value in which every path of a machine is its last name."""
    if isinstance(value, dict):
        return {name: bare(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [bare(inner) for inner in value]
    if isinstance(value, str) and (Path(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~")):
        return PureWindowsPath(value).name
    return value


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line] if path.is_file() else []
