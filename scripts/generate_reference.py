"""Write docs/recipe.md, the keys of a recipe, from the docstrings and defaults in tnl/recipe/sections.py.

Run it after a change there: .venv/bin/python scripts/generate_reference.py
"""

from pathlib import Path
from typing import Any

from tnl.recipe.complaints import limits, needed
from tnl.recipe.fields import PEFT_VERSION, TRANSFORMERS_VERSION
from tnl.recipe.sections import SECTIONS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
HEAD = """# The keys of a recipe

Written by scripts/generate_reference.py from tnl/recipe/sections.py: do not edit.

A recipe is a YAML 1.2 file of five sections; those in `recipes/` are complete examples. Any value can be replaced on the command line
as `section.key=value`, the value read as YAML: `tnl train recipes/huanhuan-7b.yaml lora.r=16 data.eval=null`.
A key that does not exist, a value of the wrong type or out of range ends the command with exit code 2 before anything is loaded.
Paths are relative to the current folder; `~` and `$NAME` are replaced as a shell does.
"""
MORE = {
    "lora": f"Every other field of `peft.LoraConfig` ({PEFT_VERSION}) is taken by its own name. `lora: null` trains every weight.",
    "train": f"Every other field of `transformers.TrainingArguments` ({TRANSFORMERS_VERSION}) is taken by its own name; "
    "names that transformers 5 dropped (`evaluation_strategy`, `warmup_ratio` ...) are translated, with a line that says so.",
}


def main() -> None:
    """Rewrite the file in place."""
    TARGET.write_text(generate(), encoding="utf-8")


def generate() -> str:
    """Return the text of docs/recipe.md."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        parts += [f"## {name}\n", f"{MORE[name]}\n" if name in MORE else "", "| key | default | takes | what it is |", "|---|---|---|---|"]
        for key in section.__annotations__:
            field = section.model_fields[key]
            default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
            takes = ", ".join(part for part in (needed(field.annotation), limits(field.metadata)) if part)
            parts.append(f"| `{key}` | {default} | {takes} | {field.description} |".replace("->", "to"))
        parts.append("")
    return "\n".join(part for part in parts if part is not None).replace("\n\n\n", "\n\n")


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return '""' if value == "" else str(value)


if __name__ == "__main__":
    main()
