"""Where in a recipe something is wrong."""

from collections.abc import Callable

Where = str | Callable[[str], str]
"""The name of a recipe's file, or what says where a key of it stands (Recipe.where: line and column, or the command line)."""


def at(where: Where, key: str) -> str:
    """The place of section.key, as an error names it."""
    if callable(where):
        return where(key)
    return f"{where}:{key}" if where else key
