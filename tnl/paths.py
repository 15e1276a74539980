"""What a word for a file means: a path or a repository, and what stands beside a path that is missing."""

import contextlib
import difflib
import os
import re
import shlex
from pathlib import Path

from tnl.errors import TnlError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/(?!\.+$)[\w.-]+")


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


def shown(place: object) -> str:
    """A path, or a place in a file, as seen from the current folder: what lies below it is relative."""
    return str(place).removeprefix(f"{os.getcwd()}{os.sep}")


def nearby(text: str) -> str:
    """A line in which the paths below the current folder are as seen from there."""
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone
        text = text.replace(f"{os.getcwd()}{os.sep}", "")
    return text


def quoted(path: Path) -> str:
    """The same for a command that a person copies: in quotes where a shell wants them, which it does not for Chinese."""
    text = shown(path)
    if not re.search(r"[\s'\"$&;()<>|*?`!#]", text):
        return text
    return shlex.quote(text) if re.search(r"[\"$`!]", text) else f'"{text}"'


def home() -> Path:
    """Return the person's folder; the current one where the machine knows of none."""
    return absolute("~")


def is_repository(text: str) -> bool:
    """Whether a word is written as a hub's owner/name."""
    return _REPOSITORY.fullmatch(text) is not None


def address(url: str) -> tuple[str, str]:
    """What is wrong with an address in the place of a repository, and what to write: (what, what to do)."""
    found = re.fullmatch(r"\w+://[^/]+/(?:models/)?([\w.-]+/[\w.-]+).*", url)
    what = "is an address (needed: owner/name of a repository)"
    return what, f"Write {found[1]}." if found else "Write owner/name alone."


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
    """Return the one of names that was probably meant, or None: the first that goes on from it (adamw: adamw_torch), or the most alike."""
    lowered = {candidate.lower(): candidate for candidate in reversed(names)}
    longer = next((candidate for candidate in names if candidate.lower().startswith(f"{name.lower()}_")), None)
    if longer and name.lower() not in lowered:
        return longer
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def near(path: Path) -> Path | None:
    """Return what is there under nearly that path: its name in a folder whose name is nearly that of its parent; or None."""
    parent = absolute(str(path)).parent
    if not parent.parent.is_dir():
        return None
    close = nearest(parent.name, [entry.name for entry in parent.parent.iterdir() if (entry / path.name).exists()])
    return parent.parent / close / path.name if close else None


def is_recipe(path: Path) -> bool:
    """Whether RECIPE_OR_RUN is a recipe: a file, or the name of one."""
    return path.is_file() or (not path.is_dir() and path.suffix.lower() in (".yaml", ".yml"))


def existing(word: str | Path, kind: type[TnlError]) -> Path:
    """Return the absolute path of what is there under that word. Raises an error of that kind, which begins with the word."""
    try:
        path = absolute(str(word))
    except KeyError as error:
        raise kind(word, f"${error.args[0]} is not set", "Set it, or write the path out.") from None
    if not path.exists():
        raise kind(word, *missing(path))
    return path


def missing(path: Path) -> tuple[str, str]:
    """Say which part of a path does not exist and what stands in its place: (what is wrong, what to do), the path itself named before."""
    present = path = absolute(str(path))
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
    if absent != path:
        what += f": {absent}"
    if near:
        differs = " (only the case differs)" if near.lower() == absent.name.lower() else ""
        return what, f"Did you mean {present / near}{differs}?"
    if siblings:
        shown = ", ".join(siblings[:5]) + (f" and {len(siblings) - 5} more" if len(siblings) > 5 else "")
        return f"{what} ({present} has {shown})", "Name one that exists."
    return f"{what} ({present} is empty)", "Name one that exists."
