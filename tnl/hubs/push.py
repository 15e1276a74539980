"""`tnl push`: the result of a run into a repository of a hub, with a model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tnl import paths
from tnl.errors import ModelError, RecipeError
from tnl.hub import HUBS, Hub
from tnl.hubs import card
from tnl.recipe.load import load
from tnl.recipe.sections import ModelSection
from tnl.run_dir import RunDir
from tnl.storage import seal, storage, verify, write_json, write_text

CONFIG, METADATA = "adapter_config.json", "tnl.json"


def run(run: Path, repo: str, hub: Hub = "huggingface", public: bool = False, base: str | None = None) -> None:
    """Upload a finished run's adapter (without LoRA: its model) and print the address.

    base: owner/name of the base there, where the run trained on a local folder. The repository is private unless public is set.
    Raises ModelError (no finished run, damaged files, the hub), RecipeError, StorageError.
    """
    for word, given in (("REPO", repo), ("--base", base)):
        if given is not None and not paths.is_repository(given):
            raise RecipeError("command line", f"{word} is {given!r} (needed: owner/name)", "Write, for example, me/huanhuan.")
    work = RunDir(paths.existing(run, ModelError))
    result = result_of(work)
    recipe = load(work.recipe)
    trained_on = base_of(recipe.model, base, hub)
    with tempfile.TemporaryDirectory() as aside, storage(Path(aside)):
        folder = Path(aside) / "push"
        shutil.copytree(result, folder, ignore=shutil.ignore_patterns(".*"))
        rename_base(folder, trained_on, keep_revision=base is None)
        seal(folder, None)
        # after the seal: a card is mended on the hub's page
        write_text(folder / "README.md", card.write(work, repo, hub, trained_on, (folder / CONFIG).is_file()))
        if work.plot.is_file():
            shutil.copy(work.plot, folder / work.plot.name)
        address = HUBS[hub].push(repo, folder, not public, f"tnl push of {work.path.name}")
    if trained_on.local:
        print(f"its base is called {trained_on.name} there, which nobody can fetch: give --base OWNER/NAME if it lies on {hub}")
    print(address)


def result_of(work: RunDir) -> Path:
    """The folder that a finished run made, verified. Raises ModelError."""
    if work.status != "finished":
        todo = f"Finish it first: tnl resume {paths.quoted(work.path)}." if work.recipe.is_file() else "Name the folder of a run."
        raise ModelError(work.path, "is not the folder of a finished run", todo)
    folder = work.adapter if work.adapter.is_dir() else work.path / "model"
    verify(folder)
    return folder


def base_of(section: ModelSection, given: str | None, hub: str) -> card.Base:
    """What others call the base: as given, as the recipe fetched it, or the name of its folder."""
    if given is not None:
        return card.Base(given, hub, local=False)
    if section.path != "demo" and paths.looks_like_path(section.path):
        return card.Base(Path(section.path).name, section.hub, local=True)
    return card.Base(section.path, section.hub, local=False)


def rename_base(folder: Path, base: card.Base, keep_revision: bool) -> None:
    """Let the copy name its base as others know it; the paths of this machine concern nobody."""
    for name in (CONFIG, METADATA):
        path = folder / name
        if not path.is_file():
            continue
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if name == CONFIG:
            values["base_model_name_or_path"] = base.name
        elif values.get("base"):
            values["base"] |= {"path": base.name, "name": base.name, "hub": base.hub}
            values["base"] |= {} if keep_revision else {"revision": None}
        write_json(path, values)
