"""What of a repository is fetched, and what is said of a hub that does not give it."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tnl.errors import ModelError
from tnl.storage import require_space

SETTINGS = ["*.json", "*.model"]
"""Config, tokenizer and the index of the weights: all that `tnl check` reads."""
WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]
"""Pickled ones are later read as tensors alone."""
UNWANTED = ["*.py", "*.pkl", "*.pt", "*.pth", "training_args.bin", "optimizer.bin", "*/*"]
DOUBLED = ["*.bin", "*.bin.index.json"]
"""What is left out where there are safetensors."""
PARTIAL = ("*.incomplete", "*.parallel_tmp*")
"""What the hubs' libraries call a file that has not come whole."""


@dataclass(frozen=True)
class Remote:
    """A file as a hub lists it."""

    name: str
    size: int = 0
    sha256: str | None = None
    git: str | None = None
    """Git's SHA-1 of the contents; hubs give that of small files instead."""


def select(listed: Sequence[Remote], weights: bool = True) -> list[Remote]:
    """The files that are fetched: with weights False only config, tokenizer and index; pickles beside safetensors stay there."""
    doubled = DOUBLED if any(matches(file.name, ["*.safetensors"]) and "/" not in file.name for file in listed) else []
    wanted = [*SETTINGS, *(WEIGHTS if weights else [])]
    return [file for file in listed if matches(file.name, wanted) and not matches(file.name, [*UNWANTED, *doubled])]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def literally(name: str) -> str:
    """The pattern that fits this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def partial_bytes(folder: Path) -> int:
    """Bytes of files that have come in part: they need not be fetched again."""
    return sum(path.stat().st_size for pattern in PARTIAL for path in folder.rglob(pattern) if path.is_file())


def require_room(folder: Path, missing: Sequence[Remote], partly: bool = True) -> None:
    """Raise StorageError unless what is missing fits the disk; partly: what has come of it in part lies in the folder."""
    came = partial_bytes(folder) if partly else 0
    require_space(folder, sum(file.size for file in missing) - came, "Free some space, or name a folder on another disk (--out).")


def without_weights(repo: str, names: Sequence[str]) -> ModelError:
    """The error for a repository that holds something else."""
    found = ", ".join(sorted(names)[:5]) or "nothing of use"
    return ModelError(repo, f"has no weights (found {found}; needed *.safetensors or pytorch_model*.bin)", "Is it a model's repository?")


def absent(repo: str, hub: str) -> ModelError:
    """The error for a name that the hub does not know, or does not show to a stranger."""
    beside = ", ".join(sorted(entry.name for entry in Path.cwd().iterdir() if entry.is_dir() and not entry.name.startswith("."))[:5])
    local = f"; this folder has {beside}" if beside else ""
    what = f"no such folder here and no such repository on {hub}, or one that needs a login{local}"
    return ModelError(repo, what, f"Check the name, log in ({login(hub)}), or try {named(other(hub))}.")


def no_revision(repo: str, hub: str, revision: str | None) -> ModelError:
    """The error for a commit, tag or branch that is not there."""
    return ModelError(repo, f"has no revision {revision} on {hub}", "Leave model.revision out, or name a commit.")


def refused(repo: str, hub: str, why: str) -> ModelError:
    """The error for a hub that knows who asks and does not let them."""
    return ModelError(repo, f"{hub} refuses it ({why})", f"Accept the repository's terms there, and log in: {login(hub)}.")


def busy(repo: str, hub: str, seconds: float | None, sending: bool = False) -> ModelError:
    """The error for a hub that has been asked too often."""
    wait = f", and again in {seconds:.0f} s" if seconds else ""
    kept = "" if sending else " (what was fetched is kept)"
    return ModelError(repo, f"{hub} has been asked too often (429{wait})", f"Wait, then repeat{kept}; {login(hub)} helps.")


def wrong_hash(repo: str, hub: str, name: str) -> ModelError:
    """The error for contents that are not what the hub lists; the file has been deleted."""
    what = f"{name} came with other contents than {hub} lists (its checksum differs), so it was deleted"
    return ModelError(repo, what, "Repeat the command; if it stays so, a mirror or a proxy changes files.")


def unreachable(repo: str, hub: str, error: BaseException, sending: bool = False) -> ModelError:
    """The error for everything that may be better next time."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = f"{type(error).__name__}: {first[:200]}"
    mirror = "HF_ENDPOINT" if hub == "huggingface" else "MODELSCOPE_ENDPOINT"
    todo = f"Try again (what was fetched is kept), set {mirror} to a mirror, try {named(other(hub))}, or name a local folder."
    if sending:
        todo = f"Try again, or try --hub {other(hub)}."
    return ModelError(repo, f"{hub} could not be reached ({reason})", todo)


def other(hub: str) -> str:
    """The hub that may have it instead."""
    return "modelscope" if hub == "huggingface" else "huggingface"


def named(hub: str) -> str:
    """How each caller can name a hub: chat, generate and serve fetch from huggingface, or take the folder that download printed."""
    return f"{hub} (model.hub: {hub} in a recipe, else tnl download REPO --hub {hub} and the folder it prints)"


def login(hub: str) -> str:
    """What makes a hub know a person."""
    return "hf auth login" if hub == "huggingface" else "modelscope login --token TOKEN"
