"""Where a model's folder is: on this machine, in the package, or fetched through the hubs' own libraries. Code is never fetched."""

from pathlib import Path
from typing import Literal

from tnl import paths
from tnl.errors import ModelError
from tnl.hubs import huggingface, modelscope
from tnl.storage import storage

Hub = Literal["huggingface", "modelscope"]
HUBS = {"huggingface": huggingface, "modelscope": modelscope}
DEMO = Path(__file__).parent / "demo" / "base"


def run(repo: str, hub: Hub = "huggingface", revision: str | None = None, out: Path | None = None) -> None:
    """Download a model and print where it lies."""
    folder = download(repo, hub=hub, revision=revision, out=out)
    print(folder)
    print(f"Talk to it: tnl chat {folder}" if (folder / "adapter_config.json").is_file() else f"Write in a recipe: model.path: {folder}")


def resolve(path: str, hub: Hub = "huggingface", revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a model. A local path never touches the net. Raises ModelError.

    path: a folder, owner/name of a repository (fetched, or taken from the cache), or demo, the base that comes with tnl.
    weights: False fetches config and tokenizer alone.
    """
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
    folder = paths.existing(path, ModelError)
    if not folder.is_dir():
        raise ModelError(path, "is a file (needed: the model's folder)", f"Name {folder.parent}.")
    return folder


def download(repo: str, *, hub: Hub = "huggingface", revision: str | None = None, out: Path | None = None, weights: bool = True) -> Path:
    """Fetch a repository's weights, config and tokenizer and return their folder; what is there already is not fetched again.

    out: the folder; without it the hub's cache. weights: False leaves them there. Raises ModelError (no such repository or
    revision, no weights, no network, wrong contents), RecipeError (the hub's library is not installed), StorageError (disk).
    """
    if hub not in HUBS:  # an adapter's file may name any
        raise ModelError(repo, f"is said to lie on {hub!r}, a hub that tnl does not know", f"Needed: {' or '.join(HUBS)}.")
    with storage(out or paths.home()):
        return HUBS[hub].fetch(repo, revision, out, weights)
