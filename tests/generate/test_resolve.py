import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tnl.adapter.merge import run as merge
from tnl.data.template import TEMPLATES
from tnl.errors import ModelError, RecipeError
from tnl.generate.resolve import resolve
from tnl.generate.sampling import Settings
from tnl.model import load

CPU: dict[str, Any] = {"device": "cpu"}


def test_a_run_and_its_adapter(adapter: Path, base: Path) -> None:
    for word in (adapter.parent, adapter):
        talker = resolve(str(word), {"device": "cpu", "seed": 3})
        assert talker.template is TEMPLATES["alpaca"] and talker.system == "说书人" and talker.seed == 3
        assert talker.settings == Settings(do_sample=False, max_new_tokens=6) and not talker.notices
        assert talker.name == f"{word} on tiny-base"
        assert "".join(talker.conversation().say("你好"))


def test_a_merged_model_answers_as_its_run(adapter: Path, tmp_path: Path) -> None:
    merge(adapter.parent, tmp_path / "merged")
    one, other = (resolve(str(word), {"device": "cpu"}) for word in (adapter.parent, tmp_path / "merged"))
    assert (one.template, one.system, one.settings) == (other.template, other.system, other.settings)
    assert not other.notices
    assert "".join(one.conversation().say("你好")) == "".join(other.conversation().say("你好"))


def test_a_model(base: Path, tmp_path: Path) -> None:
    talker = resolve(str(base), {"device": "cpu"})
    assert talker.template is TEMPLATES["chatml"] and talker.system is None and "chatml is used" in talker.notices[0]
    with pytest.raises(RecipeError, match="needs no base"):
        resolve(str(base), {"device": "cpu", "base": str(base)})
    folder = Path(shutil.copytree(base, tmp_path / "other"))
    (folder / "generation_config.json").unlink()
    assert resolve(str(folder), {"device": "cpu"}).settings == Settings(512, True, 0.7, 50, 0.9, 0.0, 1.03)
    published = {"do_sample": True, "temperature": 1.0, "repetition_penalty": 1.03, "max_new_tokens": 2048, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(published), encoding="utf-8")
    talker = resolve(str(folder), {"device": "cpu", "template": "alpaca", "system": "hi"})
    assert talker.settings == Settings(2048, True, 1.0, 50, 1.0, 0.0, 1.03)
    assert talker.template is TEMPLATES["alpaca"] and talker.system == "hi" and not talker.notices


def test_bfloat16_where_float32_does_not_fit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(parameter.numel() for parameter in resolve(str(base), CPU).model.parameters())
    monkeypatch.setattr(load, "free_memory", lambda device: 3 * size)
    talker = resolve(str(base), CPU)
    assert talker.model.dtype == torch.bfloat16 and any("bfloat16 is used" in notice for notice in talker.notices)
    assert not any("bfloat16" in notice for notice in resolve(str(base), {"device": "cpu", "dtype": "bfloat16"}).notices)


def test_plain_peft_without_tnl_json(adapter: Path) -> None:
    (adapter / "tnl.json").unlink()
    talker = resolve(str(adapter), {"device": "cpu"})
    assert talker.template is TEMPLATES["chatml"] and "no template is recorded" in talker.notices[0]


def test_options_stand_above_all(adapter: Path) -> None:
    talker = resolve(str(adapter), {"device": "cpu", "temperature": 0.5, "top_p": 0.8, "max_new_tokens": 3, "system": ""})
    assert talker.settings == Settings(max_new_tokens=3, do_sample=True, temperature=0.5, top_p=0.8)
    assert talker.system is None


def test_another_template_than_it_was_taught_with(adapter: Path) -> None:
    with pytest.raises(ModelError, match='taught with the template "alpaca", not "chatml"'):
        resolve(str(adapter), {"device": "cpu", "template": "chatml"})
    with pytest.raises(RecipeError, match='no template is called "chatlm"'):
        resolve(str(adapter), {"device": "cpu", "template": "chatlm"})
    values = json.loads((adapter / "tnl.json").read_text(encoding="utf-8"))
    (adapter / "tnl.json").write_text(json.dumps({**values, "template_hash": "0" * 64}), encoding="utf-8")
    with pytest.raises(ModelError, match="hash 000000000000 there"):
        resolve(str(adapter), {"device": "cpu"})


def test_another_tokenizer_than_it_was_taught_with(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    data = (other / "tokenizer.model").read_bytes()
    (other / "tokenizer.model").write_bytes(data.replace(b"\xe7\x9a\x87", b"\xe7\x9a\x88"))
    with pytest.raises(ModelError, match="is not the tokenizer that adapter was trained with"):
        resolve(str(adapter), {"device": "cpu", "base": str(other)})


def test_a_base_that_moved(adapter: Path, base: Path, tmp_path: Path) -> None:
    gone = Path(shutil.move(shutil.copytree(adapter, tmp_path / "elsewhere" / "a" / "adapter"), tmp_path / "x"))
    config = json.loads((gone / "adapter_config.json").read_text(encoding="utf-8"))
    (gone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/gone"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no longer at .*--base FOLDER"):
        resolve(str(gone), {"device": "cpu"})
    assert resolve(str(gone), {"device": "cpu", "base": str(base)}).template is TEMPLATES["alpaca"]


def test_an_unfinished_run(adapter: Path) -> None:
    run = adapter.parent
    (run / "run.json").write_text('{"status": "unfinished"}', encoding="utf-8")
    shutil.copytree(adapter, run / "checkpoint-20")
    adapter.rename(run / "checkpoint-100")
    assert "checkpoint of step 100" in resolve(str(run), {"device": "cpu"}).notices[0]
    shutil.rmtree(run / "checkpoint-20")
    shutil.rmtree(run / "checkpoint-100")
    with pytest.raises(ModelError, match=r"saved nothing to talk to yet.*tnl resume"):
        resolve(str(run), {"device": "cpu"})


def test_a_run_that_trained_every_weight(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "run" / "model")
    assert resolve(str(tmp_path / "run"), {"device": "cpu"}).template is TEMPLATES["chatml"]


def test_what_is_nothing_of_these(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Did you mean .*run\?"):
        resolve(str(tmp_path / "runn"))
    (tmp_path / "notes").mkdir()
    with pytest.raises(ModelError, match="is no model, adapter or run"):
        resolve(str(tmp_path / "notes"))
    (tmp_path / "notes/run").mkdir()
    (tmp_path / "notes/run/run.json").touch()
    with pytest.raises(ModelError, match=r"is no model, adapter or run \(found run\)\. Did you mean .*notes/run\?"):
        resolve(str(tmp_path / "notes"))


def test_a_model_with_an_adapter_in_it_is_the_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, both)
    talker = resolve(str(both), {"device": "cpu"})
    assert "the model alone is used" in talker.notices[0]
    assert torch.equal(talker.model.lm_head.weight, resolve(str(base), {"device": "cpu"}).model.lm_head.weight)
    assert not any("lora" in name for name, _ in talker.model.named_parameters())
