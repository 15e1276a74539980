import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tnl.adapter.load import adapter_folder, base_folder, base_of, load_adapter
from tnl.adapter.metadata import describe, write_metadata
from tnl.data.template import TEMPLATES
from tnl.errors import ModelError
from tnl.model.load import load_model

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
Make = Callable[..., Path]
IDS = torch.randint(3, 6000, (1, 20), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_golden_adapter() -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    model = load_adapter(load_model(GOLDEN, device="cpu"), GOLDEN / "adapter-final")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    ids = expected["step9.micro1.input_ids"]
    for name, tensor in expected.items():
        if name.endswith("input_ids"):
            found = logits(model, tensor)
            if torch.allclose(found, expected["final_logits"], atol=1e-4):
                return
    torch.testing.assert_close(logits(model, ids), expected["final_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "r": 6},
        {"rank_pattern": {"l1": 2, "model.layers.1.token_mixer.out_proj": 3}, "alpha_pattern": {"l1": 5}},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["l1"]},
        {"target_modules": ["l1", "embed_tokens"]},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"lora_bias": True},
        {"exclude_modules": ["l3"]},
        {"trainable_token_indices": [3, 5], "target_modules": ["l2"]},
    ],
    ids=str,
)
def test_whatever_peft_saves_loads_as_peft_loads_it(base: Path, make_adapter: Make, fields: dict[str, Any]) -> None:
    folder = make_adapter(**fields)
    theirs = PeftModel.from_pretrained(load_model(base, device="cpu"), str(folder)).eval()
    ours = load_adapter(load_model(base, device="cpu"), folder)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(load_model(base, device="cpu")))


def test_attaching_leaves_the_randomness_alone(base: Path, make_adapter: Make) -> None:
    model, folder = load_model(base, device="cpu"), make_adapter()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_adapter(model, folder)
    assert torch.equal(torch.rand(3), expected)


def test_a_second_adapter_beside_the_first(base: Path, make_adapter: Make) -> None:
    one, other = make_adapter("one"), make_adapter("other", std=0.3, r=2)
    model = load_adapter(load_model(base, device="cpu"), one, name="one")
    first = logits(model)
    load_adapter(model, other, name="other")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(load_adapter(load_model(base, device="cpu"), other)))
    with pytest.raises(ModelError, match='an adapter called "one" already'):
        load_adapter(model, one, name="one")


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "a\0", "x" * 65, "名"])
def test_names_that_peft_stumbles_over(name: str, base: Path, make_adapter: Make) -> None:
    with pytest.raises(ModelError, match="cannot be an adapter's name"):
        load_adapter(load_model(base, device="cpu"), make_adapter(), name=name)


def test_when_memory_ends_in_the_middle(base: Path, make_adapter: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make_adapter("one"), make_adapter("other", r=2)
    bare = load_model(base, device="cpu")
    names, before = [name for name, _ in bare.named_parameters()], logits(bare)

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("tnl.adapter.load.set_peft_model_state_dict", full)
        with pytest.raises(MemoryError):
            load_adapter(bare, one)
    assert [name for name, _ in bare.named_parameters()] == names and torch.equal(logits(bare), before)
    adapted = load_adapter(bare, one)
    names, before = [name for name, _ in adapted.named_parameters()], logits(adapted)
    with monkeypatch.context() as patch:
        patch.setattr("tnl.adapter.load.set_peft_model_state_dict", full)
        with pytest.raises(MemoryError):
            load_adapter(adapted, other, name="other")
    assert [name for name, _ in adapted.named_parameters()] == names and torch.equal(logits(adapted), before)
    assert list(adapted.peft_config) == ["default"]


def test_bfloat16_base_and_adapter(base: Path, make_adapter: Make) -> None:
    model = load_adapter(load_model(base, dtype="bfloat16", device="cpu"), make_adapter())
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert base_of(model).dtype == torch.bfloat16


def test_an_adapter_of_another_base_is_refused(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter()
    write_metadata(folder, describe(folder, str(base), template=TEMPLATES["chatml"]))
    load_adapter(load_model(base, device="cpu"), folder)
    # same sizes, other weights: plain peft would take it
    other = Path(shutil.copytree(base, tmp_path / "other"))
    model = load_model(base, device="cpu")
    model.model.layers[0].channel_mixer.l1.weight.data *= 2
    model.save_pretrained(other)
    with pytest.raises(ModelError, match=r"trained on tiny-base; .*other has the same sizes but other weights"):
        load_adapter(load_model(other, device="cpu"), folder)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "linear_act_fun": "relu"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"trained on tiny-base \(linear_act_fun silu, here relu\)"):
        load_adapter(load_model(other, device="cpu"), folder)


def test_a_path_that_does_not_exist_names_its_nearest_sibling(make_adapter: Make) -> None:
    folder = make_adapter("persona")
    with pytest.raises(ModelError, match=r"Did you mean .*persona\?"):
        adapter_folder(folder.parent / "personna")
    with pytest.raises(ModelError, match="is a file"):
        adapter_folder(folder / "adapter_config.json")
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        adapter_folder(folder.parent)


def test_a_run_stands_for_its_adapter(make_adapter: Make) -> None:
    folder = make_adapter("adapter")
    assert adapter_folder(folder.parent) == folder


def test_where_the_base_is(base: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_adapter("run/adapter")
    assert base_folder(folder) == base.resolve()
    near = Path(shutil.copytree(base, tmp_path / "near"))
    write_metadata(folder, describe(folder, str(near)))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "near"}), encoding="utf-8")
    assert json.loads((folder / "tnl.json").read_text(encoding="utf-8"))["base"]["path"] == "../../near"
    assert base_folder(folder) == near
    # the adapter alone was moved, but the recipe's word still holds from here
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.copytree(folder, tmp_path / "a" / "b" / "c"))
    assert base_folder(moved) == near
    monkeypatch.chdir(base)
    with pytest.raises(ModelError, match=r"the base model, near, is no longer at \.\./\.\./near.*--base"):
        base_folder(moved)
    assert base_folder(moved, str(base)) == base


def test_a_whole_tree_may_move(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter("tree/run/adapter")
    shutil.copytree(base, tmp_path / "tree" / "base")
    write_metadata(folder, describe(folder, str(tmp_path / "tree" / "base")))
    (tmp_path / "tree").rename(tmp_path / "moved")
    assert base_folder(tmp_path / "moved" / "run" / "adapter") == (tmp_path / "moved" / "base").resolve()


def test_an_adapter_that_names_no_base(make_adapter: Make) -> None:
    folder = make_adapter()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for word, match in ((None, "is missing"), ("../not-here", "names no model that is here")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": word}), encoding="utf-8")
        with pytest.raises(ModelError, match=f"{match}.*--base"):
            base_folder(folder)


def test_a_base_that_no_file_places_is_asked_of_the_hub_that_is_named(
    base: Path, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}), encoding="utf-8")
    asked: list[Any] = []
    monkeypatch.setattr("tnl.hub.download", lambda repo, *, hub, **_: asked.append((repo, hub)) or base)
    assert base_folder(folder, None, "modelscope") == base_folder(folder, "owner/other", "modelscope") == base
    assert asked == [("owner/base", "modelscope"), ("owner/other", "modelscope")]
