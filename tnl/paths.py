"""What a word for a file means: a path or a repository, and what stands beside a path that is missing."""

import difflib
import os
import re
from pathlib import Path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def expand(text: str) -> str:
    """Replace ~, $NAME and ${NAME} as a shell does. Raises KeyError with the name of a variable that is not set."""
    expanded = os.path.expandvars(text)
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise KeyError(unset.group(1))
    # Path.expanduser raises where there is no such person; a folder may well be called ~x
    return os.path.expanduser(expanded)


def absolute(text: str) -> Path:
    """Return the absolute path of a word, relative to the current folder; symlinks are left as they are."""
    # Path.resolve would follow symlinks, Path.absolute keeps ".."
    return Path(os.path.abspath(expand(text)))


def home() -> Path:
    """Return the person's folder; the current one where the machine knows of none."""
    return absolute("~")


def is_repository(text: str) -> bool:
    """Whether a word is written as a hub's owner/name."""
    return _REPOSITORY.fullmatch(text) is not None


def looks_like_path(text: str) -> bool:
    """Whether a word names a place on this machine rather than a hub's owner/name.

    It does where it exists, where its parent folder exists, and where it is written as only a path is:
    /x, ./x, ../x, ~/x, a\\b, C:\\x, x, a/b/c.
    """
    if not is_repository(text):
        return True
    path = Path(text)
    return path.exists() or path.parent.is_dir()


def nearest(name: str, names: list[str]) -> str | None:
    """Return the one of names that was probably meant, or None."""
    lowered = {candidate.lower(): candidate for candidate in reversed(names)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def missing(path: Path, *, named: bool = False) -> tuple[str, str]:
    """Say which part of a path does not exist and what stands in its place: (what is wrong, what to do).

    named: the error begins with the path itself, so it is not said again.
    """
    present = path
    while not present.exists() and present != present.parent:
        absent, present = present, present.parent
    kind = "file" if path.suffix else "folder"
    if not present.is_dir():
        return f"{present} is a file, not a folder", "Name a path that exists."
    try:
        siblings = sorted(entry.name for entry in present.iterdir() if not entry.name.startswith("."))
    except OSError:
        siblings = []
    near = nearest(absent.name, siblings)
    what = f"no such {kind if absent == path else 'folder'}"
    if not named or absent != path:
        what += f": {absent}"
    if near:
        differs = " (only the case differs)" if near.lower() == absent.name.lower() else ""
        return what, f"Did you mean {present / near}{differs}?"
    if siblings:
        shown = ", ".join(siblings[:5]) + (f" and {len(siblings) - 5} more" if len(siblings) > 5 else "")
        return f"{what} ({present} has {shown})", "Name one that exists."
    return f"{what} ({present} is empty)", "Name one that exists."
