"""Files that are whole or absent: staged, sealed with a manifest of SHA-256 sums, synced, renamed; and errors of the disk in one line."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnl.errors import ModelError, StorageError, TnlError

MANIFEST = "manifest.json"
STAGED, OLD, TRASH = ".tnl-staged-", ".tnl-old-", ".tnl-trash-"
DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES", "EPERM", "EMFILE", "ENFILE", "EFBIG", "ENAMETOOLONG", "ENOTDIR", "ELOOP")
    if hasattr(errno, name)
}
# torch's and safetensors' writers do not say ENOSPC: "unexpected pos 10112 vs 9492", "basic_ios::clear: iostream error"
_WRITER = re.compile(
    r"No space left|os error (28|122|27|24|5|30|13|2)\b|unexpected pos \d+|iostream error|PytorchStreamWriter failed|Disk quota exceeded"
)


@contextlib.contextmanager
def storage(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what a full, read-only or broken disk raises within into a StorageError with path and bytes; needed: bytes, 0 is unknown."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise _storage_error(error.filename or path, error.strerror or str(error), path, needed) from error
    except Exception as error:
        if isinstance(error, TnlError) or not _WRITER.search(str(error)):
            raise
        raise _storage_error(path, str(error).splitlines()[0], path, needed) from error


def _storage_error(where: object, reason: str, path: Path, needed: int) -> StorageError:
    sizes = f"{needed:,} bytes needed, " if needed else ""
    what = f"could not be written: {reason} ({sizes}{free_bytes(path):,} bytes free)"
    return StorageError(str(where), what, "Free some space or make the folder writable, then run the same command again.")


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which path lies or would lie; 0 where that cannot be told."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


CHECKPOINTS = "Free some space, keep fewer checkpoints (train.save_total_limit), or name a folder on another disk."


def require_space(path: Path, needed: int, todo: str = CHECKPOINTS) -> None:
    """Raise StorageError, which says what to do, unless the disk of path has that many bytes free."""
    free = free_bytes(path)
    if free < needed:
        raise StorageError(path, f"too little space ({needed:,} bytes needed, {free:,} bytes free)", todo)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk itself. Raises OSError."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: whatever happens, either the old or the new text stands there. Raises StorageError."""
    staged = path.with_name(f"{STAGED}{path.name}")
    with storage(path, len(text.encode())):
        try:
            with staged.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
            sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON in one step. Raises StorageError; ValueError where a number is not finite."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write a manifest over every file of a folder and flush all to the disk; extra is kept in it (a checkpoint has its step there).

    Returns the manifest. Raises OSError, which storage() words.
    """
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in _files(folder)}
    manifest: dict[str, Any] = {"format": 1, **(extra or {}), "files": files}
    manifest["seal"] = _seal_of(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, ensure_ascii=False, indent=1)
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for name in [*files, MANIFEST]:
        with contextlib.suppress(OSError):  # some mounts have no modes
            (folder / name).chmod(mode)  # safetensors writes 0600 whatever the umask says
        sync(folder / name)
    for inner in sorted({(folder / name).parent for name in files} | {folder}, reverse=True):
        sync(inner)
    return manifest


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return a sealed folder's manifest, itself checked. Raises ModelError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["seal"] == _seal_of({key: value for key, value in manifest.items() if key != "seal"}):
            return manifest
    except FileNotFoundError:
        raise ModelError(folder, f"not a finished checkpoint ({MANIFEST} is missing)", "Use another one.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ModelError(path, "damaged", "Use another checkpoint.")


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file of a sealed folder with its manifest and return that, loading nothing. Raises ModelError, naming the file."""
    manifest = manifest_of(folder)
    listed = manifest["files"]
    for name, entry in listed.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ModelError(path, f"damaged (found {size:,} bytes; needed {entry['bytes']:,})", "Use another checkpoint.")
            if digest(path) != entry["sha256"]:
                raise ModelError(path, "damaged (its SHA-256 is not that of the manifest)", "Use another checkpoint.")
        except OSError as error:
            raise ModelError(path, f"missing or unreadable ({error.strerror})", "Use another checkpoint.") from None
    added = sorted(set(_files(folder)) - set(listed))
    if added:
        raise ModelError(folder / added[0], "not in the manifest: it was added later", "Remove it, or use another checkpoint.")
    return manifest


@contextlib.contextmanager
def staged(final: Path, extra: dict[str, Any] | None = None, needed: int = 0) -> Iterator[Path]:
    """Yield a folder to write into; at the end it is sealed and takes final's name, replacing a sealed folder there in one step.

    If anything raises, nothing of it remains and final is as it was. Raises StorageError.
    """
    parent, folder, old = final.parent, final.with_name(f"{STAGED}{final.name}"), final.with_name(f"{OLD}{final.name}")
    with storage(final, needed):
        _remove(folder)
        folder.mkdir(parents=True)
        try:
            yield folder
            seal(folder, extra)
            if final.is_symlink() or (final.exists() and not (final / MANIFEST).is_file()):
                raise StorageError(final, "is in the way: it was not written by a run", "Move it elsewhere.")
            if final.exists():
                _remove(old)
                final.rename(old)
            folder.rename(final)
            sync(parent)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(folder)
                if old.exists() and not final.exists():
                    old.rename(final)
            raise
        discard(old)


def discard(folder: Path) -> None:
    """Delete a folder such that no half of it can be taken for a whole: it loses its name first. Raises OSError."""
    if folder.is_dir() and not folder.is_symlink():
        trash = folder.with_name(TRASH + folder.name.removeprefix(OLD))
        _remove(trash)
        folder.rename(trash)
        _remove(trash)


def recover(parent: Path) -> None:
    """Undo what a killed process left half done: staged and discarded folders go, a replaced one gets its name back. Raises OSError."""
    for folder in sorted(parent.glob(f"{OLD}*")):
        final = parent / folder.name.removeprefix(OLD)
        if folder.is_symlink() or not (folder / MANIFEST).is_file():
            continue
        if final.exists():
            discard(folder)
        else:
            folder.rename(final)
    for pattern in (f"{STAGED}*", f"{TRASH}*"):
        for folder in sorted(parent.glob(pattern)):
            _remove(folder)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _files(folder: Path) -> list[str]:
    """Names, relative and with /, of the files in a folder, the manifest and hidden ones left out."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(name for name in names if name != MANIFEST and not any(part.startswith(".") for part in name.split("/")))


def _seal_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
