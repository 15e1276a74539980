"""What a run leaves on disk: its names, its state, its checkpoints, and what makes two runs the same."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tnl.errors import ModelError, StorageError
from tnl.recipe.load import Recipe
from tnl.storage import discard, manifest_of, recover, storage, verify, write_json, write_text

Status = Literal["new", "unfinished", "interrupted", "finished"]
SAMPLED = 64 * 1024 * 1024  # larger files are hashed by samples
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_NOT_OF_THE_RUN = re.compile(
    r"generation\..*|model\.(path|hub|revision|backend)|data\.train|"
    r"train\.(output_dir|run_name|project|report_to|disable_tqdm|log_.*|logging_.*|save_.*|eval_.*|per_device_eval_batch_size|"
    r"load_best_model_at_end|metric_for_best_model|greater_is_better|push_to_hub|hub_.*|trackio_.*|gradient_checkpointing.*|"
    r"activation_checkpointing.*|dataloader_.*|skip_memory_metrics|torch_empty_cache_steps|resume_from_checkpoint|ddp_.*|fsdp.*|deepspeed|"
    r"save_on_each_node|debug|state_offload|cuda_graphs)"
)


@dataclass(frozen=True)
class RunDir:
    """The names in a run's folder."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, sealed; plain peft loads it."""
        return self.path / "adapter"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: step, loss, learning_rate, tokens_per_second ..."""
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def samples(self) -> Path:
        """Answers before and after, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def metadata(self) -> Path:
        """State, fingerprint and versions of the run."""
        return self.path / "run.json"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after that optimizer step."""
        return self.path / f"checkpoint-{step}"

    def read_metadata(self) -> dict[str, Any]:
        """Return run.json; empty where there is none. Raises ModelError where it is damaged."""
        try:
            metadata = json.loads(self.metadata.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ModelError(self.metadata, f"cannot be read ({error})", "Name another folder with train.output_dir=FOLDER.") from None
        if not isinstance(metadata, dict):
            raise ModelError(self.metadata, "not the metadata of a run", "Name another folder with train.output_dir=FOLDER.")
        return metadata

    def update_metadata(self, **values: Any) -> None:
        """Set values in run.json, in one step. Raises StorageError."""
        write_json(self.metadata, {**self.read_metadata(), **values})

    @property
    def status(self) -> Status:
        """Where the run stands; interrupted was stopped by a person and saved, unfinished was killed or is running."""
        found = self.read_metadata().get("status", "new")
        return found if found in ("unfinished", "interrupted", "finished") else "new"


def open_run(path: Path, fingerprint: Mapping[str, Any], allow: Iterable[str] = ()) -> tuple[RunDir, Status]:
    """Claim a folder for a run and say where that run stands. allow: changed fields to accept, which is recorded.

    Raises as `changes`, and StorageError where the folder cannot be made.
    """
    run = RunDir(path)
    with storage(path):
        path.mkdir(parents=True, exist_ok=True)
    accepted = changes(run, fingerprint, allow)
    metadata = run.read_metadata()
    if not metadata:
        write_json(run.metadata, {"status": "unfinished", "fingerprint": dict(fingerprint)})
        return run, "new"
    if accepted:
        allowed = [*metadata.get("allowed_changes", []), *([field, old, new] for field, old, new in accepted)]
        run.update_metadata(fingerprint=dict(fingerprint), allowed_changes=allowed)
    return run, run.status


def changes(run: RunDir, fingerprint: Mapping[str, Any], allow: Iterable[str] = ()) -> list[tuple[str, Any, Any]]:
    """Return (field, old, new) for what differs from the run in the folder and is allowed to; writes nothing.

    Raises ModelError where the folder holds another run (the first changed field is named, with old and new value) or other files.
    """
    metadata = run.read_metadata()
    if not metadata:
        with storage(run.path):
            entries = sorted(entry.name for entry in run.path.iterdir() if not entry.name.startswith("."))
        if entries:
            shown = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
            raise ModelError(run.path, f"holds files that are not of a run ({shown})", "Name an empty folder with train.output_dir=FOLDER.")
        return []
    found = compare(metadata.get("fingerprint", {}), fingerprint)
    refused = [change for change in found if change[0] not in set(allow)]
    if refused:
        field, old, new = refused[0]
        more = f", and {len(refused) - 1} more: {', '.join(one[0] for one in refused[1:6])}" if len(refused) > 1 else ""
        what = f"holds another run ({field} was {_short(old)} there and is {_short(new)} now{more})"
        todo = f"Undo the change, name another folder with train.output_dir=FOLDER, or accept it with --allow-change {field}."
        raise ModelError(run.path, what, todo)
    return found


@contextlib.contextmanager
def hold(run: RunDir) -> Iterator[None]:
    """Keep a second process out of a run while the first works on it. Raises ModelError."""
    with storage(run.path):
        lock = (run.path / ".lock").open("a+", encoding="utf-8")
    with lock:
        try:
            _lock(lock.fileno())
        except OSError:
            raise ModelError(run.path, "another process is working on this run", "Wait for it, or stop it.") from None
        yield


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        # the standard library has no lock for both systems
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def checkpoints(run: RunDir) -> list[tuple[int, Path]]:
    """Return step and folder of all that is called like a checkpoint, newest step first; symlinks and other names are not ours."""
    found = []
    for entry in run.path.iterdir() if run.path.is_dir() else []:
        match = _CHECKPOINT.fullmatch(entry.name)
        if match and entry.is_dir() and not entry.is_symlink() and entry.name == f"checkpoint-{int(match.group(1))}":
            found.append((int(match.group(1)), entry))
    return sorted(found, reverse=True)


def check_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Verify a checkpoint and that it is the one of that step. Returns its manifest. Raises ModelError."""
    manifest = verify(folder)
    if manifest.get("step") != step:
        raise ModelError(folder, f"is another checkpoint's copy (found step {manifest.get('step')}; needed {step})", "Use another one.")
    return manifest


def latest_valid(run: RunDir) -> tuple[Path | None, list[str]]:
    """Return the checkpoint of the latest step whose every file is as it was saved, and a line for each newer one that is not.

    What a killed process left half done is cleared away first, so hold the run.
    """
    notices = []
    with storage(run.path):
        if run.path.is_dir():
            recover(run.path)
    for step, folder in checkpoints(run):
        try:
            check_checkpoint(folder, step)
        except ModelError as error:
            notices.append(f"{folder.name} was passed over: {error.where}: {error.what}")
            continue
        return folder, notices
    return None, notices


def rotate(run: RunDir, limit: int | None, keep: Path | None = None) -> list[str]:
    """Delete the oldest checkpoints beyond the limit; return a line for what could not be deleted.

    Only sealed folders of ours go, and only once `limit` newer ones (two at least) have been verified; never keep, the best one.
    """
    if limit is None:
        return []
    notices, valid = [], 0
    for step, folder in checkpoints(run):
        if valid < max(limit, 2):
            with contextlib.suppress(ModelError):
                check_checkpoint(folder, step)
                valid += 1
            continue
        if keep is not None and folder.name == keep.name:
            continue
        try:
            if manifest_of(folder).get("step") == step:
                discard(folder)
        except ModelError:
            continue
        except OSError as error:
            notices.append(f"{folder} could not be deleted: {error.strerror}")
    return notices


def fingerprint(recipe: Recipe, files: Mapping[str, Iterable[Path]], **facts: Any) -> dict[str, Any]:
    """Return what makes a run this run, as field -> value: the recipe's keys that change the weights, files' contents, and facts.

    files: role (data, eval, base, tokenizer) -> its files; those above 64 MiB are hashed by samples over their whole length.
    facts: values of other origin, such as template=hash.
    """
    values = {name: value for name, value in _flat(recipe.as_dict()) if not _NOT_OF_THE_RUN.fullmatch(name)}
    if isinstance(recipe.data.eval, (str, list)):
        values.pop("data.eval")  # as with data.train, the contents count and not the path
    for role, paths in files.items():
        values[role] = hash_files(paths)
    return json.loads(json.dumps({**values, **facts}, sort_keys=True))


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (field, old, new) for every field that differs; a field that is absent counts as None."""
    fields = [*new, *(name for name in old if name not in new)]
    return [(name, old.get(name), new.get(name)) for name in fields if old.get(name) != new.get(name)]


def hash_files(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over the contents of files, in the order of their names. Raises StorageError where one cannot be read."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda one: one.name):
        total.update(f"{path.name}\0".encode() if path.suffix in (".safetensors", ".bin") else b"\0")
        try:
            _add(path, total)
        except OSError as error:
            raise StorageError(path, f"cannot be read ({error.strerror})", "Check its permissions.") from None
    return total.hexdigest()


def _add(path: Path, total: Any) -> None:
    size = path.stat().st_size
    total.update(f"{size}\0".encode())
    with path.open("rb") as file:
        if size <= SAMPLED:
            total.update(hashlib.file_digest(file, "sha256").digest())
            return
        for index in range(257):  # 16 MiB in all: another base differs everywhere, and 13 GB need not be read
            file.seek((size - 65536) * index // 256)
            total.update(file.read(65536))


def trim_metrics(path: Path, step: int) -> None:
    """Drop from a metrics file what lies behind a step, and a last line that a killed process left half written. Raises StorageError."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text if len(text) <= 60 else f"{text[:57]}..."
