"""The runs of one folder, read-only: what the page's second tab follows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnl.errors import ModelError
from tnl.run_dir import RunDir
from tnl.serve.catalog import NAME
from tnl.serve.errors import ApiError, shown
from tnl.serve.schema import Run

TAIL = 4 << 20
"""Bytes of a file of lines that are read, from its end."""


class Runs:
    """Names come from requests and are looked up in a listing of the root; a link that leads out of it is no run."""

    def __init__(self, root: Path | None) -> None:
        self.root = None if root is None else root.resolve()

    def folders(self) -> dict[str, RunDir]:
        """Every run by its name, as the disk is now."""
        found = {}
        for entry in sorted(self.root.iterdir()) if self.root is not None and self.root.is_dir() else []:
            run = RunDir(entry)
            if NAME.fullmatch(entry.name) and run.metadata.is_file() and entry.resolve().parent == self.root:
                found[entry.name] = run
        return found

    def all(self) -> list[Run]:
        """What GET /v1/runs lists, without metrics."""
        return [summary(name, run) for name, run in self.folders().items()]

    def one(self, name: str, after: int, limit: int) -> Run:
        """A run with the last `limit` lines of its metrics beyond the step `after`, and its newest samples. Raises ApiError 404."""
        run = self.folders().get(name)
        if run is None:
            raise ApiError(404, f'no run is called "{shown(name)}" here (GET /v1/runs lists them)', param="name", code="run_not_found")
        found = summary(name, run)
        steps = [line for line in lines(run.metrics) if isinstance(line.get("step"), int) and line["step"] > after]
        return found.model_copy(update={"metrics": steps[-limit:], "samples": list(lines(run.samples))[-100:]})


def summary(name: str, run: RunDir) -> Run:
    """Where a run stands."""
    try:
        status = run.status
    except ModelError:
        status = "new"
    watched = run.metrics if run.metrics.is_file() else run.metadata
    return Run(id=name, status=status, changed=int(watched.stat().st_mtime), last=next(lines(run.metrics, newest=True), {}))


def lines(path: Path, *, newest: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, from its tail; half a line, and what is no object, is passed over. newest: the last first."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            raw = file.read(TAIL).split(b"\n")[1 if size > TAIL else 0 :]
    except OSError:
        return
    for line in reversed(raw) if newest else raw:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield {str(key): finite(one) for key, one in value.items()}


def finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
