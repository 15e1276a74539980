"""`tnl evaluate`: what training measured is what is measured afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tnl.errors import DataError, ModelError
from tnl.evaluate import perplexity
from tnl.evaluate import run as evaluating
from tnl.model import stream
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.load import load
from tnl.train import run as training
from tnl.train.callbacks import read_metrics

torch.set_num_threads(1)
TOKENIZER = Path(__file__).resolve().parents[1] / "golden" / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}
    TransnormerForCausalLM(TransnormerConfig(vocab_size=6000, init_std=0.1, **sizes)).save_pretrained(folder / "base")
    shutil.copy(TOKENIZER, folder / "base")
    rows = [{"instruction": f"第{i}问", "input": "", "output": f"第{i}答。"} for i in range(30)]
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    train = {"output_dir": str(folder / "run"), "max_steps": 3, "eval_steps": 3, "save_steps": 3, "learning_rate": 0.05, "use_cpu": True}
    sections = {
        "model": {"path": str(folder / "base")},
        "data": {"train": str(folder / "rows.json"), "eval": 0.2, "max_length": 64},
        "lora": {"r": 2},
        "train": train,
        "generation": {"max_new_tokens": 2},
    }
    (folder / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")
    return folder / "recipe.yaml"


def test_a_run_is_measured_with_and_without_its_adapter(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = evaluating.run(recipe)["base"]
    work = training.run(recipe)
    found = evaluating.run(work.path)
    assert found["base"] == base
    last = [line["eval_loss"] for line in read_metrics(work.metrics) if "eval_loss" in line][-1]
    assert found["adapter"].loss == pytest.approx(last, abs=1e-5) and found["adapter"].loss < base.loss
    assert found["adapter"].records == 6 and "6 held-out records" in capsys.readouterr().out
    first = int(perplexity.supervised_places(evaluating.held_out(load(recipe), recipe.parent / "base")[0])[2])
    monkeypatch.setattr(stream, "FIRST_BUCKET", first)
    assert len(evaluating.run(work.path)["adapter"].by_position) == 2
    assert f"tokens {first} to {2 * first - 1} of their records: perplexity" in capsys.readouterr().out


def test_a_run_of_all_weights_is_measured_too(recipe: Path, tmp_path: Path) -> None:
    work = training.run(recipe, ["lora=null", f"train.output_dir={tmp_path / 'full'}", "train.learning_rate=1e-2"])
    found = evaluating.run(work.path)
    assert found["trained"].loss < found["base"].loss


def test_mistakes(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record is held out"):
        evaluating.run(recipe, ["data.eval=0"])
    with pytest.raises(ModelError, match="not the folder of a run"):
        evaluating.run(tmp_path)
    shutil.copy(recipe, tmp_path / "recipe.yaml")
    with pytest.raises(ModelError, match="has no adapter yet"):
        evaluating.run(tmp_path)
