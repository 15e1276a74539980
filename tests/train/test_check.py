"""`tnl check`: all of it from a recipe, without a weight being read and without a file being written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnl import hub
from tnl.data.messages import Message, Role
from tnl.data.template import TEMPLATES, encode_prompt
from tnl.errors import DataError, MemoryBudgetError, ModelError, RecipeError
from tnl.model import convert
from tnl.recipe.load import load
from tnl.run_dir import compare
from tnl.train import check, plan
from tnl.train import run as training


def test_everything_is_shown_and_nothing_is_written(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    monkeypatch.setattr(convert, "tensors", lambda file: pytest.fail("a weight was read"))
    check.run(recipe)
    said = capsys.readouterr().out
    assert sorted(recipe.parent.rglob("*")) == before
    assert "40 to train on, 4 held out" in said and "template" in said and "longest" in said
    assert re.search(r"records\.json:record \d+: \d+ tokens, \d+ learned \(between \[\[ and ]]\)", said)
    assert "[[" in said and "</s>]]" in said and "<|im_start|>user" in said
    assert re.search(r"qkvu_proj\s+2\s+320", said) and "10 optimizer steps of 8 records (5 an epoch)" in said
    assert "cards of 12 to 80 GiB" in said and "this run" in said  # one line for what is alike
    assert ("cards are planned with the plain PyTorch forms" in said) != torch.cuda.is_available()
    assert re.search(r"about [\d,]+ tokens/s on this CPU: [\d.]+ s for the run, [\d.]+ s a step, [\d.]+ s for its longest record", said)


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


def test_a_long_scene_is_shown_in_part(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.txt"):
        talk = "\n".join(f"皇上: {name}第{i}问？\n甄嬛: {name}第{i}答。" for i in range(60))
        (tmp_path / name).write_text(talk, encoding="utf-8")
    sections = {
        "model": {"path": str(base)},
        "data": {"train": str(tmp_path), "persona": "甄嬛", "max_length": None, "eval": 0, "format": "transcript"},
        "train": {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(sections, ensure_ascii=False), encoding="utf-8")
    check.run(recipe)
    said = capsys.readouterr().out
    assert said.count(" tokens ...\n") == 2 and "第0问" in said and "第59答" in said and "第30问" not in said


def test_bfloat16_on_a_cpu_is_said_to_be_slow(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(recipe, ["model.dtype=bfloat16"])
    assert "model.dtype=auto takes float32" in capsys.readouterr().out
    check.run(recipe, ["model.dtype=bfloat16"], memory=24)  # a card is planned for
    check.run(recipe, ["model.dtype=auto"])
    assert "slower" not in capsys.readouterr().out


def test_colours_mark_what_is_learned(base: Path) -> None:
    # only this test needs a tokenizer alone
    from tnl.model.load import load_tokenizer

    record = {"id": "r", "input_ids": [200, 201, 300, 2], "labels": [-100, -100, 300, 2]}
    text = check.coloured(record, load_tokenizer(base), brackets=False)
    assert [span.style for span in text.spans] == [check.READ, check.LEARNED] and text.plain.endswith("</s>")


def test_no_blank_is_shown_behind_an_answer_that_is_only_read(base: Path) -> None:
    # only this test needs a tokenizer alone
    from tnl.model.load import load_tokenizer

    tokenizer = load_tokenizer(base)
    ids = [*encode_prompt([Message(Role.USER, "a")], tokenizer, TEMPLATES["chatml"]), 300, tokenizer.eos_token_id]
    text = check.coloured({"input_ids": [*ids, *ids], "labels": [-100] * 2 * len(ids)}, tokenizer, brackets=True)
    assert "</s><|im_start|>" in text.plain


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


class Code:
    """A pickle that would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "run")


@pytest.mark.parametrize("flaw", ["missing", "code", "shape", "gone"])
def test_a_base_that_cannot_be_loaded_is_refused(recipe: Path, base: Path, tmp_path: Path, flaw: str) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.l1.weight" if "model.layers.0.mlp.l1.weight" in weights else sorted(weights)[0]
    file.unlink()
    if flaw == "missing":
        save_file({key: value for key, value in weights.items() if key != name}, file, metadata={"format": "pt"})
    elif flaw == "shape":
        save_file({**weights, name: torch.zeros(3, 5)}, file, metadata={"format": "pt"})
    elif flaw == "code":
        torch.save({**weights, "x": Code(tmp_path / "written")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        check.run(recipe, [f"model.path={folder}"])
    assert caught.value.exit_code == 4 and not (tmp_path / "written").exists() and not (tmp_path / "run").exists()


def test_a_folder_that_training_would_refuse_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "taken"
    output.mkdir()
    (output / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match=r"not of a run \(thesis\.txt\)"):
        check.run(recipe, [f"train.output_dir={output}"])
    (output / "thesis.txt").rename(output / "run.json")
    (output / "run.json").write_text('{"status": "unfinished", "fingerprint": {"train.seed": 99}}', encoding="utf-8")
    with pytest.raises(ModelError, match="holds another run"):
        check.run(recipe, [f"train.output_dir={output}"])
    assert (output / "run.json").read_text(encoding="utf-8").count("99") == 1
    fields = [change[0] for change in compare({"train.seed": 99}, check.fingerprint_of(load(recipe), check.prepare(load(recipe))))]
    check.run(recipe, [f"train.output_dir={output}"], allow_change=fields)
    said = capsys.readouterr().out
    assert "train.seed was 99 in the run that is there and is 42 now, as --allow-change permits" in said
    assert json.loads((output / "run.json").read_text(encoding="utf-8")) == {"status": "unfinished", "fingerprint": {"train.seed": 99}}


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
    assert [check.clock(s) for s in (0.25, 42.3, 400, 7200, 1e6)] == ["0.2 s", "42 s", "7 min", "2 h 00 min", "12 days"]


def test_a_check_names_what_a_deepspeed_configuration_contradicts(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.3}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"gradient_clipping: is 0\.3, and train\.max_grad_norm is 1\.0"):
        check.run(recipe, [f"train.deepspeed={config}"])
    with pytest.raises(RecipeError, match=r"train\.deepspeed: .*d\.json: no such file\. Did you mean .*ds\.json\?$"):
        check.run(recipe, [f"train.deepspeed={config.with_name('d.json')}"])
    check.run(recipe, ["train.fsdp=true"], memory=24)
    assert "planned for one process: train.fsdp and train.deepspeed" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize("command", [training.run, check.run])
def test_nothing_is_fetched_for_records_that_are_not_there(
    command: Callable[..., object], key: str, recipe: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "download", lambda *a, **k: pytest.fail("asked the net"))
    gone = records.with_name("record.json")
    with pytest.raises(DataError, match=rf"^{gone}: no such file\. Did you mean {records}\?$"):
        command(recipe, ["model.path=OpenNLPLab/TransNormerLLM-7B", f"{key}={gone}"])
