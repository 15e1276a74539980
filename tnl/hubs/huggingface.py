"""huggingface.co through its own library, which goes on where a download was cut off; the checksums are compared here."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tnl.errors import ModelError
from tnl.hubs import files
from tnl.hubs.files import Remote
from tnl.storage import digest

HUB = "huggingface"
TIMEOUT = 10
"""Seconds that the list of files may take."""


def library() -> Any:
    """huggingface_hub."""
    if os.environ.get("HF_ENDPOINT"):
        # the data plane of xet goes past a mirror; this is read when huggingface_hub is imported
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    # a recipe error or --help must not wait for an HTTP client
    import huggingface_hub.errors

    return huggingface_hub


def fetch(repo: str, revision: str | None, out: Path | None, weights: bool) -> Path:
    """Bring a repository's files here and return their folder. Without a network, what is here already counts, if it is whole.

    Raises ModelError (absent, refused, unreachable, wrong contents), StorageError (too little space).
    """
    files.require_token(HUB)
    hub = library()
    with worded(repo, revision):
        try:
            info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except Exception as error:
            if is_answer(error):
                raise
            return cached(repo, revision, out, weights, error)
    listed = [remote(file) for file in info.siblings]
    wanted = files.select(listed, weights)
    if weights and not any(files.matches(file.name, files.WEIGHTS) for file in wanted):
        raise files.without_weights(repo, [file.name for file in listed])
    place = Place(hub, repo, info.sha, out)
    missing = [file for file in wanted if not place.has(file)]
    files.require_room(place.root, missing)
    with worded(repo, revision):
        for file in missing:
            if file.sha256:
                place.bring(file)
        folder = Path(hub.snapshot_download(**options(repo, revision, out, [files.literally(file.name) for file in wanted])))
    hold_checksums(repo, folder, wanted)
    return folder


def remote(file: Any) -> Remote:
    """A file of the hub's list."""
    lfs = file.lfs if isinstance(file.lfs, dict) else vars(file.lfs) if file.lfs else {}
    return Remote(file.rfilename, file.size or 0, lfs.get("sha256"), None if lfs else file.blob_id)


def options(repo: str, revision: str | None, out: Path | None, allowed: Sequence[str]) -> dict[str, Any]:
    """What snapshot_download is asked for."""
    asked = {"repo_id": repo, "revision": revision, "allow_patterns": list(allowed), "ignore_patterns": files.UNWANTED}
    return asked if out is None else {**asked, "local_dir": out}


def cached(repo: str, revision: str | None, out: Path | None, weights: bool, why: Exception) -> Path:
    """The folder that an earlier download left; where that is not whole, `why` the hub was not asked is raised."""
    hub = library()
    # safetensors first: pickles beside them were left out on purpose
    kinds = [[*files.SETTINGS, "*.safetensors"], [*files.SETTINGS, "pytorch_model*.bin"]] if weights else [files.SETTINGS]
    for allowed in kinds:
        asked = options(repo, revision, out, allowed)
        asked["ignore_patterns"] = [*files.UNWANTED, *(files.DOUBLED if "*.safetensors" in allowed else [])]
        with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
            folder = Path(hub.snapshot_download(**asked, local_files_only=True))
            if files.whole(folder, weights) and not (out and files.partial_bytes(folder)):
                return folder
    raise why


class Place:
    """Where a repository's files lie: a folder, or a snapshot of the hub's cache."""

    def __init__(self, hub: Any, repo: str, commit: str, out: Path | None) -> None:
        self.hub, self.repo, self.commit, self.out = hub, repo, commit, out
        self.root = out if out is not None else Path(hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"

    def has(self, file: Remote) -> bool:
        """Whether a file is here: in a folder of its contents, in the cache of its size, for there it is named by its contents."""
        if self.out is not None:
            return files.Checked(self.out).holds(file)
        path = self.hub.try_to_load_from_cache(self.repo, file.name, revision=self.commit)
        return isinstance(path, (str, Path)) and Path(path).is_file() and Path(path).stat().st_size == file.size

    def bring(self, file: Remote) -> None:
        """Fetch a large file to where the library looks for it, checked. The library itself begins anew after a process was killed."""
        found = self.where(file)
        final = self.out / file.name if self.out is not None else self.root / "blobs" / str(found.etag)
        partial = self.root / (".cache" if self.out is not None else "blobs") / f"{file.sha256}.tnl.incomplete"
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self.hub.utils.WeakFileLock(f"{partial}.lock"):
            if self.has(file) or (self.out is None and final.is_file()):
                return  # another process has brought it
            partial.touch()
            try:
                self.append(file, partial, found.location)
            except self.hub.errors.HfHubHTTPError as error:
                again = self.where(file).location
                if status(error) != 403 or again == found.location:
                    raise
                self.append(file, partial, again)  # a signed address holds for an hour, a large file may take longer
            if digest(partial) != file.sha256:
                partial.unlink()
                raise files.wrong_hash(self.repo, HUB, file.name)
            partial.replace(final)
            if self.out is not None:
                files.Checked(self.out).keep([file])

    def where(self, file: Remote) -> Any:
        """Etag and address of a file's contents."""
        address = self.hub.hf_hub_url(self.repo, file.name, revision=self.commit)
        return self.hub.get_hf_file_metadata(address, retry_on_errors=True)

    def append(self, file: Remote, partial: Path, location: str) -> None:
        """Fetch what is missing of a file. The library would show the address, which may be a signed one, beside its progress."""
        with partial.open("r+b") as stream:
            start = stream.seek(0, os.SEEK_END)
            if start > file.size:
                start = stream.truncate(0)
            if start < file.size:
                told = {"resume_size": start, "expected_size": file.size, "displayed_filename": file.name}
                self.hub.file_download.http_get(location, stream, headers=self.headers(location), **told)

    def headers(self, location: str) -> dict[str, str]:
        """What a request for contents says; the token stays with the hub."""
        headers = dict(self.hub.utils.build_hf_headers())
        if urlsplit(location).netloc != urlsplit(self.hub.constants.ENDPOINT).netloc:
            headers.pop("authorization", None)
        return headers


def hold_checksums(repo: str, folder: Path, wanted: Sequence[Remote]) -> None:
    """Compare the small files with git's checksums of them. Raises ModelError; a wrong file is deleted, so that it is fetched anew."""
    for file in wanted:
        path = folder / file.name
        if file.git and git_digest(path) != file.git:
            path.resolve().unlink(missing_ok=True)  # in the cache a link leads to the contents
            path.unlink(missing_ok=True)
            raise files.wrong_hash(repo, HUB, file.name)


def git_digest(path: Path) -> str:
    """Git's SHA-1 of a file's contents."""
    contents = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()


def is_answer(error: Exception) -> bool:
    """Whether the hub itself said no, so that a cache must not be taken for an answer."""
    errors = library().errors
    said = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    return isinstance(error, said) or status(error) in (400, 401, 403)


def status(error: BaseException) -> int:
    """The HTTP status that an error speaks of; 0 where there is none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


@contextlib.contextmanager
def worded(repo: str, revision: str | None = None, sending: bool = False) -> Iterator[None]:
    """Turn what the library raises into one line. sending: an upload, of which nothing is kept."""
    errors = library().errors
    try:
        yield
    except ModelError:
        raise
    except errors.OfflineModeIsEnabled:
        raise files.offline(repo) from None
    except errors.RevisionNotFoundError:
        raise files.no_revision(repo, HUB, revision) from None
    except errors.GatedRepoError:
        raise files.refused(repo, HUB, "it must be asked for") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise files.absent(repo, HUB, sending) from None
    except Exception as error:
        if disk := files.of_disk(error):
            raise disk from None
        cause = next((one for one in (error, error.__cause__, error.__context__) if one is not None and status(one)), error)
        if status(cause) in (401, 403):
            raise files.refused(repo, HUB, f"{status(cause)}: the token is not valid, or may not do this") from None
        if status(cause) == 429:
            raise files.busy(repo, HUB, retry_after(cause), sending) from None
        if isinstance(error, (KeyError, TypeError, AttributeError)) or type(error).__name__ == "JSONDecodeError":
            raise files.garbled(repo, HUB, error) from error
        raise files.unreachable(repo, HUB, cause, sending, status(cause)) from error


def retry_after(error: BaseException) -> float | None:
    """Seconds that the hub asks to wait."""
    value = getattr(error, "response", None).headers.get("Retry-After", "")  # type: ignore[union-attr]
    return float(value) if value.isdigit() else None


def push(repo: str, folder: Path, private: bool, message: str) -> str:
    """Upload a folder into a repository, which is made if it is not there. Returns its address.

    private: nothing is sent to one that is there and public. Raises ModelError.
    """
    files.require_token(HUB)
    hub = library()
    with worded(repo, sending=True):
        api = hub.HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        if private and api.model_info(repo).private is False:
            raise files.public_already(repo, HUB)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return str(address)
