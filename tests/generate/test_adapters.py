import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tnl.adapter.load import load_adapter
from tnl.errors import ModelError
from tnl.generate.adapters import Adapters, AdaptersBusy
from tnl.generate.engine import Engine
from tnl.generate.prefixes import load_state
from tnl.generate.request import Request
from tnl.generate.sampling import Settings
from tnl.generate.slots import forward, head
from tnl.kernels.reference import Rows
from tnl.model.load import load_model
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
ALL = ["qkvu_proj", "out_proj", "l1", "l2", "l3"]
GREEDY = Settings(do_sample=False, max_new_tokens=12)
IDS = (5, 9, 700, 31, 2000)
Make = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path, base: Path) -> Make:
    """make_adapter(name, seed, **LoraConfig's fields) -> folder of a random adapter of `base`."""

    def make(name: str, seed: int = 1, **fields: Any) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **fields})
        model = get_peft_model(load_model(base, device="cpu"), config)
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in parameter_name:
                parameter.data += torch.randn_like(parameter) * 0.3
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        return tmp_path / name

    return make


@torch.inference_mode()
def logits(model: Any, adapters: Adapters, keys: list[str | None]) -> torch.Tensor:
    """One row of IDS an adapter, [B, T, V]."""
    rows = torch.tensor([adapters.row(key) for key in keys])
    ids = torch.tensor([IDS] * len(keys))
    positions = torch.arange(len(IDS)).expand(len(keys), -1)
    hidden, _ = forward(model, ids, [None] * model.config.decoder_layers, Rows(positions), adapters.wrap(rows))
    return head(model, hidden, adapters.wrap_head(rows))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 3, "lora_alpha": 5},
        {"use_rslora": True, "r": 8},
        {"target_modules": ["l3"]},
        {"layers_to_transform": [1], "target_modules": ["qkvu_proj"]},
        {"rank_pattern": {"out_proj": 7}, "alpha_pattern": {"l1": 2}},
        {"target_modules": [*ALL, "lm_head"]},
    ],
    ids=str,
)
def test_each_row_has_what_peft_gives_it(model: Any, base: Path, make_adapter: Make, fields: dict[str, Any]) -> None:
    folders = [make_adapter("one", **fields), make_adapter("two", seed=2, r=2)]
    adapters = Adapters(model)
    keys = [adapters.load(folder) for folder in folders]
    found = logits(model, adapters, [keys[0], None, keys[1], keys[0]])
    for row, folder in ((0, folders[0]), (2, folders[1]), (3, folders[0])):
        with torch.no_grad():
            expected = load_adapter(load_model(base, device="cpu"), folder)(torch.tensor([IDS])).logits
        torch.testing.assert_close(found[row], expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0], found[3])
    with torch.no_grad():
        torch.testing.assert_close(found[1], model(torch.tensor([IDS])).logits[0], atol=1e-5, rtol=1e-5)


def test_the_golden_adapter_in_a_batch() -> None:
    folder = GOLDEN / "lora"
    model = load_model(folder, device="cpu")
    adapters = Adapters(model)
    key = adapters.load(folder / "adapter-final")
    merged = load_adapter(load_model(folder, device="cpu"), folder / "adapter-final").merge_and_unload()
    ids = (5, 9, 70, 31, 20)
    tokenizer = BaiChuanTokenizer.from_pretrained(GOLDEN / "tokenizer")
    engine = Engine(model, tokenizer, adapters=adapters)
    tickets = [engine.submit(Request(ids, GREEDY, adapter=one, logprobs=0)) for one in (key, None, key)]
    while engine.step():
        pass
    found = [[one.value for one in ticket.answers[0].logprobs] for ticket in tickets]
    alone = [Engine(one, tokenizer).generate(Request(ids, GREEDY, logprobs=0))[0] for one in (merged, model)]
    tuned, plain = ([one.value for one in answer.logprobs] for answer in alone)
    assert found[0] == found[2] == pytest.approx(tuned, abs=1e-4)
    assert found[1] == pytest.approx(plain, abs=1e-4)
    assert abs(tuned[0] - plain[0]) > 0.01


def test_the_key_is_the_content(model: Any, make_adapter: Make, tmp_path: Path) -> None:
    adapters = Adapters(model)
    one = make_adapter("one")
    key = adapters.load(one)
    shutil.copytree(one, tmp_path / "same")
    assert adapters.load(tmp_path / "same") == key and adapters.keys == [key]
    other = adapters.load(make_adapter("other", seed=2))
    scaled = adapters.load(make_adapter("scaled", lora_alpha=9))
    assert len({key, other, scaled}) == 3
    assert Adapters(model).load(one) == key


def test_a_replaced_folder_is_another_adapter(model: Any, make_adapter: Make, tmp_path: Path) -> None:
    adapters = Adapters(model)
    folder = make_adapter("one")
    old = adapters.load(folder)
    before = logits(model, adapters, [old])
    shutil.rmtree(folder)
    shutil.move(make_adapter("two", seed=2), folder)
    new = adapters.load(folder)
    found = logits(model, adapters, [old, new])
    torch.testing.assert_close(found[0], before[0], atol=1e-5, rtol=1e-5)
    assert new != old and not torch.allclose(found[1], before[0], atol=0.1)


def test_the_least_recently_used_goes_and_never_one_in_use(model: Any, make_adapter: Make) -> None:
    folders = [make_adapter(f"a{i}", seed=i) for i in range(4)]
    adapters = Adapters(model, capacity=2)
    first = adapters.load(folders[0], hold=True)
    second = adapters.load(folders[1])
    third = adapters.load(folders[2])
    assert adapters.keys == [first, third]
    with pytest.raises(KeyError):
        adapters.hold(second)
    adapters.hold(third)
    with pytest.raises(AdaptersBusy, match="all 2 places are in use"):
        adapters.load(folders[3])
    with pytest.raises(AdaptersBusy, match="1 requests use it"):
        adapters.unload(first)
    adapters.release(first)
    fourth = adapters.load(folders[3])
    assert adapters.keys == [third, fourth] and adapters.users(third) == 1
    adapters.unload(fourth)
    adapters.unload("none is called so")
    assert adapters.keys == [third]


def test_a_place_that_is_used_again_keeps_nothing_of_the_former(model: Any, make_adapter: Make) -> None:
    adapters = Adapters(model, capacity=1)
    adapters.load(make_adapter("wide", r=8))
    narrow = make_adapter("narrow", seed=2, r=2, target_modules=["l1"])
    found = logits(model, adapters, [adapters.load(narrow)])
    fresh = Adapters(model, capacity=1)
    torch.testing.assert_close(found, logits(model, fresh, [fresh.load(narrow)]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"modules_to_save": ["lm_head"], "target_modules": ["l1"]}], ids=str)
def test_what_cannot_share_a_batch_says_so(model: Any, make_adapter: Make, fields: dict[str, Any]) -> None:
    adapters = Adapters(model)
    with pytest.raises(ModelError, match="tnl merge"):
        adapters.load(make_adapter("one", **fields))
    assert adapters.keys == []


def test_an_answer_with_an_adapter_is_the_merged_models(model: Any, tokenizer: Any, base: Path, make_adapter: Make) -> None:
    folders = [make_adapter("one"), make_adapter("two", seed=2, r=2)]
    adapters = Adapters(model)
    keys: list[str | None] = [None, *(adapters.load(folder) for folder in folders)]
    engine = Engine(model, tokenizer, adapters=adapters)
    engine.slots.poison()
    tickets = [engine.submit(Request(IDS, GREEDY, adapter=key)) for key in keys * 3]
    while engine.step():
        pass
    expected = [Engine(model, tokenizer).generate(Request(IDS, GREEDY))[0].ids]
    for folder in folders:
        merged = load_adapter(load_model(base, device="cpu"), folder).merge_and_unload()
        expected.append(Engine(merged, tokenizer).generate(Request(IDS, GREEDY))[0].ids)
    assert [ticket.answers[0].ids for ticket in tickets] == expected * 3
    assert expected[0] != expected[1] != expected[2]
    assert all(not adapters.users(key) for key in keys if key)


def test_an_adapter_is_held_until_its_request_ends(model: Any, tokenizer: Any, make_adapter: Make) -> None:
    adapters = Adapters(model, capacity=1)
    key = adapters.load(make_adapter("one"))
    engine = Engine(model, tokenizer, adapters=adapters, slots=8)
    waiting = [engine.submit(Request(IDS, GREEDY, adapter=key, n=8)) for _ in range(2)]
    engine.step()
    with pytest.raises(AdaptersBusy, match="2 requests"):
        adapters.unload(key)
    waiting[1].cancel()
    engine.step()
    assert adapters.users(key) == 1
    while engine.step():
        pass
    adapters.unload(key)
    with pytest.raises(KeyError):
        engine.submit(Request(IDS, GREEDY, adapter=key))


def test_prefix_states_are_kept_apart_by_adapter(model: Any, tokenizer: Any, make_adapter: Make, tmp_path: Path) -> None:
    adapters = Adapters(model)
    key = adapters.load(make_adapter("one"))
    engine = Engine(model, tokenizer, adapters=adapters, chunk=4)
    ids = tuple(range(10, 50))
    for adapter in (None, key):
        alone = Engine(model, tokenizer, adapters=adapters, chunk=4, prefix_bytes=0).generate(Request(ids, GREEDY, adapter=adapter))[0]
        tickets = []
        for _ in range(3):
            tickets.append(engine.submit(Request(ids, GREEDY, adapter=adapter)))
            while engine.step():
                pass
        assert [ticket.cached_tokens for ticket in tickets] == [0, 0, 36]
        assert all(ticket.answers[0].ids == alone.ids for ticket in tickets)
    engine.save_state(tmp_path / "one.state", ids, key)
    assert engine.load_state(tmp_path / "one.state", key).ids == ids
    with pytest.raises(ModelError, match="another model or adapter"):
        load_state(tmp_path / "one.state", model, engine.scope(None))
