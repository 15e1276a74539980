"""What the documents promise is there: files, commands, recipes, targets; and both READMEs say the same."""

import re
from pathlib import Path

import pytest
import typer

from tnl import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tnl").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_recipes_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:^|`|\$ )tnl ([a-z]+)", text, re.MULTILINE))
    assert commands <= set(cli.TARGETS), commands - set(cli.TARGETS)
    for recipe in re.findall(r"recipes/[\w.-]+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_lists_every_command_and_no_other() -> None:
    """In the order of `tnl --help`; the examples name recipes and make targets, so that the test above has something to hold."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `tnl ([a-z]+)", text, re.MULTILINE) == list(cli.TARGETS)
    assert len(set(re.findall(r"recipes/[\w.-]+\.yaml", text))) >= 5 and re.search("`make [a-z]", text)


def test_the_readmes_have_the_same_commands_tables_and_sections() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))

    def shape(text: str) -> tuple[list[str], int, int, set[str]]:
        code = [re.sub(r"\s+#.*", "", line) for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        return code, text.count("\n## "), text.count("\n|"), set(re.findall(r"recipes/[\w.-]+|`tnl [a-z]+", text))

    assert shape(english) == shape(chinese)


def test_the_options_of_serve_that_the_readme_names_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Behind OpenAI's API")[2].partition("\n## ")[0]
    options = typer.main.get_command(cli.app).commands["serve"].params  # type: ignore[attr-defined]
    there = {word for option in options for word in option.opts}
    named = set(re.findall(r"--[a-z][a-z-]+", section))
    assert len(named) >= 8 and named <= there, named - there


def test_what_the_readme_says_of_the_exit_codes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    from tnl import errors

    for kind in (
        errors.RecipeError,
        errors.DataError,
        errors.ModelError,
        errors.NumbersError,
        errors.StorageError,
        errors.MemoryBudgetError,
    ):
        assert re.search(rf"\b{kind.exit_code} [a-z]", text), kind
