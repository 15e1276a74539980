"""YAML 1.2 with a place for every key: plain values, and where each stands. Tags, duplicate keys and references that circle are refused."""

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tnl.errors import RecipeError

Key = tuple[str | int, ...]
MAX_NODES = 20_000


@dataclass
class Text:
    """The values of a YAML text, and for the path of every key where the key and where its value stand."""

    name: str
    values: Any = None
    keys: dict[Key, str] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    empty: set[Key] = field(default_factory=set)  # keys with nothing behind them, as against null
    nodes: int = 0


def parse(text: str, name: str) -> Text:
    """Read one YAML document. Raises RecipeError with line and column; name stands for the file in its message."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        result = Text(name)
        if root is not None:
            result.values = _value(root, (), result, yaml)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{_line(mark)}" if mark else name
        raise RecipeError(where, f"not YAML: {error.problem or error.context}", _advice(text, mark)) from None
    except YAMLError as error:
        character = getattr(error, "character", None)
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        what = f"not YAML: the character {chr(character)!a} may not stand in it" if isinstance(character, int) else "not YAML"
        raise RecipeError(f"{name}:line {line}", what, "Remove it.") from None
    except RecursionError:
        raise RecipeError(name, "lists or mappings stand too deep in each other (needed: at most a few levels)", "Flatten them.") from None
    return result


def _value(node: Node, path: Key, result: Text, yaml: YAML) -> Any:
    result.nodes += 1
    if result.nodes > MAX_NODES or len(path) > 20:
        raise RecipeError(
            f"{result.name}:{_line(node.start_mark)}", "too much for a recipe (at most 20,000 values, 20 deep)", "Shorten it."
        )
    result.places.setdefault(path, f"{result.name}:{_line(node.start_mark)}")
    tag = str(node.tag)
    if isinstance(node, MappingNode) and tag.endswith(":map"):
        return _mapping(node, path, result, yaml)
    if isinstance(node, SequenceNode) and tag.endswith(":seq"):
        return [_value(child, (*path, index), result, yaml) for index, child in enumerate(node.value)]
    if isinstance(node, ScalarNode) and re.fullmatch(r"tag:yaml\.org,2002:(str|int|float|bool|null)", tag):
        if node.value == "" and tag.endswith("null"):
            result.empty.add(path)
        return yaml.constructor.construct_object(node)
    if isinstance(node, ScalarNode) and tag == "tag:yaml.org,2002:timestamp":
        return node.value  # a date in a recipe is the text as it was written
    raise RecipeError(f"{result.name}:{_line(node.start_mark)}", f'the tag "{tag}" is not allowed in a recipe', "Write plain values.")


def _mapping(node: MappingNode, path: Key, result: Text, yaml: YAML) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{result.name}:{_line(key_node.start_mark)}"
        if not isinstance(key_node, ScalarNode) or str(key_node.tag).endswith(":merge"):
            raise RecipeError(where, "a key must be a plain word (<< and lists as keys are not allowed)", "Write every key out.")
        key = key_node.value
        if key in values:
            raise RecipeError(where, f'the key "{key}" stands twice (first at {result.keys[(*path, key)].partition(":")[2]})', "Keep one.")
        result.keys.setdefault((*path, key), where)
        values[key] = _value(value_node, (*path, key), result, yaml)
    return values


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _advice(text: str, mark: Any) -> str:
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "\t" in line:
        return "Indent with spaces, not tabs."
    if re.search(r":\s.*:\s", line):
        return "Put quotes around a value that holds a colon."
    return f"Mend this line: {line.strip()[:60]}" if line.strip() else "Close every quote and bracket."
