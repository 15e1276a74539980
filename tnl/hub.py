"""Where a model's folder is: on this machine, in the package, or fetched through the hubs' own libraries. Code is never fetched."""

import importlib
import os
from pathlib import Path
from typing import Any, Literal

from tnl import paths
from tnl.errors import ModelError, RecipeError, StorageError
from tnl.storage import require_space, storage

Hub = Literal["huggingface", "modelscope"]
WANTED = ["*.json", "*.model", "*.safetensors", "pytorch_model*.bin"]
"""Weights (pickled ones are later read as tensors alone), their index, config and tokenizer."""
UNWANTED = ["*.py", "*.pkl", "*.pt", "*.pth", "training_args.bin", "optimizer.bin", "*/*"]
DOUBLED = ["*.bin", "*.bin.index.json"]
"""What is left out where there are safetensors."""
DEMO = Path(__file__).parent / "demo" / "base"


def run(repo: str, hub: str = "huggingface", revision: str | None = None, out: Path | None = None) -> None:
    """Download a model and print where it lies."""
    if hub not in ("huggingface", "modelscope"):
        raise RecipeError("command line", f"--hub is {hub!r} (needed: huggingface or modelscope)")
    folder = download(repo, hub=hub, revision=revision, out=out)  # type: ignore[arg-type]
    print(folder)
    print(f"Write in a recipe: model.path: {folder}")


def resolve(path: str, hub: Hub = "huggingface", revision: str | None = None) -> Path:
    """Return the folder of a model. A local path never touches the net. Raises ModelError.

    path: a folder, owner/name of a repository (fetched, or taken from the cache), or demo, the base that comes with tnl.
    """
    if path == "demo":
        if not DEMO.is_dir():
            raise ModelError(DEMO, "the demo base is missing from this installation", "Install tnl again.")
        return DEMO
    if not paths.looks_like_path(path):
        return download(path, hub=hub, revision=revision)
    try:
        folder = paths.absolute(path)
    except KeyError as error:
        raise ModelError(path, f"${error.args[0]} is not set", "Set it, or write the path out.") from None
    if not folder.exists():
        raise ModelError(path, *paths.missing(folder, named=True))
    if not folder.is_dir():
        raise ModelError(path, "is a file (needed: the model's folder)", f"Name {folder.parent}.")
    return folder


def download(repo: str, *, hub: Hub = "huggingface", revision: str | None = None, out: Path | None = None) -> Path:
    """Fetch a repository's weights, config and tokenizer and return their folder; what is there already is not fetched again.

    out: the folder; without it the hub's cache. Raises ModelError (no such repository, no network), RecipeError (the hub's
    library is not installed), StorageError (disk).
    """
    fetch = _huggingface if hub == "huggingface" else _modelscope
    with storage(out or paths.home()):
        folder = fetch(repo, revision, out)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else []) or "nothing of use"
        raise ModelError(repo, f"has no weights (found {found}; needed *.safetensors or pytorch_model*.bin)", "Is it a model's repository?")
    return folder


def _huggingface(repo: str, revision: str | None, out: Path | None) -> Path:
    if os.environ.get("HF_ENDPOINT"):
        # the data plane of xet goes past a mirror; this is read when huggingface_hub is imported
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    # a recipe error or --help must not wait for an HTTP client
    import huggingface_hub
    from huggingface_hub import errors

    ignored = [*UNWANTED, *_preflight(huggingface_hub, repo, revision, out)]
    options: dict[str, Any] = {"repo_id": repo, "revision": revision, "allow_patterns": WANTED, "ignore_patterns": ignored}
    if out is not None:
        options["local_dir"] = out
    try:
        try:
            return Path(huggingface_hub.snapshot_download(**options))
        except errors.LocalEntryNotFoundError as error:
            if type(error).__name__ != "IncompleteSnapshotError":
                raise
            # no network, and the cache lacks what was left out on purpose: pickles beside safetensors
            folder = Path(huggingface_hub.snapshot_download(**{**options, "ignore_patterns": [*UNWANTED, *DOUBLED]}))
            if not any(folder.glob("*.safetensors")):
                raise
            return folder
    except errors.RevisionNotFoundError:
        raise ModelError(repo, f"has no revision {revision} on huggingface", "Leave model.revision out, or name a commit.") from None
    except errors.GatedRepoError:
        raise ModelError(repo, "must be asked for on huggingface", "Accept its terms there and run hf auth login.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise _absent(repo, "huggingface", "modelscope") from None
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repo, "huggingface", error) from error
    except Exception as error:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno is not None and not _is_network(error)):
            raise
        raise _unreachable(repo, "huggingface", error) from error


def _preflight(library: Any, repo: str, revision: str | None, out: Path | None) -> list[str]:
    """Check that what is still to be fetched has room, and return the patterns of files that are not needed: pickles beside safetensors."""
    try:
        info = library.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except Exception:
        return []  # no network, or no such repository: the download itself takes the cache or says which
    names = {file.rfilename: file.size or 0 for file in info.siblings}
    doubled = DOUBLED if any("/" not in name and name.endswith(".safetensors") for name in names) else []
    wanted = list(library.utils.filter_repo_objects(names, allow_patterns=WANTED, ignore_patterns=[*UNWANTED, *doubled]))
    if out is None:
        absent = [name for name in wanted if not isinstance(library.try_to_load_from_cache(repo, name, revision=info.sha), str)]
    else:
        absent = [name for name in wanted if not (out / name).is_file()]
    require_space(out or Path(library.constants.HF_HUB_CACHE), sum(names[name] for name in absent))
    return doubled


def _modelscope(repo: str, revision: str | None, out: Path | None) -> Path:
    try:
        modelscope: Any = importlib.import_module("modelscope")
    except ImportError:
        todo = "Install it: pip install 'tnl[modelscope]'."
        raise RecipeError("", "the hub modelscope needs the package modelscope, which is not installed", todo) from None
    options: dict[str, Any] = {"revision": revision, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    if out is not None:
        options["local_dir"] = str(out)
    try:
        return Path(modelscope.snapshot_download(repo, **options))
    except Exception as error:
        if type(error).__name__ in ("NotExistError", "InvalidParameter") or "404" in str(error):
            raise _absent(repo, "modelscope", "huggingface") from None
        if isinstance(error, OSError) and error.errno is not None and not _is_network(error):
            raise
        raise _unreachable(repo, "modelscope", error) from error


def _absent(repo: str, hub: str, other: str) -> ModelError:
    beside = ", ".join(sorted(entry.name for entry in Path.cwd().iterdir() if entry.is_dir() and not entry.name.startswith("."))[:5])
    local = f"; this folder has {beside}" if beside else ""
    return ModelError(repo, f"no such folder here and no such repository on {hub}{local}", f"Check the name, or try {_other(other)}.")


def _other(hub: str) -> str:
    """Name another hub as each caller can: chat, generate and serve fetch from huggingface, or take the folder that download printed."""
    return f"{hub} (model.hub: {hub} in a recipe, else tnl download REPO --hub {hub} and the folder it prints)"


def _unreachable(repo: str, hub: str, error: BaseException) -> ModelError:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    mirror = "set HF_ENDPOINT to a mirror, " if hub == "huggingface" else ""
    other = _other("modelscope" if hub == "huggingface" else "huggingface")
    todo = f"Try again (what was fetched is kept), {mirror}try {other}, or name a local folder."
    return ModelError(repo, f"{hub} could not be reached ({reason})", todo)


def _is_network(error: OSError) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError)) or not isinstance(error.filename, (str, Path))
