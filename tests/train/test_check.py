"""`tnl check`: all of it from a recipe, without a weight being read and without a file being written."""

import json
import re
from pathlib import Path

import pytest
import torch

from tnl.errors import MemoryBudgetError, ModelError
from tnl.train import check, plan


def test_everything_is_shown_and_nothing_is_written(recipe: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "model.safetensors").rename(base / "elsewhere")
    before = sorted(recipe.parent.rglob("*"))
    try:
        check.run(recipe)
    finally:
        (base / "elsewhere").rename(base / "model.safetensors")
    said = capsys.readouterr().out
    assert sorted(recipe.parent.rglob("*")) == before
    assert "40 to train on, 4 held out" in said and "template" in said and "longest" in said
    assert re.search(r"records\.json:record \d+: \d+ tokens, \d+ learned \(between \[\[ and ]]\)", said)
    assert "[[" in said and "</s>]]" in said and "<|im_start|>user" in said
    assert re.search(r"qkvu_proj\s+2\s+320", said) and "10 optimizer steps of 8 records (5 an epoch)" in said
    assert "a card of 24 GiB" in said and "this run" in said
    assert re.search(r"about [\d,]+ tokens/s on this CPU: [\d.]+ s for the run, [\d.]+ s for its longest record", said)


def test_a_transcript_shows_speakers_and_five_records(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = [f"皇上: 第{i}问？\n甄嬛: 第{i}答。\n皇后: 第{i}叹。\n甄嬛: 再答{i}。" for i in range(30)]
    (tmp_path / "script.txt").write_text("\n\n".join(scenes), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "model": {"path": str(base)},
        "data": {"train": str(tmp_path / "script.txt"), "format": "transcript", "persona": "甄嬛", "max_length": 64},
        "train": {"output_dir": str(tmp_path / "run"), "use_cpu": True},
    }
    recipe.write_text(json.dumps(sections, ensure_ascii=False), encoding="utf-8")
    check.run(recipe)
    said = capsys.readouterr().out
    assert re.search(r"甄嬛\s+60", said) and re.search(r"皇上\s+30", said) and re.search(r"皇后\s+30", said)
    assert said.count(" learned (between") == 5


def test_colours_mark_what_is_learned(base: Path) -> None:
    # only this test needs a tokenizer alone
    from tnl.model.load import load_tokenizer

    record = {"id": "r", "input_ids": [200, 201, 300, 2], "labels": [-100, -100, 300, 2]}
    text = check.coloured(record, load_tokenizer(base), brackets=False)
    assert [span.style for span in text.spans] == [check.READ, check.LEARNED] and text.plain.endswith("</s>")


def test_a_card_can_be_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(recipe, memory=24)
    assert re.search(r"24 GiB\s+\d+ tokens", capsys.readouterr().out)


def test_mistakes_are_those_of_training(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="l9"):
        check.run(recipe, ["lora.target_modules=[l9]"])
    monkeypatch.setattr(plan, "here", lambda device, gib=None: 1e6)
    with pytest.raises(MemoryBudgetError):
        check.run(recipe)
    assert "does not fit" in capsys.readouterr().out
    assert torch.tensor(0).device.type == "cpu"  # the default device is as it was


def test_a_document_that_fits_nowhere_whole_is_shown_in_segments(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "novel.txt").write_text("春夏秋冬山水风云" * 300, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "model": {"path": str(base)},
        "data": {"train": str(tmp_path / "novel.txt"), "format": "text", "eval": 0, "max_length": None},
        "train": {"output_dir": str(tmp_path / "run"), "use_cpu": True, "segment_length": 256},
    }
    recipe.write_text(json.dumps(sections, ensure_ascii=False), encoding="utf-8")
    check.run(recipe)
    said = capsys.readouterr().out
    assert "longer rows: in segments of 256 tokens, with the gradients of one pass; states between them: 0.0 GiB" in said
    assert re.search(r"\.\.\. [\d,]+ tokens \.\.\.", said) and said.count("春夏秋冬") < 300, "its beginning and end"


def test_durations_are_said_as_people_say_them() -> None:
    assert [check.clock(s) for s in (0.25, 42.3, 400, 7200)] == ["0.2 s", "42 s", "7 min", "2 h 00 min"]
