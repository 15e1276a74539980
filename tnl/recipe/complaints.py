"""Words for what is wrong with a key of a recipe: what was found, what is needed, which name was probably meant."""

import math
import re
import types
import typing
from typing import Any

from tnl import paths
from tnl.errors import RecipeError
from tnl.recipe.old_names import SYNONYMS
from tnl.recipe.sections import SECTIONS, Strict
from tnl.recipe.yaml_text import Key, Text

_SECRET = re.compile(r"token|password|secret|api_?key", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf|sk|ghp|ms)[_-]\w{8,}|//[^/\s]+:[^/\s]+@")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null", Any: "a value"}
_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


class Complaint(Exception):
    """Something wrong at a key; at() says where that is."""

    def __init__(self, key: Key, what: str, todo: str = "", *, of_key: bool = False) -> None:
        super().__init__(what)
        self.key, self.what, self.todo, self.of_key = key, what, todo, of_key

    def at(self, text: Text, where: str = "") -> RecipeError:
        """Return the error that names line and column, or the command line, and the key."""
        return RecipeError(f"{where}: {dotted(self.key)}" if where else place(self.key, text, of_key=self.of_key), self.what, self.todo)


def place(key: Key, text: Text, *, of_key: bool = False) -> str:
    """Return file, line and column of a key's value (of_key: of the key itself), or of what is nearest above it, and the key."""
    first, second = (text.keys, text.places) if of_key else (text.places, text.keys)
    above, where = key, ""
    while not where and above:
        where, above = first.get(above) or second.get(above, ""), above[:-1]
    return f"{where or text.places.get((), text.name)}: {dotted(key)}"


def dotted(key: Key) -> str:
    """Return ("lora", "target_modules", 1) as lora.target_modules[1]."""
    name = ""
    for part in key:
        name += f"[{part}]" if isinstance(part, int) else (f".{part}" if name else part)
    return name


def found(value: Any, key: str = "") -> str:
    """Say what a value is, in a few words; secrets are masked."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value}"[:60]
    if isinstance(value, str):
        if _SECRET.search(key) or _SECRET_VALUE.search(value):
            return 'text "***"'
        return f'text "{value[:60]}{"..." if len(value) > 60 else ""}"'
    return "a list" if isinstance(value, list) else "keys below it" if isinstance(value, dict) else type(value).__name__


def unknown(key: tuple[str, ...]) -> Complaint:
    """Complain about a key that does not exist, and name the one that was probably meant; ("", x, ...) is a key outside all sections."""
    section, name = key[0], key[1]
    own = list(SECTIONS[section].model_fields) if section in SECTIONS else list(SECTIONS)
    elsewhere = [other for other, model in SECTIONS.items() if name in model.model_fields and other != section]
    everywhere = {field: other for other, model in SECTIONS.items() for field in model.model_fields}
    near = paths.nearest(name, own)
    if name in SECTIONS:
        todo = f"{name} is a section: write {name}.KEY=VALUE."
    elif name in SYNONYMS:
        todo = f"Here it is called {SYNONYMS[name]}."
    elif len(elsewhere) == 1 or (elsewhere and section == ""):
        todo = f"It belongs under {elsewhere[-1]}."
    elif near:
        todo = f"Did you mean {f'{section}.{near}' if section else near}?"
    else:
        far = paths.nearest(name, list(everywhere))
        ours = list(SECTIONS[section].__annotations__) if section in SECTIONS else own
        todo = f"Did you mean {everywhere[far]}.{far}?" if far else f"There are {', '.join(ours)}."
    return Complaint(tuple(part for part in key if part), "no such key", todo, of_key=True)


def invalid(section: str, problem: Any, values: dict[str, Any]) -> Complaint:
    """Complain about a value in pydantic's error, in words for people."""
    name = str(problem["loc"][0])
    info = SECTIONS[section].model_fields[name]
    if problem["type"] == "missing":
        return Complaint((section, name), "is missing", f"{_help(section, name)}")
    value = values[name]
    if isinstance(value, float) and not math.isfinite(value):
        what = f"not a finite number (found {found(value)})"
    elif problem["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        what = f"out of range (found {found(value, name)}; needed {limits(info.metadata)})"
    else:
        index = next((part for part in problem["loc"][1:] if isinstance(part, int)), None)
        inside = isinstance(value, (list, dict)) and index is not None
        shown = f"{found(value, name)} with {found(problem['input'], name)} in it" if inside else found(value, name)
        bounds = limits(info.metadata)
        what = f"not what is needed (found {shown}; needed {needed(info.annotation)}{', ' + bounds if bounds else ''})"
    return Complaint((section, name), what, _hint(section, name, value))


def needed(annotation: Any) -> str:
    """Say what a type admits: "a whole number or null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        alternatives = [one for one in arguments if not (one is int and float in arguments)]
        return " or ".join(needed(one) for one in alternatives)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) < 15 else f"one of {len(arguments)} names"
    if origin is list:
        return f"a list of {needed(arguments[0]).removeprefix('a ')}s"
    return "keys below it" if origin is dict else _WORDS.get(annotation, "another value")


def limits(metadata: list[Any]) -> str:
    """Say what range pydantic's constraints leave: "at least 1, below 10"."""
    bounds = [
        _LIMITS[name].format(f"{getattr(one, name):g}" if getattr(one, name) < 1e5 else f"{getattr(one, name):,}")
        for one in metadata
        for name in _LIMITS
        if hasattr(one, name)
    ]
    return ", ".join(bounds)


def _hint(section: str, name: str, value: Any) -> str:
    """Say how to mend a value that is nearly right, or what the key is for."""
    annotation = SECTIONS[section].model_fields[name].annotation
    options = [
        str(choice)
        for one in (annotation, *typing.get_args(annotation))
        if typing.get_origin(one) is typing.Literal
        for choice in typing.get_args(one)
    ]
    if isinstance(value, str):
        near = paths.nearest(value, options)
        if (section, name) == ("model", "dtype") and value in ("float16", "fp16", "half"):
            return "float16 overflows in this model: use bfloat16."
        if near:
            return f"Did you mean {near}?"
        if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.IGNORECASE) and str not in (annotation, *typing.get_args(annotation)):
            return "Write it without quotes."
        if value.lower() in ("yes", "no", "on", "off") and bool in (annotation, *typing.get_args(annotation)):
            return "YAML 1.2 knows true and false alone."
    return _help(section, name)


def _help(section: str, name: str) -> str:
    field: Any = typing.cast(type[Strict], SECTIONS[section]).model_fields[name]
    return f"It is: {field.description[0].lower()}{field.description[1:]}" if field.description else ""
