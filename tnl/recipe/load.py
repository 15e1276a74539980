"""A recipe: a YAML file, checked whole before anything heavy is imported. Its keys and defaults stand in tnl/recipe/sections.py.

Every mistake is one RecipeError that names the line and column, the key, what was found and what is needed.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from tnl import paths
from tnl.errors import RecipeError
from tnl.recipe import complaints, old_names, yaml_text
from tnl.recipe.sections import COLUMNS, SECTIONS, DataSection, GenerationSection, LoraSection, ModelSection, TrainSection, given
from tnl.recipe.settle import settle

MAX_BYTES = 1_000_000


@dataclass
class Recipe:
    """The five sections; lora None trains every weight. path is the file it came from, notices are lines for the person."""

    model: ModelSection
    data: DataSection
    lora: LoraSection | None
    train: TrainSection
    generation: GenerationSection
    path: Path = field(compare=False)
    notices: list[str] = field(default_factory=list, compare=False)
    text: yaml_text.Text = field(default_factory=lambda: yaml_text.Text(""), compare=False, repr=False)

    def where(self, key: str) -> str:
        """Return the place of section.key for an error: "recipe.yaml:line 14, column 3: lora.target_modules"."""
        return complaints.place(tuple(key.split(".")), self.text)

    def as_dict(self) -> dict[str, Any]:
        """Return the sections as plain values, complete: our defaults and all that the file gives."""
        sections = {"model": self.model, "data": self.data, "lora": self.lora, "train": self.train, "generation": self.generation}
        return {name: None if section is None else given(section) for name, section in sections.items()}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; overrides are section.key=value, the value read as YAML. Raises RecipeError.

    Paths in it are relative to the current folder, as a shell's are, and come back absolute.
    """
    text = yaml_text.parse(_read(Path(path)), str(path))
    values = _sections(text)
    notices = _translate(values, text)
    for override in overrides:
        _apply(override, values, text)
        notices += _translate(values, text, replace=True)
    sections = {name: _section(name, values[name], text) for name in SECTIONS}
    recipe = Recipe(**sections, path=Path(path), notices=notices, text=text)
    try:
        _resolve_paths(recipe)
        settle(recipe.data, recipe.train, recipe.notices)
        _check(recipe)
    except complaints.Complaint as complaint:
        raise complaint.at(text) from None
    return recipe


def dump(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, complete, such that load reads an equal one back."""
    path.write_text(dumps(recipe), encoding="utf-8")


def dumps(recipe: Recipe) -> str:
    """Return the text that dump writes."""
    return text_of(recipe.as_dict())


def text_of(values: dict[str, Any]) -> str:
    """Return a recipe's values as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _read(path: Path) -> str:
    if not path.exists():
        what, todo = paths.missing(path)
        raise RecipeError(path, what if path.suffix else re.sub("^no such folder(?!:)", "no such file", what), todo)
    if not path.is_file():
        raise RecipeError(path, "not a file (needed: a recipe, a YAML file)", "Name the recipe itself.")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(path, f"cannot be read ({error.strerror})", "Check its permissions.") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(path, f"too large for a recipe (more than {MAX_BYTES:,} bytes)", "Is it the data?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding, perhaps GB18030"
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        raise RecipeError(f"{path}:line {line}, column {column}", f"not UTF-8 (found {guess}; needed UTF-8)", "Save it as UTF-8.") from None


def _sections(text: yaml_text.Text) -> dict[str, Any]:
    if text.values is None or text.values == {}:
        raise RecipeError(text.name, "the recipe is empty (needed: at least model.path and data.train)", "Start from a file in recipes/.")
    if not isinstance(text.values, dict):
        raise RecipeError(text.places[()], f"not a recipe (found {complaints.found(text.values)}; needed sections: {', '.join(SECTIONS)})")
    for name in text.values:
        if name not in SECTIONS:
            raise complaints.unknown(("", name)).at(text)
    values: dict[str, Any] = {}
    for name in SECTIONS:
        section = text.values.get(name, {})
        if section is None and (name != "lora" or ("lora",) in text.empty):
            section = {}  # a heading with nothing below it; lora: null is another thing
        if not isinstance(section, dict) and not (name == "lora" and section is None):
            needed = "keys below it" + (", or null" if name == "lora" else "")
            raise complaints.Complaint((name,), f"not a section (found {complaints.found(section)}; needed {needed})").at(text)
        values[name] = section
    return values


def _apply(override: str, values: dict[str, Any], text: yaml_text.Text) -> None:
    """Set one section.key=value of the command line; a key may go on into a mapping (lora.rank_pattern.l1=4)."""
    name, equals, value = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            "command line", f'"{override}" is not an override (needed: section.key=value)', "Write, for example, train.seed=7."
        )
    if keys[0] not in SECTIONS or (len(keys) == 1 and keys[0] != "lora"):
        raise complaints.unknown(("", *keys)).at(text, "command line")
    if value.startswith(("{", "[")) and not value.endswith(("}", "]")):
        raise RecipeError(f"command line: {name}", f"ends too early (found {value[:60]})", f"Put it in quotes for the shell: '{name}=...'")
    parsed = yaml_text.parse(value, f"command line: {name}").values
    for depth in range(1, len(keys) + 1):
        text.keys[tuple(keys[:depth])] = text.places[tuple(keys[:depth])] = "command line"
    if len(keys) == 1:
        if parsed is not None:
            raise RecipeError("command line", f"lora={value}: found {complaints.found(parsed)}; needed null or a key (lora.r=8)")
        values["lora"] = None
        return
    if values[keys[0]] is None:
        values[keys[0]] = {}
    target = values[keys[0]]
    for key in keys[1:-1]:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    target[keys[-1]] = parsed


def _translate(values: dict[str, Any], text: yaml_text.Text, *, replace: bool = False) -> list[str]:
    try:
        done = old_names.translate(values["train"], replace=replace)
    except KeyError as error:
        old, new = error.args
        raise complaints.Complaint(("train", old), f"stands beside {new}, its name in transformers 5", "Keep one.").at(text) from None
    for old, new, _ in done:
        if new:
            text.keys[("train", new)] = text.keys[("train", old)]
            text.places[("train", new)] = text.places[("train", old)]
    return [line for _, _, line in done]


def _section(name: str, values: dict[str, Any] | None, text: yaml_text.Text) -> Any:
    if values is None:
        return None
    for key in values:
        if key not in SECTIONS[name].model_fields:
            raise complaints.unknown((name, key)).at(text)
    try:
        return SECTIONS[name].model_validate(values)
    except ValidationError as error:
        # a missing key first, then as the file goes; of one key's alternatives the one that got farthest
        places = {key: place for place, key in enumerate(values)}
        problems = sorted(error.errors(), key=lambda problem: (places.get(str(problem["loc"][0]), -1), -len(problem["loc"])))
        raise complaints.invalid(name, problems[0], values).at(text) from None


def _resolve_paths(recipe: Recipe) -> None:
    model, data, train = recipe.model, recipe.data, recipe.train
    if "://" in recipe.model.path:
        raise complaints.Complaint(("model", "path"), *paths.address(recipe.model.path))
    model.path = _path(("model", "path"), model.path) if model.path != "demo" else "demo"
    data.train = _files(("data", "train"), data.train)
    if isinstance(data.eval, (str, list)):
        data.eval = _files(("data", "eval"), data.eval)
    for key in ("deepspeed", "fsdp_config"):
        if isinstance(getattr(train, key), str):
            setattr(train, key, _absolute(("train", key), getattr(train, key)))
    train.output_dir = _path(("train", "output_dir"), train.output_dir or f"./output/{recipe.path.stem}")


def _files(key: tuple[str, str], value: str | list[str]) -> str | list[str]:
    if value == [] or value == "":
        raise complaints.Complaint(key, "names no file (needed: a file, a folder or a list of these)")
    if isinstance(value, str):
        return _absolute(key, value)
    return [_absolute((*key, index), text) for index, text in enumerate(value)]


def _path(key: tuple[str, str], value: str) -> str:
    if not value:
        raise complaints.Complaint(key, "is empty (needed: a path)")
    if key == ("model", "path") and not paths.looks_like_path(value):
        return value
    return _absolute(key, value)


def _absolute(key: tuple[str | int, ...], value: str) -> str:
    try:
        return str(paths.absolute(value))
    except KeyError as error:
        raise complaints.Complaint(
            key, f"${error.args[0]} is not set (found {complaints.found(value)})", "Set it, or write the path out."
        ) from None


def _check(recipe: Recipe) -> None:
    """Raise for values that are each allowed and together, or in this program, are not."""
    data, train = recipe.data, recipe.train
    if isinstance(data.eval, (int, float)) and not 0 <= data.eval <= 0.5:
        raise complaints.Complaint(("data", "eval"), f"out of range (found {data.eval}; needed a share from 0 to 0.5, or files)")
    for name in data.columns or {}:
        if name not in COLUMNS:
            near = paths.nearest(name, list(COLUMNS))
            todo = f"Did you mean {near}?" if near else f"On the left stands one of {', '.join(COLUMNS)}; on the right the file's own name."
            raise complaints.Complaint(("data", "columns", name), "no such column", todo, of_key=True)
    if data.persona is not None and data.format not in ("auto", "transcript"):
        raise complaints.Complaint(("data", "persona"), f"is for transcripts (found data.format: {data.format})", "Remove one of them.")
    if data.shared_prompt is True and data.packing == "none":
        what = "is true, and padded records have no row in common (found data.packing: none)"
        raise complaints.Complaint(("data", "shared_prompt"), what, "Set data.packing to batch or fill.")
    try:
        " ".encode(data.encoding or "utf-8")
    except (LookupError, ValueError):
        what = f"no such encoding (found {complaints.found(data.encoding)}; needed, for example, utf-8, gb18030, utf-16)"
        raise complaints.Complaint(("data", "encoding"), what) from None
    if train.hub_token is not None:
        raise complaints.Complaint(
            ("train", "hub_token"), "a secret does not belong in a recipe", "Remove it and set HF_TOKEN, or run hf auth login."
        )
    if train.fp16 or train.fp16_full_eval:
        key = "fp16" if train.fp16 else "fp16_full_eval"
        raise complaints.Complaint(("train", key), "float16 overflows in this model's states and gives NaN", "Use bf16, or neither.")
    if train.max_steps == 0:
        raise complaints.Complaint(("train", "max_steps"), "out of range (found 0; needed -1 or at least 1)")
    if 0 < train.max_steps < train.warmup_steps:
        what = f"more than there are steps (found {train.warmup_steps}; needed at most train.max_steps, {train.max_steps})"
        raise complaints.Complaint(("train", "warmup_steps"), what)
    if train.activation_checkpointing is not None:
        if "gradient_checkpointing" in train.model_fields_set and train.activation_checkpointing != train.gradient_checkpointing:
            raise complaints.Complaint(
                ("train", "activation_checkpointing"), "contradicts gradient_checkpointing, its other name", "Keep one."
            )
        train.gradient_checkpointing = train.activation_checkpointing
    _check_output(recipe)


def _check_output(recipe: Recipe) -> None:
    output = Path(recipe.train.output_dir)
    sources = [recipe.data.train] if isinstance(recipe.data.train, str) else list(recipe.data.train)
    taken = {Path(source) for source in sources} | {Path(source).parent for source in sources if Path(source).is_file()}
    reason = ""
    if output == Path(output.anchor) or output in (Path.cwd(), paths.home()):
        reason = "is no folder for one run"
    elif recipe.model.path == str(output) or Path(recipe.model.path) in output.parents:
        reason = "lies in the model's folder"
    elif output in taken:
        reason = "is the folder of the data"
    elif any(re.fullmatch(r"checkpoint-\d+", part) for part in output.parts):
        reason = "lies in a checkpoint"
    elif output.exists() and not output.is_dir():
        reason = "is a file"
    elif beneath := next((parent for parent in output.parents if parent.is_file()), None):
        reason = f"lies below {beneath.name}, which is a file"
    if reason:
        raise complaints.Complaint(
            ("train", "output_dir"), f"{reason} (found {output})", "Name a folder of its own, for example output/first."
        )
