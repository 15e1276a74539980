import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tnl.adapter import merge as merging
from tnl.adapter.load import load_adapter
from tnl.adapter.merge import merge, run, save_model
from tnl.adapter.metadata import describe, read_adapter_metadata, write_metadata
from tnl.data.template import TEMPLATES
from tnl.errors import ModelError, NumbersError, StorageError
from tnl.model.load import load_model, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
Make = Callable[..., Path]
IDS = torch.randint(3, 6000, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_golden_merge() -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    merged = merge(load_adapter(load_model(GOLDEN, device="cpu"), GOLDEN / "adapter-final"))
    inputs = [tensor for name, tensor in expected.items() if name.endswith("input_ids")]
    differences = [float((logits(merged, ids) - expected["merged_logits"]).abs().max()) for ids in inputs]
    assert min(differences) < 1e-4
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2, "lora_alpha": 0.2},
        {"r": 1, "lora_alpha": 64},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"l1": 2}, "alpha_pattern": {"l1": 5}},
        {"modules_to_save": ["l3"], "target_modules": ["l1"]},
        {"trainable_token_indices": [3, 5], "target_modules": ["l2"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["l1"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["l1"]},
        {"target_modules": ["l1", "embed_tokens"]},
        {"target_modules": ["l1", "lm_head"]},
    ],
    ids=str,
)
def test_a_merged_folder_answers_as_its_adapter(base: Path, make_adapter: Make, tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = make_adapter(**fields)
    run(adapter, tmp_path / "out")
    adapted, merged = load_adapter(load_model(base, device="cpu"), adapter), load_model(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)
    for row in IDS:
        prompts = row[:5][None]
        one, other = (m.generate(prompts, do_sample=False, max_new_tokens=8, eos_token_id=None) for m in (adapted, merged))
        assert one.tolist() == other.tolist()


def test_what_stands_in_the_folder(base: Path, make_adapter: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = make_adapter(), tmp_path / "out"
    generation = {"do_sample": False, "max_new_tokens": 7, "temperature": 0.7, "repetition_penalty": 1.1}
    write_metadata(adapter, describe(adapter, str(base), template=TEMPLATES["alpaca"], system="hello", generation=generation))
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    run(adapter, out)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    said = capsys.readouterr().out
    assert re.search(r"largest difference of logits between adapter and merged model: \d", said) and f"tnl chat {out}" in said
    metadata = read_adapter_metadata(out)
    assert (metadata.template, metadata.system, metadata.generation) == ("alpaca", "hello", generation)
    # plain transformers takes it as it is
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generation_config.max_new_tokens == 7 and model.generation_config.repetition_penalty == 1.1
    assert tokenizer("你好").input_ids == load_tokenizer(base)("你好").input_ids
    assert "adapter_config.json" not in [file.name for file in out.iterdir()]


def test_a_base_that_moved(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    old = Path(shutil.copytree(base, tmp_path / "old"))
    adapter = make_adapter(on=old)
    old.rename(tmp_path / "new")
    with pytest.raises(ModelError, match="--base FOLDER"):
        run(adapter, tmp_path / "out")
    run(adapter, tmp_path / "out", base=str(tmp_path / "new"))


def test_an_adapter_that_changes_nothing_is_said_to(make_adapter: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(std=0.0)
    run(adapter, tmp_path / "out")
    assert "the adapter changes none" in capsys.readouterr().out


def test_a_wrong_merge_is_not_written(make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "merge_layer", lambda name, module: None)
    with pytest.raises(NumbersError, match=r"answers otherwise: .* 100\.00% of what the adapter changes"):
        run(make_adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tnl*"))


def test_the_same_bytes_each_time(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter()
    for name in ("one", "two"):
        run(adapter, tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    for file in one.iterdir():
        if file.name not in ("tnl.json", "manifest.json"):  # they hold the folder's name
            assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_in_shards(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SHARD", 100_000)
    model = load_model(base, device="cpu")
    save_model(model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path, device="cpu")), logits(model))


def test_bfloat16_is_reported_and_bounded(base: Path, make_adapter: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, half / "model.safetensors")
    run(make_adapter(on=half), tmp_path / "out")
    said = capsys.readouterr().out
    assert "bfloat16)" in said and "lost to rounding" not in said
    run(make_adapter("faint", on=half, std=1e-4), tmp_path / "faint-out")
    assert "lost to rounding: --dtype float32 keeps it" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.channel_mixer.l1.weight"].dtype == torch.bfloat16
    # an update that bfloat16 cannot hold beside the base's values
    wild = make_adapter("wild", on=half, std=3.0, lora_alpha=2000)
    monkey = dict(merging.BOUNDS)
    try:
        merging.BOUNDS[torch.bfloat16] = 1e-5
        with pytest.raises(NumbersError, match=r"answers otherwise.*float32"):
            run(wild, tmp_path / "wild-out")
    finally:
        merging.BOUNDS.update(monkey)
    assert not (tmp_path / "wild-out").exists()
    run(wild, tmp_path / "exact", "float32")
    assert "float32)" in capsys.readouterr().out


def test_a_merge_that_is_not_finite_writes_nothing(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter(lora_alpha=1_000_000, r=1)
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.full_like(t, 1e6) for name, t in load_file(file).items()}, file)
    model = load_adapter(load_model(base, device="cpu"), adapter)
    for name, parameter in model.named_parameters():
        if "l1.lora" in name:
            parameter.data.fill_(1e30)
    with pytest.raises(NumbersError, match=r"layers\.0\.channel_mixer\.l1\.weight: is not finite once merged"):
        merge(model)
    with pytest.raises(NumbersError):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tnl*"))


def test_what_is_in_the_way(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ModelError, match=r"is not empty \(found mine\.txt\)"):
        run(adapter, full)
    with pytest.raises(ModelError, match="is in the way"):
        run(adapter, full / "mine.txt")
    with pytest.raises(ModelError, match="is not empty"):
        run(adapter, base)
    (tmp_path / "empty").mkdir()
    run(adapter, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_biases_that_cannot_be_merged(make_adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bias"):
        run(make_adapter(lora_bias=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnl.storage.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"1,000 bytes free\)\. Free some space, or name a folder on another disk\."):
        run(make_adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
def test_a_disk_that_is_full_half_way(make_adapter: Make, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB: the weights do not fit, whatever the disk says of itself."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    code = f"import torch; torch.set_num_threads(1); {limit}; from tnl.cli import main; main(['merge', {str(make_adapter())!r}, 'out'])"
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 6 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: out: could not be written: ") and "File too large" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_killed_at_any_time_the_folder_is_absent_or_whole(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter()
    code = (
        f"import torch; torch.set_num_threads(1); from tnl.adapter.merge import run; print('go', flush=True); run({str(adapter)!r}, 'out')"
    )
    for wait in (0.05, 0.15, 0.25, 0.35, 0.5, 0.7):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        out = tmp_path / "out"
        if out.exists():
            assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["kind"] == "merged model"
            load_model(out, device="cpu")
            shutil.rmtree(out)
    run(adapter, tmp_path / "out")
