"""The script that makes docs/journeys: which pages it makes. The journeys themselves take minutes, and are made by hand."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_journeys", ROOT / "scripts" / "make_journeys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("given", "made"), [([], ["tutorial", "chat-log"]), (["chat-log"], ["chat-log"]), (["24gb"], ["24gb"])])
def test_the_pages_that_are_made(
    given: list[str], made: list[str], script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").touch()
    done: list[str] = []
    for name in script.PAGES:
        monkeypatch.setitem(script.PAGES, name, lambda out, data, model, name=name: done.append(name))
    monkeypatch.setattr(sys, "argv", ["make_journeys.py", *given, "--data", str(tmp_path / "a.json")])
    script.main()
    assert done == made


def test_a_page_that_is_none_is_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["make_journeys.py", "tutorail"])
    with pytest.raises(SystemExit):
        script.main()
    assert "no page is called tutorail (there are tutorial, chat-log, 24gb)" in capsys.readouterr().err
