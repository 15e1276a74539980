"""Where a model's folder is: what is local never touches the net. The hubs themselves: tests/hubs/."""

from pathlib import Path

import pytest

from tnl import hub
from tnl.errors import ModelError


def test_a_local_path_never_touches_the_net(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "download", lambda *a, **k: pytest.fail("asked the net"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/TransNormerLLM-7B").mkdir(parents=True)
    assert hub.resolve("models/TransNormerLLM-7B") == tmp_path / "models/TransNormerLLM-7B"
    assert hub.resolve("./models/TransNormerLLM-7B") == tmp_path / "models/TransNormerLLM-7B"
    for missing in ("models/TransNormerLLM-7b", "./models/x", "/nowhere/at/all", "../x", "~/no-such-model-folder", "models\\x", "x"):
        with pytest.raises(ModelError):
            hub.resolve(missing)
    with pytest.raises(
        ModelError, match=r"^models/TransNormerLLM-7b: no such folder. Did you mean .*TransNormerLLM-7B \(only the case differs\)\?$"
    ):
        hub.resolve("models/TransNormerLLM-7b")


def test_a_repository_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda repo, **options: Path("/cache") / repo / str(options["revision"]))
    assert hub.resolve("OpenNLPLab/TransNormerLLM-7B", revision="abc") == Path("/cache/OpenNLPLab/TransNormerLLM-7B/abc")


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match="needed: the model's folder"):
        hub.resolve(str(tmp_path / "model.bin"))


def test_a_repository_that_is_none_may_be_a_folder_nearby(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(repo: str, **_options: object) -> Path:
        raise ModelError(repo, "no such repository", "Check the name.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", refuse)
    (tmp_path / "output/demo").mkdir(parents=True)
    with pytest.raises(ModelError, match=rf"^outputs/demo: no such repository\. Did you mean the folder {tmp_path}/output/demo\?$"):
        hub.resolve("outputs/demo")
    with pytest.raises(ModelError, match=r"^me/demo: no such repository\. Check the name\.$"):
        hub.resolve("me/demo")
