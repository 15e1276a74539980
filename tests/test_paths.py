"""What is a path, and what stands beside one that is missing."""

import shlex
from pathlib import Path

import pytest

from tnl import paths
from tnl.errors import ModelError, RecipeError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "text", ["/a/b", "./a", "../a/b", "~/a", "a\\b", "C:\\models\\x", "C:/models/x", "name", "a/b/c", "", "models/x", "a b/c"]
)
def test_what_is_written_as_a_path_is_one(text: str) -> None:
    Path("models").mkdir()
    assert paths.looks_like_path(text)


@pytest.mark.parametrize("text", ["OpenNLPLab/TransNormerLLM-7B", "a/b", "me/my.model_2"])
def test_owner_and_name_is_a_repository(text: str) -> None:
    assert not paths.looks_like_path(text)


def test_what_exists_is_a_path() -> None:
    Path("OpenNLPLab/TransNormerLLM-7B").mkdir(parents=True)
    assert paths.looks_like_path("OpenNLPLab/TransNormerLLM-7B")


def test_expansion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    assert paths.absolute("~/x") == Path("/home/me/x")
    assert paths.absolute("$DATA/x") == paths.absolute("${DATA}/y/../x") == Path("/data/x")
    assert paths.absolute("x") == tmp_path / "x"
    assert paths.absolute("~nobody-of-this-name/x") == tmp_path / "~nobody-of-this-name/x"
    with pytest.raises(KeyError, match="NOWHERE"):
        paths.absolute("$NOWHERE/x")


def test_links_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert paths.absolute("link") == tmp_path / "link"


def test_the_first_part_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/huanhuan.json").touch()
    assert paths.missing(tmp_path / "dataset/huanhuan.jsonl") == (
        "no such file",
        f"Did you mean {tmp_path}/dataset/huanhuan.json?",
    )
    assert paths.missing(tmp_path / "datasets/huanhuan.json") == (
        f"no such folder: {tmp_path}/datasets",
        f"Did you mean {tmp_path}/dataset?",
    )
    assert paths.missing(tmp_path / "Dataset")[1] == f"Did you mean {tmp_path}/dataset (only the case differs)?"
    assert paths.missing(tmp_path / "dataset/xyz.csv") == (
        f"no such file ({tmp_path}/dataset has huanhuan.json)",
        "Name one that exists.",
    )
    assert paths.missing(tmp_path / "dataset/huanhuan.json/x")[0] == f"{tmp_path}/dataset/huanhuan.json is a file, not a folder"
    (tmp_path / "empty").mkdir()
    assert paths.missing(tmp_path / "empty/x")[0] == f"no such folder ({tmp_path}/empty is empty)"
    assert paths.missing(tmp_path / "empty/x/y")[0] == f"no such folder: {tmp_path}/empty/x ({tmp_path}/empty is empty)"


def test_an_error_begins_with_the_word_that_was_given(tmp_path: Path) -> None:
    Path("output/huanhuan").mkdir(parents=True)
    assert paths.existing("output/huanhuan", ModelError) == tmp_path / "output/huanhuan"
    with pytest.raises(ModelError, match=rf"^output/huanhua: no such folder\. Did you mean {tmp_path}/output/huanhuan\?$"):
        paths.existing("output/huanhua", ModelError)
    with pytest.raises(RecipeError, match=rf"^outputs/huanhuan: no such folder: {tmp_path}/outputs\. Did you mean {tmp_path}/output\?$"):
        paths.existing(Path("outputs/huanhuan"), RecipeError)
    with pytest.raises(ModelError, match=r"^\$NOWHERE/x: \$NOWHERE is not set\. Set it, or write the path out\.$"):
        paths.existing("$NOWHERE/x", ModelError)


def test_a_folder_of_nearly_that_name_is_found(tmp_path: Path) -> None:
    Path("output/huanhuan").mkdir(parents=True)
    assert paths.near(Path("outputs/huanhuan")) == tmp_path / "output/huanhuan"
    assert paths.near(Path("outputs/other")) is paths.near(Path("a/b/c")) is None


def test_what_is_a_recipe() -> None:
    Path("run.yaml").mkdir()
    Path("recipe").touch()
    assert [paths.is_recipe(Path(word)) for word in ("recipe", "gone.yaml", "run.yaml", "gone")] == [True, True, False, False]


def test_nearest() -> None:
    assert paths.nearest("lerning_rate", ["seed", "learning_rate"]) == "learning_rate"
    assert paths.nearest("QKVU_PROJ", ["qkvu_proj"]) == "qkvu_proj"
    assert paths.nearest("zzz", ["seed"]) is None


def test_a_name_that_goes_on_is_nearer_than_one_that_ends_alike() -> None:
    assert paths.nearest("adamw", ["grokadamw", "adamw_torch", "adamw_8bit"]) == "adamw_torch"
    assert paths.nearest("adamw", ["adamw", "adamw_torch"]) == "adamw"


def test_paths_are_shown_from_here_and_a_copied_command_works(tmp_path: Path) -> None:
    assert paths.shown(f"{tmp_path}/a b/x.json:record 3") == "a b/x.json:record 3"
    assert (
        paths.shown(tmp_path.parent) == str(tmp_path.parent)
        and paths.nearby(f"{tmp_path}/a: no. Name {tmp_path}.") == f"a: no. Name {tmp_path}."
    )
    for name, written in {"run": "run", "小明": "小明", "a b": '"a b"', "it's": '"it\'s"', "$x": "'$x'"}.items():
        assert paths.quoted(tmp_path / name) == written
        assert shlex.split(paths.quoted(tmp_path / name)) == [name]


def test_an_address_names_the_repository_in_it() -> None:
    assert (
        paths.address("https://me:secret@huggingface.co/OpenNLPLab/TransNormerLLM-7B/tree/main")[1] == "Write OpenNLPLab/TransNormerLLM-7B."
    )
    assert paths.address("https://modelscope.cn/models/OpenNLPLab/TransNormerLLM-7B")[1] == "Write OpenNLPLab/TransNormerLLM-7B."
    assert paths.address("file://x")[1] == "Write owner/name alone."
