"""modelscope.cn through its own library, which goes on where a download was cut off and holds every file against the hub's SHA-256."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnl.errors import ModelError, RecipeError, install
from tnl.hubs import files
from tnl.hubs.files import Remote

HUB = "modelscope"


def library() -> Any:
    """modelscope_hub, the part of modelscope that talks to the hub. Raises RecipeError where it is not installed."""
    try:
        hub = importlib.import_module("modelscope_hub")
        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)  # it tells every step of an upload
        return hub
    except ImportError:
        what = "the hub modelscope needs the package modelscope, which is not installed"
        raise RecipeError("", what, install("modelscope")) from None


def fetch(repo: str, revision: str | None, out: Path | None, weights: bool) -> Path:
    """Bring a repository's files here and return their folder. Without a network, what is here already counts, if it is whole.

    Raises ModelError (absent, refused, unreachable, wrong contents), StorageError (too little space), RecipeError (not installed).
    """
    files.require_token(HUB)
    hub = library()
    with worded(repo, revision):
        api = api_for(hub, repo)
        try:
            entries = api.list_repo_files(repo, "model", revision=revision)
        except hub.errors.HubError as error:
            if not may_pass(error):
                raise
            return cached(api, repo, revision, out, weights, error)
    listed = [Remote(entry.path, entry.size or 0, entry.sha256) for entry in entries if entry.type != "tree"]
    wanted = files.select(listed, weights)
    if weights and not any(files.matches(file.name, files.WEIGHTS) for file in wanted):
        raise files.without_weights(repo, [file.name for file in listed])
    folder = here(api, repo, revision, out)
    # the library would read every file anew, each time
    missing = wanted if folder is None else [file for file in wanted if not files.Checked(folder).holds(file)]
    if folder is not None and not missing:
        return folder
    root = out or folder
    files.require_room(root or Path(hub.get_default_config().cache_dir), missing, partly=root is not None)
    allowed = [files.literally(file.name) for file in wanted]
    with worded(repo, revision):
        folder = Path(api.download_repo(repo, "model", **options(revision, out), allow_patterns=allowed))
    files.Checked(folder).keep(wanted)
    return folder


def api_for(hub: Any, repo: str) -> Any:
    """The client for the site that has the repository: MODELSCOPE_ENDPOINT, else modelscope.cn, else modelscope.ai."""
    api = hub.HubApi()
    with contextlib.suppress(hub.errors.HubError):
        return hub.HubApi(endpoint=api.resolve_endpoint_for_read(repo))
    return api


def options(revision: str | None, out: Path | None) -> dict[str, Any]:
    """Where and what, in the library's words."""
    return {"revision": revision, **({"local_dir": out} if out is not None else {})}


def here(api: Any, repo: str, revision: str | None, out: Path | None) -> Path | None:
    """The folder that an earlier download left, whole or not."""
    with contextlib.suppress(library().errors.HubError):
        return Path(api.download_repo(repo, "model", **options(revision, out), local_files_only=True))
    return None


def cached(api: Any, repo: str, revision: str | None, out: Path | None, weights: bool, error: Exception) -> Path:
    """The same, where it is whole as far as can be told without the hub; else the error is raised."""
    folder = here(api, repo, revision, out)
    if folder is None or files.partial_bytes(folder) or not files.whole(folder, weights):
        raise error
    return folder


def may_pass(error: Exception) -> bool:
    """Whether it may be better next time, so that what is here may stand in."""
    return bool(getattr(error, "retryable", False))


@contextlib.contextmanager
def worded(repo: str, revision: str | None = None, sending: bool = False) -> Iterator[None]:
    """Turn what the library raises into one line. sending: an upload, of which nothing is kept."""
    errors = library().errors
    try:
        yield
    except ModelError:
        raise
    except errors.FileDownloadError as error:
        name, first = next(iter(error.failed_files.items()), ("", error))
        with worded(repo, revision):
            if isinstance(first, errors.FileIntegrityError):
                raise files.wrong_hash(repo, HUB, name) from None
            raise first  # noqa: B904 - its cause is the line that helps
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise files.refused(repo, HUB, f"{error.status_code}: a login is needed, or the token may not do this") from None
    except errors.NotExistError as error:
        if revision is not None and "revision" in str(error).lower():
            raise files.no_revision(repo, HUB, revision) from None
        raise files.absent(repo, HUB, sending) from None
    except errors.RateLimitError as error:
        raise files.busy(repo, HUB, error.retry_after, sending) from None
    except errors.InvalidParameter as error:
        raise files.absent(repo, HUB, sending) from error
    except Exception as error:
        if disk := files.of_disk(error):
            raise disk from None
        if not isinstance(error, errors.HubError):
            raise files.garbled(repo, HUB, error) from error
        if sending and isinstance(error, errors.StorageError):
            raise files.unfinished(repo, HUB, error) from error
        raise files.unreachable(repo, HUB, error.__cause__ or error, sending, getattr(error, "status_code", 0) or 0) from error


def push(repo: str, folder: Path, private: bool, message: str) -> str:
    """Upload a folder into a repository, which is made if it is not there. Returns its address.

    private: nothing is sent to one that is there and public. Raises ModelError, RecipeError.
    """
    files.require_token(HUB)
    hub = library()
    # the library prints a report
    with worded(repo, sending=True), contextlib.redirect_stdout(sys.stderr):
        api = hub.HubApi()
        try:
            api.create_repo(repo, "model", visibility="private" if private else "public")
        except hub.errors.AlreadyExistsError:
            if private and api.get_repo(repo, "model").visibility == hub.constants.Visibility.PUBLIC:
                raise files.public_already(repo, HUB) from None
        api.upload_folder(repo, "model", folder, commit_message=message, use_cache=False, disable_tqdm=True)
    return f"{api.legacy.endpoint}/models/{repo}"
