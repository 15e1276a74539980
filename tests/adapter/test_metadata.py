import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnl.adapter.metadata import Metadata, describe, read_adapter_metadata, relative, template_of, weights_hash, write_metadata
from tnl.data.template import TEMPLATES
from tnl.errors import ModelError

GOLDEN = Path(__file__).parents[1] / "golden"


def test_what_is_written_is_read(base: Path, tmp_path: Path) -> None:
    metadata = describe(tmp_path, str(base), template=TEMPLATES["alpaca"], system="你好", generation={"top_p": 0.9})
    write_metadata(tmp_path, metadata)
    assert read_adapter_metadata(tmp_path) == metadata
    assert template_of(metadata, tmp_path) is TEMPLATES["alpaca"]
    assert metadata.base is not None and metadata.base.name == "tiny-base"


def test_none_is_empty(tmp_path: Path) -> None:
    assert read_adapter_metadata(tmp_path) == Metadata()
    assert template_of(Metadata(), tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "{",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "base": 3, "template": null, "template_hash": null, "system": null, "generation": {}}',
        '{"format": 1, "base": null, "template": 5, "template_hash": null, "system": null, "generation": {}}',
        '{"format": 1, "base": null, "template": null, "template_hash": null, "system": null, "generation": []}',
        '{"format": 1, "base": {"path": 1, "name": "", "config": {}, "weights": "", "tokenizer": ""}, "template": null, '
        '"template_hash": null, "system": null, "generation": {}}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tnl.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"tnl\.json"):
        read_adapter_metadata(tmp_path)


def test_another_template_is_refused(base: Path, tmp_path: Path) -> None:
    write_metadata(tmp_path, describe(tmp_path, str(base), template=TEMPLATES["chatml"]))
    values = json.loads((tmp_path / "tnl.json").read_text(encoding="utf-8"))
    for changed, match in (
        ({"template_hash": "0" * 64}, "is not this version's"),
        ({"template": "llama"}, 'no template is called "llama"'),
    ):
        (tmp_path / "tnl.json").write_text(json.dumps({**values, **changed}), encoding="utf-8")
        with pytest.raises(ModelError, match=match):
            template_of(read_adapter_metadata(tmp_path), tmp_path)


def test_the_hash_is_that_of_the_values(tmp_path: Path) -> None:
    """One file, pickled shards, safetensors, another dtype: the same model. One other value: another."""
    expected = weights_hash(GOLDEN / "base-sharded")
    (tmp_path / "config.json").write_bytes((GOLDEN / "base" / "config.json").read_bytes())
    tensors = load_file(GOLDEN / "base" / "model.safetensors")
    for write in (tensors, {name: tensor.double().float().clone() for name, tensor in reversed(tensors.items())}):
        save_file(write, tmp_path / "model.safetensors")
        assert weights_hash(tmp_path) == expected
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "model.safetensors")
    small = weights_hash(tmp_path)
    save_file({name: tensor.float() for name, tensor in rounded.items()}, tmp_path / "model.safetensors")
    assert weights_hash(tmp_path) == small != expected
    tensors["model.layers.1.token_mixer.out_proj.weight"] = torch.randn(64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_hash(tmp_path) != expected


def test_relative() -> None:
    assert relative(Path("/a/b"), Path("/a/c/d")) == "../../b"
