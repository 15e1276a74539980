import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnl.errors import ModelError
from tnl.generate.decode import new_cache, prefill
from tnl.generate.prefixes import HEADER, Prefixes, State, digests, load_state, model_key, save_state
from tnl.model.load import load_model


def state(*ids: int, size: int = 4, value: float = 1.0) -> State:
    return State(ids, (torch.full((1, 1, size, size), value),))


def test_the_longest_that_leaves_something_to_read() -> None:
    prefixes = Prefixes(1 << 20, 4)
    for n in (2, 4, 6):
        prefixes.put("a", state(*range(n)))
    assert prefixes.find("a", range(6)).ids == (0, 1, 2, 3)  # type: ignore[union-attr]
    assert prefixes.find("a", range(7)).ids == tuple(range(6))  # type: ignore[union-attr]
    assert prefixes.find("a", [0, 1, 9, 3, 4]).ids == (0, 1)  # type: ignore[union-attr]
    assert prefixes.find("a", [0, 2]) is None
    assert prefixes.find("b", range(7)) is None
    assert (prefixes.hits, prefixes.misses, prefixes.saved_tokens) == (3, 2, 12)


def test_the_budget_holds_and_the_least_recently_used_goes() -> None:
    one = state(0, 1).num_bytes
    prefixes = Prefixes(3 * one, 4)
    for first in (10, 20, 30):
        prefixes.put("a", state(first, 1))
    assert prefixes.find("a", [10, 1, 2]) is not None
    prefixes.put("a", state(40, 1))
    assert prefixes.used == 3 * one and len(prefixes) == 3
    assert prefixes.get("a", [20, 1]) is None
    assert all(prefixes.get("a", [first, 1]) is not None for first in (10, 30, 40))
    prefixes.put("a", state(*range(1000)))
    assert len(prefixes) == 3 and prefixes.get("a", range(1000)) is None


def test_what_the_device_has_no_room_for_goes_to_the_host_first() -> None:
    one, moved = state(0, 1).num_bytes, []

    def demote(one: State) -> State:
        moved.append(one.ids)
        return State(one.ids, one.states, {"host": True})

    prefixes = Prefixes(2 * one, 4, demote)
    for first in (10, 20, 30):
        prefixes.put("a", state(first, 1))
    assert moved == [(10, 1)] and prefixes.used == 3 * one and prefixes.demoted_bytes == one
    assert prefixes.find("a", [10, 1, 5]).about == {"host": True}  # type: ignore[union-attr]
    for first in (40, 50, 60):
        prefixes.put("a", state(first, 1))
    assert moved == [(10, 1), (20, 1), (30, 1), (40, 1)]
    assert prefixes.used == 4 * one and prefixes.demoted_bytes == 2 * one and len(prefixes) == 4
    assert [first for first in (10, 20, 30, 40, 50, 60) if prefixes.get("a", [first, 1])] == [10, 40, 50, 60]  # 10 was used since


def test_a_state_that_is_not_finite_is_not_kept() -> None:
    prefixes = Prefixes(1 << 20, 4)
    prefixes.put("a", state(1, 2, value=torch.nan))
    prefixes.put("a", state(1, 2, value=torch.inf))
    assert len(prefixes) == 0


def test_no_budget_keeps_nothing() -> None:
    prefixes = Prefixes(0, 4)
    prefixes.put("a", state(1))
    assert prefixes.shared("a", range(100)) == prefixes.shared("a", range(100)) == 0
    assert len(prefixes) == 0


def test_what_prompts_share_is_cut_at_the_grid() -> None:
    prefixes = Prefixes(1 << 20, 4)
    assert prefixes.shared("a", [*range(10), 99]) == 0
    assert prefixes.shared("a", [*range(10), 77, 78]) == 8
    assert prefixes.shared("b", range(10)) == 0
    assert prefixes.shared("a", range(8)) == 4  # one id at least is left to read


def test_digests_are_those_of_the_beginnings() -> None:
    ids = list(range(50))
    assert digests(ids, [3, 50]) == [digests(ids[:3], [3])[0], digests(ids, [50])[0]]
    assert len({*digests([1, 2, 3], [1, 2, 3]), *digests([256], [1]), *digests([0, 1], [2])}) == 5


def test_a_branch_goes_its_own_way(model: Any) -> None:
    cache = new_cache(model)
    prefill(model, [5, 6, 7], cache)
    kept = State.of(cache, [5, 6, 7])
    before = [one.clone() for one in kept.states]
    one, other = kept.cache(), kept.cache()
    assert torch.equal(prefill(model, [8], one), prefill(model, [8], other))
    prefill(model, [9, 10], one)
    torch.testing.assert_close(prefill(model, [9], other), prefill(model, [5, 6, 7, 8, 9], new_cache(model)), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, kept.states))
    with pytest.raises(ValueError, match="has read 3 tokens, not 2"):
        State.of(cache, [5, 6])


def test_the_key_is_of_the_weights(model: Any, base: Path) -> None:
    key = model_key(model)
    assert key == model_key(load_model(base, device="cpu"))
    other = load_model(base, device="cpu")
    with torch.no_grad():
        other.model.layers[1].channel_mixer.l3.weight[0, 0] += 1
    assert model_key(other) != key


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    cache = new_cache(model)
    prefill(model, [5, 6, 7], cache)
    path = tmp_path / "talk.state"
    save_state(path, State.of(cache, [5, 6, 7], {"messages": [{"role": "user", "content": "你好"}]}), "scope")
    return path


def test_a_saved_conversation_goes_on_bit_for_bit(model: Any, saved: Path) -> None:
    cache = new_cache(model)
    prefill(model, [5, 6, 7], cache)
    loaded = load_state(saved, model, "scope")
    assert loaded.ids == (5, 6, 7) and loaded.about["messages"][0]["content"] == "你好"
    assert torch.equal(prefill(model, [8, 9], loaded.cache()), prefill(model, [8, 9], cache))
    assert [path.name for path in saved.parent.iterdir()] == ["talk.state"]


@pytest.mark.parametrize("damage", ["scope", "cut", "text", "header", "shape", "nan", "ids", "extra", "format", "missing", "folder"])
def test_a_damaged_or_foreign_file_is_refused(model: Any, saved: Path, damage: str) -> None:
    tensors, scope = load_file(saved), "scope"
    about = {"format": 1, "scope": "scope", "tokens": 3, "about": {}}
    match damage:
        case "scope":
            scope = "another"
        case "cut":
            saved.write_bytes(saved.read_bytes()[:-7])
        case "text":
            saved.write_text("hello", encoding="utf-8")
        case "header":
            save_file(tensors, saved, metadata={HEADER: "[" * 100_000})
        case "shape":
            tensors["layers.0"] = tensors["layers.0"][:, :1].contiguous()
        case "nan":
            tensors["layers.1"][0, 0, 0, 0] = torch.nan
        case "ids":
            tensors["ids"][0] = 6000
        case "extra":
            tensors["more"] = torch.zeros(1)
        case "format":
            about["format"] = 2
        case "missing":
            saved.unlink()
        case "folder":
            saved.unlink()
            saved.mkdir()
    if damage in ("shape", "nan", "ids", "extra", "format"):
        save_file(tensors, saved, metadata={HEADER: json.dumps(about)})
    with pytest.raises(ModelError, match=r"talk\.state"):
        load_state(saved, model, scope)
