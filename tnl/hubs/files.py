"""What of a repository is fetched, and what is said of a hub that does not give it."""

import contextlib
import errno
import fnmatch
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnl.errors import ModelError, StorageError
from tnl.storage import DISK, digest, require_space, write_json

SETTINGS = ["*.json", "*.model"]
"""Config, tokenizer and the index of the weights: all that `tnl check` reads."""
WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]
"""Pickled ones are later read as tensors alone."""
UNWANTED = ["*.py", "*.pkl", "*.pt", "*.pth", "training_args.bin", "optimizer.bin", "*/*"]
DOUBLED = ["*.bin", "*.bin.index.json"]
"""What is left out where there are safetensors."""
PARTIAL = ("*.incomplete", "*.parallel_tmp*")
"""What the hubs' libraries call a file that has not come whole."""
CHECKED = ".tnl-checked.json"
"""What of a folder was held against a hub's SHA-256; a hub cannot send a file of that name."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
"""Names that mean one file of the folder on every system: no other is fetched."""
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
CONFIGS = ("config.json", "adapter_config.json")
FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO") if hasattr(errno, name)}
ENDPOINTS = {"huggingface": ("HF_ENDPOINT",), "modelscope": ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN")}
TOKENS = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


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
    sound = [file for file in listed if NAME.fullmatch(file.name)]
    doubled = DOUBLED if any(matches(file.name, ["*.safetensors"]) for file in sound) else []
    wanted = [*SETTINGS, *(WEIGHTS if weights else [])]
    return [file for file in sound if matches(file.name, wanted) and not matches(file.name, [*UNWANTED, *doubled])]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def literally(name: str) -> str:
    """The pattern that fits this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


class Checked:
    """The files of a folder that are what a hub lists. One is read for that once, and again when its time has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / CHECKED
        self.known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.known = found if isinstance(found, dict) else {}

    def holds(self, file: Remote) -> bool:
        """Whether a file is here, of its size and SHA-256: contents that changed on the hub may well have the old size."""
        path = self.folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if not file.sha256 or self.known.get(file.name) == [file.sha256, path.stat().st_mtime_ns]:
            return True
        if digest(path) != file.sha256:
            return False
        self.keep([file])
        return True

    def keep(self, checked: Sequence[Remote]) -> None:
        """Remember files that have just been found right."""
        found = {file.name: [file.sha256, (self.folder / file.name).stat().st_mtime_ns] for file in checked if file.sha256}
        self.known |= found
        if found:
            with contextlib.suppress(StorageError, OSError):  # a folder of somebody else's is read anew each time
                write_json(self.path, self.known)


def whole(folder: Path, weights: bool) -> bool:
    """Whether an earlier download is all here, as far as can be told without the hub."""
    if not any((folder / name).is_file() for name in CONFIGS):
        return False
    if not weights:
        return True
    for index in (folder / name for name in INDICES if (folder / name).is_file()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)
    return any(path for kind in WEIGHTS for path in folder.glob(kind))


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


def absent(repo: str, hub: str, sending: bool = False) -> ModelError:
    """The error for a name that the hub does not know, or does not show to a stranger."""
    if sending:
        what = f"{hub} has no such owner, or does not let you write there"
        return ModelError(repo, what, f"Check the name, and log in with a token that may write: {login(hub)}.")
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


def offline(repo: str) -> ModelError:
    """The error for what is not here, where the person has forbidden to ask for it."""
    what = "is not here in full, and HF_HUB_OFFLINE forbids asking huggingface for it"
    return ModelError(repo, what, "Unset HF_HUB_OFFLINE, or name a local folder.")


def public_already(repo: str, hub: str) -> ModelError:
    """The error for an upload that would be seen by everybody though that was not asked for."""
    what = f"is on {hub} already and everybody can see it (needed: a private repository, or your consent)"
    return ModelError(repo, what, "Give --public to upload it all the same, or name another repository.")


def unfinished(repo: str, hub: str, error: BaseException) -> ModelError:
    """The error for an upload of which a part is there."""
    count = re.search(r"(\d+) file\(s\) failed", str(error))
    why = f"{count.group(1)} files were not taken; the lines above say why" if count else reason(error)
    todo = f"Repeat the command, which writes over what is there, or try --hub {other(hub)}."
    return ModelError(repo, f"the upload to {hub} ended halfway ({why})", todo)


def garbled(repo: str, hub: str, error: BaseException) -> ModelError:
    """The error for an answer that is none of this hub's."""
    todo = f"A proxy or a login page may stand between: open {hub} in a browser, {mirror(hub)}, or name a local folder."
    return ModelError(repo, f"what came is no answer of {hub}'s ({reason(error)})", todo)


def unreachable(repo: str, hub: str, error: BaseException, sending: bool = False, status: int = 0) -> ModelError:
    """The error for everything that may be better next time. status: of HTTP, where the hub was reached."""
    what = f"{hub} answered with an error" if status else f"{hub} could not be reached"
    todo = f"Try again (what was fetched is kept), {mirror(hub)}, try {named(other(hub))}, or name a local folder."
    if sending:
        todo = f"Repeat the command, or try --hub {other(hub)}."
    return ModelError(repo, f"{what} ({reason(error)})", todo)


def reason(error: BaseException) -> str:
    """What went wrong, in one line of the system's or the library's; no password, no token, no signature of an address."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    system = re.search(r"\[Errno -?\d+\] [^\"'()]+", text)
    said = system.group().strip() if system else f"{type(error).__name__}: {text}"
    for pattern, shown in ((r"(?<=://)[^/@\s]+@", ""), (r"(?i)bearer\s+\S+", "..."), (r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1")):
        said = re.sub(pattern, shown, said)
    return said[:200]


def mirror(hub: str) -> str:
    """What to do about the address of a hub."""
    name = next((name for name in ENDPOINTS[hub] if os.environ.get(name)), None)
    if name is None:
        return f"set {ENDPOINTS[hub][0]} to a mirror"
    return f"check {name} (it is {re.sub(r'(?<=//)[^/@]+@', '', os.environ[name])})"


def require_token(hub: str) -> None:
    """Raise ModelError for a token that no request can carry, before a library shows it in an error of its own."""
    token = os.environ.get(TOKENS[hub], "")
    token = token.strip() if hub == "huggingface" else token  # as its library does
    if not re.fullmatch(r"[!-~]*", token):
        what = "holds a space, a line break or a letter that no token has"
        raise ModelError(TOKENS[hub], what, f"Set it anew (it is not shown here), or unset it and log in: {login(hub)}.")


def of_disk(error: BaseException | None) -> OSError | None:
    """The error of this machine's disk that a library's error comes from; None where it is one of the net."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or (error.errno in DISK and isinstance(error.filename, (str, Path)))):
            return error
        error = error.__cause__ or error.__context__
    return None


def other(hub: str) -> str:
    """The hub that may have it instead."""
    return "modelscope" if hub == "huggingface" else "huggingface"


def named(hub: str) -> str:
    """How each caller can name a hub."""
    return f"{hub} (model.hub: {hub} in a recipe, else --hub {hub})"


def login(hub: str) -> str:
    """What makes a hub know a person."""
    return "hf auth login" if hub == "huggingface" else "modelscope login --token TOKEN"
