"""What of the pipeline in run.py several processes do in turn, once, or each for itself."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from tnl.data import store
from tnl.data.build import Dataset, Report
from tnl.errors import ModelError
from tnl.recipe.load import Recipe
from tnl.recipe.sections import TrainSection
from tnl.run_dir import RunDir, check_checkpoint, hold, latest_valid, open_run
from tnl.storage import storage
from tnl.train.crew import Crew, here
from tnl.train.crew import join as meet
from tnl.train.recomputation import LEVELS
from tnl.train.step import Rows

PLACES = ("model.path", "data.train", "data.eval", "train.output_dir")
"""Keys that may differ between machines: of files the contents count."""
Value = TypeVar("Value")


def join(section: TrainSection) -> Crew:
    """Meet the processes that were launched together, by the section's settings. Raises as crew.join."""
    backend = section.arguments().get("ddp_backend")
    return meet(section.use_cpu, section.ddp_timeout, backend, section.save_on_each_node)


def own_device(device: torch.device) -> torch.device:
    """This process's device: of a machine's GPUs the one of its number."""
    return torch.device("cuda", here().local_rank) if device.type == "cuda" and here().size > 1 else device


def in_turn(crew: Crew, work: Callable[[], Value]) -> Value:
    """Each machine's first process before the others, so that a download is made once."""
    result: list[Value] = []
    for first in (True, False):
        with crew.together():
            if (crew.local_rank == 0) == first:
                result.append(work())
    return result[0]


def comparable(recipe: Recipe, facts: dict[str, Any]) -> dict[str, Any]:
    """All of a recipe and its files that must be the same everywhere."""
    sections = recipe.as_dict()
    keys = {f"{name}.{key}": value for name, values in sections.items() for key, value in (values or {"": None}).items()}
    return {**facts, **{key: value for key, value in keys.items() if key not in PLACES}}


def read(crew: Crew, make: Callable[[], Dataset]) -> Dataset:
    """The data; each machine's first process makes it, and all map the same files into memory, which vanish with the processes."""
    if crew.size == 1:
        return make()
    report, folder = Report(), None
    with crew.together():
        if crew.local_rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="tnl-data-"))
            with storage(folder):
                try:
                    made = make()
                    report = made.report
                    store.write(made.train, folder / "train")
                    store.write(made.eval, folder / "eval")
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
    there = crew.gather(str(folder))[crew.rank - crew.local_rank]
    train, held = (store.Stored(Path(there) / name) for name in ("train", "eval"))
    crew.wait()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # mapped files stay readable; Windows keeps them until the processes end
    return Dataset(train, held, report)  # type: ignore[arg-type]


def same_rows(crew: Crew, rows: Rows) -> None:
    """Make them such as fit every process's device."""
    rows.budget = min(crew.gather(rows.budget))
    rows.level = max(crew.gather(rows.level), key=LEVELS.index)
    lengths = [length for length in crew.gather(rows.segment_length) if length is not None]
    rows.segment_length = min(lengths, default=None)


@contextlib.contextmanager
def held(crew: Crew, path: Path, facts: dict[str, Any], allow: Sequence[str]) -> Iterator[tuple[RunDir, Path | None, list[str]]]:
    """The run, held by those who save it, and the checkpoint that all go on from."""
    work, folder, notices = RunDir(path), None, list[str]()
    with contextlib.ExitStack() as stack:
        with crew.together():
            if crew.saves:
                open_run(path, facts, allow)
                stack.enter_context(hold(work))
                folder, notices = latest_valid(work)
        yield work, agreed(crew, work, folder), notices


def agreed(crew: Crew, work: RunDir, folder: Path | None) -> Path | None:
    """The checkpoint that all can read: where machines have disks of their own, the newest that each has."""
    if crew.size == 1:
        return folder
    name = None if folder is None else folder.name
    steps = [step_of(one) for saves, one in crew.gather((crew.saves, name)) if saves]
    step = min(steps)
    if not step:
        return None
    with crew.together():
        found = work.checkpoint(step)
        if not found.is_dir():
            what = f"process {crew.rank} of {crew.size} finds no {found.name} there"
            raise ModelError(work.path, what, "Put train.output_dir on a disk that all machines share, or set train.save_on_each_node.")
        if step_of(name) != step:
            check_checkpoint(found, step)
    return found


def step_of(name: str | None) -> int:
    """The step of a checkpoint's folder; 0 for none."""
    return int(name.rpartition("-")[2]) if name else 0
