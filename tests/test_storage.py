"""Whole or absent: sealed folders, damage that is found, a process killed at every change it makes, disks that are full."""

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tnl.errors import ModelError, StorageError
from tnl.run_dir import RunDir, latest_valid, rotate
from tnl.storage import MANIFEST, discard, manifest_of, recover, require_space, seal, staged, storage, verify, write_json, write_text

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"}


def save(folder: Path, step: int, text: str = "") -> None:
    with staged(folder, {"step": step}) as place:
        (place / "adapter.bin").write_bytes(f"weights {step} {text}".encode() * 50)
        (place / "inner").mkdir()
        (place / "inner/state.json").write_text(f'{{"step": {step}}}', encoding="utf-8")


def test_a_sealed_folder_verifies(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-1", 1)
    manifest = verify(tmp_path / "checkpoint-1")
    assert manifest["step"] == 1 and sorted(manifest["files"]) == ["adapter.bin", "inner/state.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def _flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: _flip(path, 0),
    "a bit": lambda path: _flip(path, 1234),
    "last bit": lambda path: _flip(path, 8 * path.stat().st_size - 1),
    "another step's": lambda path: shutil.copy(path.parents[1 + (path.parent.name == "inner")] / "checkpoint-2" / _inside(path), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),  # type: ignore[dict-item,func-returns-value]
}


def _inside(path: Path) -> str:
    return f"inner/{path.name}" if path.parent.name == "inner" else path.name


@pytest.mark.parametrize("name", ["adapter.bin", "inner/state.json", MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "checkpoint-1"
    save(folder, 1)
    save(tmp_path / "checkpoint-2", 2)
    verify(folder)
    DAMAGE[damage](folder / name)
    if name == MANIFEST and damage == "another step's":
        with pytest.raises(ModelError, match="damaged"):
            verify(folder)
        return
    with pytest.raises(ModelError) as caught:
        verify(folder)
    assert name in str(caught.value) and caught.value.exit_code == 4


def test_a_file_that_was_added_is_found(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-1", 1)
    (tmp_path / "checkpoint-1/.DS_Store").touch()
    verify(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1/scheduler.pt").touch()
    with pytest.raises(ModelError, match=r"scheduler\.pt: not in the manifest"):
        verify(tmp_path / "checkpoint-1")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "private").mkdir()
    (tmp_path / "private/model.safetensors").touch(mode=0o600)
    seal(tmp_path / "private")
    assert stat.S_IMODE((tmp_path / "private/model.safetensors").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_every_file_and_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").replace(".tnl-staged-", ""))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    save(tmp_path / "checkpoint-1", 1)
    folder = tmp_path / "checkpoint-1"
    expected = {folder, folder / "inner", folder / "adapter.bin", folder / "inner/state.json", folder / MANIFEST, tmp_path}
    assert {str(path) for path in expected} <= set(synced)


def killed_at(change: int, root: Path, work: Callable[[], None]) -> bool:
    """Run work in a child that dies, as by SIGKILL, before its n-th change below root; return whether it died."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event not in CHANGES or not any(isinstance(one, (str, Path)) and str(one).startswith(str(root)) for one in arguments):
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            seen += 1
            if seen == change:
                os._exit(9)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step saved before"])
def test_killed_at_every_change_a_valid_checkpoint_remains(tmp_path: Path, again: bool) -> None:
    def work() -> None:
        save(run.checkpoint(30), 30, "new")
        rotate(run, 2, run.checkpoint(10))

    died = 0
    for change in range(1, 200):
        run = RunDir(tmp_path / str(change))
        for step in (10, 15, 20) + ((30,) if again else ()):
            save(run.checkpoint(step), step, "old")
        (run.path / "checkpoint-best").mkdir()
        if not killed_at(change, run.path, work):
            break
        died += 1
        folder, notices = latest_valid(run)
        assert folder is not None and notices == [], change
        assert folder.name in (("checkpoint-30",) if again else ("checkpoint-20", "checkpoint-30")), change
        verify(run.checkpoint(10))
        assert (run.path / "checkpoint-best").is_dir()
        assert not [path for path in run.path.iterdir() if path.name.startswith(".tnl-")], change
        # and the same work done again ends where the uninterrupted one does
        work()
        names = {path.name for path in run.path.iterdir()}
        assert names == {"checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-best"}, change
        assert b"new" in (run.checkpoint(30) / "adapter.bin").read_bytes()
    assert died > 10


def test_what_raises_within_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "adapter", 1, "old")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "adapter") as place:
        (place / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert verify(tmp_path / "adapter")["step"] == 1


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/thesis.txt").touch()
    with pytest.raises(StorageError, match="is in the way"):
        save(tmp_path / "adapter", 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "thesis.txt"]
    target = tmp_path / "target"
    save(target, 1)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(StorageError, match="is in the way"):
        save(tmp_path / "link", 2)
    assert verify(target)["step"] == 1


def test_recover_gives_a_replaced_folder_its_name_back(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-5", 5)
    (tmp_path / "checkpoint-5").rename(tmp_path / ".tnl-old-checkpoint-5")
    (tmp_path / ".tnl-staged-checkpoint-6").mkdir()
    (tmp_path / ".tnl-trash-checkpoint-4").mkdir()
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_discard_leaves_links_alone(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    discard(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_dir()


def test_a_full_disk_is_said_with_path_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storage(tmp_path / "metrics.jsonl", needed=1_000_000):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/metrics.jsonl: could not be written: No space left on device (1,000,000 bytes needed, ")
    assert "bytes free)" in message and caught.value.exit_code == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left on device"), storage(tmp_path), Path("/dev/full").open("wb") as file:
        file.write(b"x" * 100_000)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES", "EMFILE"])
@pytest.mark.parametrize("call", range(8))
def test_an_error_at_any_sync_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, call: int) -> None:
    save(tmp_path / "checkpoint-1", 1)
    seen = 0
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen == call:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    if call in range(1, 6):  # adapter, state, manifest, and two folders
        with pytest.raises(StorageError) as caught:
            save(tmp_path / "checkpoint-2", 2)
        assert "checkpoint-2" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    save(tmp_path / "checkpoint-2", 2)
    verify(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    "text",
    [
        "unexpected pos 10112 vs 9492",
        "basic_ios::clear: iostream error",
        "Error: No space left on device (os error 28)",
        "I/O error: File too large (os error 27)",
    ],
)
def test_what_writers_say_of_a_full_disk_is_understood(tmp_path: Path, text: str) -> None:
    with pytest.raises(StorageError, match="could not be written"), storage(tmp_path):
        raise RuntimeError(text)


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "x"), ModelError("a", "No space left")):
        with pytest.raises(type(error)), storage(tmp_path):
            raise error


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not/there/yet", 1)
    with pytest.raises(StorageError, match=r"too little space \(1,000,000,000,000,000 bytes needed, [\d,]+ bytes free\)"):
        require_space(tmp_path / "not/there/yet", 10**15)


def test_write_text_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "run.json", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError):
        write_text(tmp_path / "run.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "old"


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "null", '{"files": {}}', '{"seal": 1, "files": {}}', "[" * 100_000, "\x00"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        manifest_of(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    """Names in a manifest are only ever compared: a file outside is neither loaded nor changed by verify."""
    save(tmp_path / "checkpoint-1", 1)
    manifest = json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"]["../../x"] = {"bytes": 0, "sha256": ""}
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        verify(tmp_path / "checkpoint-1")
