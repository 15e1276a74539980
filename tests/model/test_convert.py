"""The gate of a base checkpoint: whatever is wrong is named before a tensor reaches the model, and nothing of a file is executed."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tnl.model  # noqa: F401 (registers the Auto classes)
from tnl.errors import ModelError
from tnl.model.load import load_model
from tnl.model.modeling_transnormer import TransnormerForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of golden/base with its safetensors alone."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "base" / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "base-sharded", tmp_path / "sharded"))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")


def test_safetensors_pickled_and_sharded_hold_the_same_model() -> None:
    expected = load_model(GOLDEN / "base", device="cpu")(IDS).logits
    pickled = AutoModelForCausalLM.from_pretrained(GOLDEN / "base-sharded", device_map="auto", torch_dtype=torch.float32)
    assert torch.equal(pickled(IDS).logits.cpu(), expected)


def test_a_single_pickled_file(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(GOLDEN / "base" / name, tmp_path / name)
    assert torch.equal(load_model(tmp_path)(IDS).logits, load_model(GOLDEN / "base")(IDS).logits)


def test_a_missing_model_type_is_mended(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_model(folder).config.model_type == "transnormer"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.layers.1.channel_mixer.l3.weight"), "1 of 18 tensors are missing (model.layers.1.channel_mixer.l3.weight)"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 tensors are unexpected (extra)"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(160, 32)}), "has shape [160, 32], the config needs [160, 64]"),
        (lambda w: w["model.embed_tokens.weight"].fill_(float("nan")), "1 tensors are not finite (model.safetensors: model.embed_tokens"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(160, 64, dtype=torch.int8)}), "is int8"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(160, 64, dtype=torch.float64)}), "is float64"),
        (lambda w: w.update({"lm_head.weight": torch.ones(160, 64)}), "lm_head.weight differs"),
        (lambda w: [w.update({f"x.{k}": w.pop(k)}) for k in list(w)], "17 of 18 tensors are missing"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    change_weights(folder, change)
    with pytest.raises(ModelError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


def test_a_tied_head_may_come_along(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decoder_layers": 2, "linear_use_lrpe_list": [1, 0]}, "unexpected"),
        ({"decoder_layers": 4, "linear_use_lrpe_list": [1, 0, 0, 0]}, "missing"),
        ({"vocab_size": 161}, "has shape [160, 64]"),
        ({"model_type": "llama"}, 'model_type is "llama"'),
        ({"decoder_layers": 0}, "positive integer"),
        ({"linear_use_lrpe_list": [1, 0]}, "linear_use_lrpe_list has 2 entries"),
        ({"decoder_attention_heads": 5}, "cannot be split"),
        ({"tie_word_embeddings": False}, "1 of 18 tensors are missing (lm_head.weight)"),
    ],
)
def test_a_config_that_contradicts_the_weights(folder: Path, values: dict[str, object], words: str) -> None:
    change_config(folder, **values)
    with pytest.raises(ModelError, match=None) as error:
        load_model(folder)
    assert words in str(error.value)


def test_code_named_in_a_config_is_not_read(folder: Path) -> None:
    marker = folder / "ran"
    for name in ("modeling_transnormer.py", "configuration_transnormer.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')", encoding="utf-8")
    change_config(folder, _attn_implementation="org/kernel", architectures=["../../x"])
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not marker.exists()


class Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran-by-pickle",)


@pytest.mark.parametrize("form", ("zip", "legacy", "raw", "inside"))
def test_a_pickle_that_is_no_tensor_is_refused_unexecuted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    if form == "raw":
        file.write_bytes(pickle.dumps(Malice()))
    else:
        value = {"a": torch.zeros(1), "b": Malice()} if form == "inside" else Malice()
        torch.save(value, file, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert "pytorch_model.bin" in str(error.value)
    assert not (tmp_path / "ran-by-pickle").exists()
    if form in ("zip", "inside"):
        assert "posix.system" in str(error.value)


def test_bombs_are_refused_by_their_headers(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    weights = torch.load(GOLDEN / "base" / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "model.embed_tokens.weight": torch.zeros(1).expand(160, 64)}, file)
    with pytest.raises(ModelError, match="claims more elements than it stores"):
        load_model(folder)
    with zipfile.ZipFile(GOLDEN / "base" / "pytorch_model.bin") as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ModelError, match="compressed storage"):
        load_model(folder)
    torch.save([1, 2], file)
    with pytest.raises(ModelError, match="holds a list"):
        load_model(folder)


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))
@pytest.mark.parametrize("keep", (0, 1, 300_000))
def test_a_file_cut_short_is_named(tmp_path: Path, name: str, keep: int) -> None:
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path)
    (tmp_path / name).write_bytes((GOLDEN / "base" / name).read_bytes()[:keep])
    with pytest.raises(ModelError, match=name):
        load_model(tmp_path)


def test_shards_missing_swapped_or_outside(sharded: Path) -> None:
    index_file = sharded / "pytorch_model.bin.index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    names = sorted(set(index["weight_map"].values()))
    key = next(k for k, v in index["weight_map"].items() if v == names[0])
    index["weight_map"][key] = names[1]
    index_file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=f"looks for {key} in the wrong shard"):
        load_model(sharded)
    index["weight_map"][key] = "../" + names[0]
    index_file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="is not the name of a file beside it"):
        load_model(sharded)
    index["weight_map"][key] = names[0]
    index_file.write_text(json.dumps(index), encoding="utf-8")
    (sharded / names[0]).unlink()
    with pytest.raises(ModelError, match=f"the shard {names[0]} is missing"):
        load_model(sharded)


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this is an adapter"):
        load_model(GOLDEN / "lora" / "adapter-final")
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path)
    with pytest.raises(ModelError, match="there are no weights"):
        load_model(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="training checkpoint"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model(tmp_path)


def test_keywords_of_transformers(folder: Path) -> None:
    model = TransnormerForCausalLM.from_pretrained(
        folder, trust_remote_code=True, low_cpu_mem_usage=True, use_cache=False, device_map={"": "cpu"}
    )
    assert model.config.use_cache is False and not model.training
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        TransnormerForCausalLM.from_pretrained(folder, nonsense=1)
    # about a download: nothing to do for a folder, refused where it would not be done
    hub = {"local_files_only": True, "cache_dir": "x", "token": "t", "force_download": True}
    assert TransnormerForCausalLM.from_pretrained(folder, **hub).config == AutoModelForCausalLM.from_pretrained(folder, **hub).config
    for key, value in hub.items():
        with pytest.raises(ModelError, match=rf"^owner/name: {key} cannot be taken for a repository") as caught:
            TransnormerForCausalLM.from_pretrained("owner/name", **{key: value})
        assert caught.value.todo
    with pytest.raises(ModelError, match="is no dtype"):
        load_model(folder, dtype="int7")
    with pytest.raises(ValueError, match="no backend"):
        load_model(folder, backend="cuda9")


def test_max_memory_is_kept_to(folder: Path) -> None:
    whole = load_model(folder, device="cpu")(IDS).logits
    spread = TransnormerForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GiB"}, dtype="float32")
    assert torch.equal(spread(IDS).logits, whole)
    with pytest.raises(ModelError, match=r"max_memory has no room for \d+ of its modules"):
        TransnormerForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": 100_000})
    with pytest.raises(ModelError, match="max_memory is for a device_map"):
        TransnormerForCausalLM.from_pretrained(folder, max_memory={"cpu": "1GiB"})


def test_a_generation_config_is_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 2}', encoding="utf-8")
    assert load_model(folder).generation_config.max_new_tokens == 7
