"""Where a model's folder is: on this machine, in the package, or fetched through the hubs' own libraries. Code is never fetched."""

from pathlib import Path
from typing import Literal

from tnl import paths
from tnl.errors import ModelError, RecipeError
from tnl.hubs import huggingface, modelscope
from tnl.storage import storage

Hub = Literal["huggingface", "modelscope"]
HUBS = {"huggingface": huggingface, "modelscope": modelscope}
DEMO = Path(__file__).parent / "demo" / "base"


def run(repo: str, hub: Hub = "huggingface", revision: str | None = None, out: Path | None = None) -> None:
    """Download a model and print where it lies."""
    require_repository(repo)
    folder = download(repo, hub=hub, revision=revision, out=out)
    print(folder)
    print(
        f"Talk to it: tnl chat {paths.quoted(folder)}"
        if (folder / "adapter_config.json").is_file()
        else f"Write in a recipe: model.path: {folder}"
    )


def resolve(path: str, hub: Hub = "huggingface", revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a model. A local path never touches the net. Raises ModelError.

    path: a folder, owner/name of a repository (fetched, or taken from the cache), or demo, the base that comes with tnl.
    weights: False fetches config and tokenizer alone.
    """
    if "://" in path:
        raise ModelError(path.rpartition("@")[2], *paths.address(path))
    if path == "demo":
        if not DEMO.is_dir():
            raise ModelError(DEMO, "the demo base is missing from this installation", "Install tnl again.")
        return DEMO
    if not paths.looks_like_path(path):
        try:
            return download(path, hub=hub, revision=revision, weights=weights)
        except ModelError as error:
            near = paths.near(Path(path))
            if near is None:
                raise
            raise ModelError(error.where, error.what, f"Did you mean the folder {near}?") from None
    try:
        folder = paths.existing(path, ModelError)
    except ModelError as error:
        if "/" in path or error.todo.startswith("Did you mean"):
            raise
        raise ModelError(path, error.what, "Name a folder, a repository (owner/name), or demo, the base that comes with tnl.") from None
    if not folder.is_dir():
        holds = (folder.parent / "config.json").is_file()
        todo = f"Name {folder.parent}." if holds else "Name the folder of a model or of a run, for example output/huanhuan-7b."
        raise ModelError(path, "is a file (needed: a folder)", todo)
    return folder


def require_repository(repo: str) -> None:
    """Raise RecipeError for a word that is no owner/name."""
    if "://" in repo:
        raise RecipeError(repo.rpartition("@")[2], *paths.address(repo))
    if repo == "demo" or not paths.is_repository(repo):
        what = "comes with tnl and needs no download" if repo == "demo" else "is no repository (needed: owner/name)"
        raise RecipeError(repo, what, "A folder is used where it is: model.path: FOLDER in a recipe.")


def download(repo: str, *, hub: Hub = "huggingface", revision: str | None = None, out: Path | None = None, weights: bool = True) -> Path:
    """Fetch a repository's weights, config and tokenizer and return their folder; what is there already is not fetched again.

    out: the folder; without it the hub's cache. weights: False leaves them there. Raises ModelError (no such repository or
    revision, no weights, no network, wrong contents), RecipeError (the hub's library is not installed), StorageError (disk).
    """
    if hub not in HUBS:  # an adapter's file may name any
        raise ModelError(repo, f"is said to lie on {hub!r}, a hub that tnl does not know", f"Needed: {' or '.join(HUBS)}.")
    with storage(out or paths.home()):
        return HUBS[hub].fetch(repo, revision, out, weights)
