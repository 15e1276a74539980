"""Where a model's folder is: what is local never touches the net. The hubs themselves: tests/hubs/."""

from pathlib import Path

import pytest

from tnl import hub
from tnl.errors import ModelError, RecipeError


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
    with pytest.raises(ModelError, match="needed: a folder"):
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


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("https://huggingface.co/OpenNLPLab/TransNormerLLM-7B", "Write OpenNLPLab/TransNormerLLM-7B"),
        ("TransNormerLLM-7B", r"is no repository \(needed: owner/name\)"),
        ("./folder", "is no repository"),
        ("demo", "comes with tnl and needs no download"),
    ],
)
def test_what_cannot_be_downloaded_is_said_without_the_net(word: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *a, **k: pytest.fail("asked the net"))
    with pytest.raises(RecipeError, match=said):
        hub.run(word)


def test_an_address_and_a_bare_name_say_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"is an address .*Write OpenNLPLab/TransNormerLLM-385M\.$"):
        hub.resolve("https://huggingface.co/OpenNLPLab/TransNormerLLM-385M")
    with pytest.raises(ModelError, match=r"^demoo: .*Name a folder, a repository \(owner/name\), or demo, the base that comes with tnl\.$"):
        hub.resolve("demoo")
    (tmp_path / "r.yaml").touch()
    with pytest.raises(ModelError, match="Name the folder of a model or of a run"):
        hub.resolve("r.yaml")
