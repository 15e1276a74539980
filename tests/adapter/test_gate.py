"""Hostile and wrong adapters (reliability.md 3e): each is refused by name, and the model is as it was, bit for bit."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tnl.adapter.load import load_adapter
from tnl.errors import ModelError
from tnl.model.load import load_model
from tnl.storage import seal

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
PREFIX = "base_model.model.model"
FIRST = f"{PREFIX}.layers.0.channel_mixer.l1.lora_A.weight"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(GOLDEN, device="cpu")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "adapter-final", tmp_path / "adapter"))


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def refused(model: Any, adapter: Path, match: str) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError, match=match) as found:
        load_adapter(model, adapter)
    assert found.value.exit_code == 4 and "\n" not in str(found.value)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_whole_one_is_taken(adapter: Path) -> None:
    load_adapter(load_model(GOLDEN, device="cpu"), adapter)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, 'peft_type: is "IA3"'),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type"),
    "names code": ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping"),
    "names a module to import": ({"megatron_core": "os"}, 'megatron_core: is "os"'),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "tokenizer arguments": ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
    "changes the base": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "reads the base": ({"eva_config": {"rho": 2.0}}, "eva_config"),
    "unknown": ({"hook": "os.system"}, "hook"),
    "pattern": ({"target_modules": "(.*a)*b"}, r'is a pattern.*\["l1", "l2", "l3", "out_proj", "qkvu_proj"\]'),
    "pattern in a list": ({"target_modules": ["(.*a)*b"]}, "target_modules"),
    "pattern of ranks": ({"rank_pattern": {"(.*.*.*)*x": 4}}, "Patterns from a file"),
    "pattern excluded": ({"exclude_modules": "(.*a)*b"}, "exclude_modules"),
    "no targets": ({"target_modules": None}, "target_modules: is missing"),
    "names nothing": ({"target_modules": ["q_proj", "l1"]}, r'no module "q_proj" \(it has .*l1, l2, l3, lm_head, out_proj, qkvu_proj\)'),
    "ranks of nothing": ({"rank_pattern": {"q_proj": 4}}, 'no module "q_proj"'),
    "saves nothing": ({"modules_to_save": ["score"]}, 'no module "score"'),
    "another rank": ({"r": 4}, r"30 of 30 tensors have another shape .*is \[8, 64\].*need \[4, 64\]"),
    "a giant rank": ({"r": 2_000_000}, "a number from 1 to 16,384"),
    "a rank in words": ({"r": "8"}, "r: is"),
    "a rank that is true": ({"r": True}, "r: is true"),
    "a giant alpha": ({"lora_alpha": 1e30}, "lora_alpha"),
    "alpha not finite": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout"),
    "a giant rank by pattern": ({"rank_pattern": {"l1": 2_000_000}}, "rank_pattern|16,384"),
    "fewer targets": ({"target_modules": ["l1"]}, "24 tensors are unexpected"),
    "DoRA": ({"use_dora": True}, "15 of 45 tensors are missing"),
    "biases": ({"lora_bias": True}, "15 of 45 tensors are missing"),
    "one layer": ({"layers_to_transform": [0]}, "20 tensors are unexpected"),
    "a layer by word": ({"layers_to_transform": "0"}, "layers_to_transform"),
    "flag": ({"use_rslora": "yes"}, "use_rslora"),
    "bias": ({"bias": "some"}, "bias"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings(model: Any, adapter: Path, name: str) -> None:
    values, match = CONFIGS[name]
    change_config(adapter, **values)
    start = time.perf_counter()
    refused(model, adapter, match)
    assert time.perf_counter() - start < 5


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}


def with_value(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[FIRST][1, 2] = value
        return tensors

    return change


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "renamed": (renamed, "30 of 30 tensors are missing"),
    "empty": (lambda _: {}, "30 of 30 tensors are missing"),
    "half the layers": (lambda t: {k: v for k, v in t.items() if "layers.0" in k}, "20 of 30 tensors are missing"),
    "base weights": (lambda t: {**t, f"{PREFIX}.embed_tokens.weight": torch.zeros(160, 64)}, "weights that are the base model's"),
    "a layer too many": (lambda t: {**t, FIRST.replace("layers.0", "layers.3"): t[FIRST].clone()}, "1 tensors are unexpected"),
    "NaN": (with_value(torch.nan), "is not finite"),
    "infinity": (with_value(torch.inf), "is not finite"),
    "absurd": (with_value(1e30), "1e\\+30"),
    "float64": (lambda t: {k: v.double() for k, v in t.items()}, "is F64"),
    "integers": (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "is I8"),
    "transposed": (lambda t: {k: v.T.contiguous() for k, v in t.items()}, "another shape"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(model: Any, adapter: Path, name: str) -> None:
    change, match = TENSORS[name]
    change_tensors(adapter, change)
    refused(model, adapter, match)


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "no config": ("adapter_config.json", None, "adapter_config.json"),
    "a list": ("adapter_config.json", b"[]", "holds a list"),
    "no JSON": ("adapter_config.json", b"{", "not valid JSON"),
    "deep JSON": ("adapter_config.json", b"[" * 200_000, "not valid JSON"),
    "giant JSON": ("adapter_config.json", b" " * (1 << 20) + b"{}", "bytes"),
    "not UTF-8": ("adapter_config.json", b"\xff\xfe{}", "not valid JSON"),
    "no weights": ("adapter_model.safetensors", None, "there is no such file"),
    "no bytes": ("adapter_model.safetensors", b"", "cut short"),
    "a giant header": ("adapter_model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "cut short"),
    "a header that is no JSON": ("adapter_model.safetensors", (4).to_bytes(8, "little") + b"abcd", "header is damaged"),
    "a header that is a list": ("adapter_model.safetensors", (2).to_bytes(8, "little") + b"[]", "header is damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(model: Any, adapter: Path, name: str) -> None:
    file, content, match = FILES[name]
    if content is None:
        (adapter / file).unlink()
    else:
        (adapter / file).write_bytes(content)
    refused(model, adapter, match)


@pytest.mark.parametrize("at", [9, 4000, -1])
def test_a_file_cut_short(model: Any, adapter: Path, at: int) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:at])
    refused(model, adapter, "bytes|damaged")


def test_a_hole_or_an_overlap_in_the_file(model: Any, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    refused(model, adapter, "header is damaged")


def test_bytes_after_the_end(model: Any, adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x" * 100)
    refused(model, adapter, "its header needs")


def test_a_pickle_is_not_read(model: Any, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(model, adapter, "adapter_model.bin: is pickled")


def test_a_sealed_folder_is_held_against_its_manifest(adapter: Path) -> None:
    model = load_model(GOLDEN, device="cpu")
    seal(adapter)
    file = adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    refused(model, adapter, "adapter_model.safetensors: is damaged")
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    (adapter / "README.md").write_text("my notes", encoding="utf-8")
    load_adapter(model, adapter)


def test_a_refused_adapter_leaves_another_as_it_was(adapter: Path) -> None:
    ids = torch.randint(0, 160, (1, 20))
    model = load_adapter(load_model(GOLDEN, device="cpu"), GOLDEN / "adapter-final")
    before = model(input_ids=ids).logits
    change_tensors(adapter, lambda t: {**t, f"{PREFIX}.embed_tokens.weight": torch.zeros(160, 64)})
    with pytest.raises(ModelError, match="base model's"):
        load_adapter(model, adapter, name="other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(input_ids=ids).logits, before)
