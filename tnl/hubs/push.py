"""`tnl push`: the result of a run into a repository of a hub, with a model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tnl import paths
from tnl.errors import ModelError, RecipeError
from tnl.hub import HUBS, require_hub
from tnl.hubs import card
from tnl.recipe.load import load
from tnl.run_dir import RunDir
from tnl.storage import seal, storage, verify, write_json, write_text

CONFIG, METADATA = "adapter_config.json", "tnl.json"


def run(run: Path, repo: str, hub: str = "huggingface", public: bool = False, base: str | None = None) -> None:
    """Upload a finished run's adapter (without LoRA: its model) and print the address.

    base: owner/name of the base there, where the run trained on a local folder. The repository is private unless public is set.
    Raises ModelError (no finished run, damaged files, the hub), RecipeError, StorageError.
    """
    require_hub(hub)
    if not paths.is_repository(repo):
        raise RecipeError("command line", f"REPO is {repo!r} (needed: owner/name)", "Write, for example, me/huanhuan.")
    work = RunDir(paths.existing(run, ModelError))
    result = result_of(work)
    recipe = load(work.recipe)
    named, local = base or recipe.model.path, False
    if base is None and recipe.model.path != "demo" and paths.looks_like_path(recipe.model.path):
        named, local = Path(recipe.model.path).name, True
    with tempfile.TemporaryDirectory() as aside, storage(Path(aside)):
        folder = Path(aside) / "push"
        shutil.copytree(result, folder, ignore=shutil.ignore_patterns(".*"))
        rename_base(folder, named, hub if base else recipe.model.hub)
        seal(folder, None)
        # after the seal: a card is mended on the hub's page
        write_text(folder / "README.md", card.write(work, repo, named, (folder / CONFIG).is_file()))
        if work.plot.is_file():
            shutil.copy(work.plot, folder / work.plot.name)
        address = HUBS[hub].push(repo, folder, not public, f"tnl push of {work.path.name}")
    if local:
        print(f"its base is called {named} there, which nobody can fetch: give --base OWNER/NAME if it lies on a hub")
    print(address)


def result_of(work: RunDir) -> Path:
    """The folder that a finished run made, verified. Raises ModelError."""
    if work.status != "finished":
        todo = f"Finish it first: tnl resume {work.path}." if work.recipe.is_file() else "Name the folder of a run."
        raise ModelError(work.path, "is not the folder of a finished run", todo)
    folder = work.adapter if work.adapter.is_dir() else work.path / "model"
    verify(folder)
    return folder


def rename_base(folder: Path, base: str, hub: str) -> None:
    """Let the copy name its base as others know it; the paths of this machine concern nobody."""
    for name in (CONFIG, METADATA):
        path = folder / name
        if not path.is_file():
            continue
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if name == CONFIG:
            values["base_model_name_or_path"] = base
        elif values.get("base"):
            values["base"] |= {"path": base, "name": base, "hub": hub}
        write_json(path, values)
