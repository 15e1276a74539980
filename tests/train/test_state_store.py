"""States come back as they went, in whatever order, and what does not fit is said before anything is computed."""

import pytest
import torch

from tnl import host
from tnl.errors import MemoryBudgetError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache
from tnl.train import state_store
from tnl.train.state_store import Placement, StateStore, best_every, kept_bytes, place, state_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


def states(segment: int, device: torch.device = CPU) -> list[torch.Tensor]:
    return [torch.full((1, 2, 4, 4), float(segment), device=device), torch.full((1, 2, 8, 4), segment + 0.5, device=device)]


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_goes_in_comes_out(host: bool, device: str) -> None:
    where = torch.device(device)
    store = StateStore(where, host)
    for i in range(1, 6):
        store.put(i, states(i, where))
    for i in range(5, 0, -1):
        taken = store.take(i)
        store.fetch(i - 1)
        assert all(torch.equal(a, b) and a.device.type == device for a, b in zip(taken, states(i, where)))
    store.settle()
    assert not store.kept and not store.coming and not store.leaving


def test_a_host_copy_is_a_copy() -> None:
    store, given = StateStore(CPU, True), states(1)
    store.put(1, given)
    given[0].zero_()
    assert torch.equal(store.take(1)[0], states(1)[0])


def test_auto_takes_the_host_beside_a_gpu_and_stays_on_a_cpu() -> None:
    assert place(100, 10, MIB, "auto", CUDA, 100 * MIB) == Placement(True, 1)
    assert place(100, 10, MIB, "gpu", CUDA, 100 * MIB) == Placement(False, 1)
    assert place(100, 10, MIB, "auto", CPU, 100 * MIB) == Placement(False, 1)
    assert place(1, 10, MIB, "host", CUDA, 0) == Placement(True, 1), "one segment starts from zero: nothing is kept"


def test_where_memory_is_short_every_kth_is_kept() -> None:
    for room in (20, 22, 30, 60):
        placed = place(101, 10, MIB, "auto", CUDA, room * MIB)
        assert placed.every > 1 and kept_bytes(100, placed.every, MIB) <= room * MIB < kept_bytes(100, placed.every - 1, MIB)
    assert best_every(100) == 8 and kept_bytes(100, 10, 1) == 19 and kept_bytes(0, 1, 1) == 0


def test_what_cannot_be_kept_is_said() -> None:
    with pytest.raises(MemoryBudgetError, match=r"1,010 tokens.*101 segments of 1 MiB.*longer train\.segment_length") as caught:
        place(101, 10, MIB, "auto", CUDA, 18 * MIB)
    assert caught.value.exit_code == 7 and "enough for 190 tokens" in str(caught.value) and "data.max_length=190," in str(caught.value)
    assert place(19, 10, MIB, "auto", CUDA, 18 * MIB) == Placement(True, 1), "so many fit"
    with pytest.raises(MemoryBudgetError, match=r"host memory.*train\.state_offload=auto, which keeps 1 of 2 in host memory"):
        place(101, 10, MIB, "host", CUDA, 60 * MIB)
    with pytest.raises(MemoryBudgetError, match="GPU memory"):
        place(101, 10, MIB, "gpu", CUDA, 60 * MIB)


@pytest.mark.parametrize("lrpe", [[], [1, 0, 0], [1, 1, 1]])
def test_the_bytes_are_those_of_the_states(lrpe: list[int]) -> None:
    sizes = {"vocab_size": 20, "decoder_embed_dim": 32, "hidden_dim": 32, "decoder_layers": 3, "decoder_attention_heads": 2, "glu_dim": 8}
    config = TransnormerConfig(**sizes, linear_use_lrpe_list=lrpe)
    cache = TransnormerCache(3)
    TransnormerForCausalLM(config)(torch.tensor([[1, 2]]), past_key_values=cache)
    assert state_bytes(config) == cache.num_bytes


def test_free_memory_heeds_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    free = state_store.free_host_bytes()
    assert 0 < free < 2**50
    folder = tmp_path_factory.mktemp("cgroup")
    (folder / "memory.max").write_text(str(10 * MIB), encoding="utf-8")
    (folder / "memory.current").write_text(str(5 * MIB), encoding="utf-8")
    monkeypatch.setattr(host, "CONTAINER", folder)
    assert state_store.free_host_bytes() == 4 * MIB
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {3 * MIB}\nactive_file {MIB}\nfile 9\n", encoding="utf-8")
    assert state_store.free_host_bytes() == int(0.8 * 9 * MIB)


def test_pinned_memory_that_waits_for_its_next_use_is_free() -> None:
    assert state_store.idle_pinned_bytes({"allocated_bytes.current": 100, "active_bytes.current": 30}) == 70
    assert state_store.idle_pinned_bytes({"reserved_bytes.current": 100, "allocated_bytes.current": 30}) == 70
    assert state_store.idle_pinned_bytes({"allocated_bytes.current": 100}) == state_store.idle_pinned_bytes({}) == 0


@pytest.mark.gpu
def test_free_memory_of_a_gpu() -> None:
    assert 0 < state_store.free_device_bytes(CUDA) <= torch.cuda.mem_get_info(0)[1]
