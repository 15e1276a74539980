"""Recomputed layers against kept ones: the same bits, and no residual stream left between the passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tnl.model import modeling_transnormer
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection
from tnl.train import lora, recomputation
from tnl.train.recomputation import LEVELS
from tnl.train.state_store import StateStore
from tnl.train.step import Rows, step

SIZES = {"vocab_size": 50, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 3, "decoder_attention_heads": 2, "glu_dim": 24}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device: str, section: LoraSection | None) -> nn.Module:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(TransnormerConfig(**SIZES, linear_use_lrpe_list=[1, 0, 0]))
    model = lora.attach(base, section, "recipe.yaml", 1, lambda line: None)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.to(device).train()


def record(length: int, number: int) -> dict[str, Any]:
    ids = torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    return {"id": f"r{number}", "input_ids": ids, "labels": ids}


def gradients(model: nn.Module, rows: Rows) -> dict[str, torch.Tensor]:
    step(model, [record(9, 1), record(30, 2), record(4, 3)], rows, seed=5)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [1000, 32], ids=["one row", "several rows"])
@pytest.mark.parametrize(
    "section",
    [
        LoraSection(r=4, lora_dropout=0.3),
        LoraSection(r=4, target_modules=["l1"], layers_to_transform=[1]),
        LoraSection(use_dora=True),
        None,
    ],
    ids=["every layer", "one layer", "DoRA", "every weight"],
)
def test_the_same_bits(device: str, budget: int, section: LoraSection | None) -> None:
    expected = gradients(make(device, section), Rows(budget))
    for level in LEVELS[1:]:
        model = make(device, section)
        recomputation.use(model, level)
        found = gradients(model, Rows(budget))
        assert found.keys() == expected.keys() and found
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), (level, name)


@pytest.mark.parametrize("section", [LoraSection(r=4, lora_dropout=0.3), None], ids=["LoRA", "every weight"])
def test_float64_gradients_of_a_glu_that_is_computed_again(section: LoraSection | None) -> None:
    found = {}
    for level in ("none", "glu"):
        model = make("cpu", section).double()
        recomputation.use(model, level)
        found[level] = gradients(model, Rows(1000))
    assert found["glu"] and found["glu"].keys() == found["none"].keys()
    for name, grad in found["glu"].items():
        torch.testing.assert_close(grad, found["none"][name], rtol=1e-12, atol=1e-15)


def test_levels_rise_and_never_fall() -> None:
    model = make("cpu", LoraSection(r=4))
    assert recomputation.level_of(model) == "none" and recomputation.leaner(model) == "glu"
    for level, then in (("glu", "glu"), ("none", "glu"), ("layer", "layer"), ("glu", "layer"), ("host", "layer")):
        recomputation.use(model, level)
        assert recomputation.level_of(model) == then, "on a CPU there is no other memory to wait in"
        assert all(layer.glu_again == (then == "glu") for layer in model.get_base_model().model.layers)
    assert recomputation.leaner(model) is None and recomputation.why_not_recorded(model) == ""
    recomputation.use(other := make("cpu", LoraSection(r=4, use_dora=True)), "layer")
    assert "torch.utils.checkpoint" in recomputation.why_not_recorded(other)


@pytest.mark.parametrize(
    ("section", "halves"), [(LoraSection(r=4, lora_dropout=0.3), 13), (LoraSection(r=4, lora_dropout=0.0), 3), (None, 3)]
)
def test_of_a_glu_that_is_computed_again_nothing_wide_is_kept(section: LoraSection | None, halves: int) -> None:
    """Per token and layer: l1's and l2's outputs and their product, 4 bytes each; with dropout l3's mask as well, and what it leaves."""
    wide = {}
    for level in ("none", "glu"):
        model = make("cpu", section)
        recomputation.use(model, level)
        wide[level] = saved_bytes(model, lambda x: x.shape[-1] == SIZES["glu_dim"] and x.shape[-2] == 43)
    per_half = SIZES["decoder_layers"] * 43 * SIZES["glu_dim"] * (1 if halves == 13 else 4)
    assert wide == {"none": halves * per_half, "glu": 0}


def saved_bytes(model: nn.Module, counted: Callable[[torch.Tensor], bool]) -> int:
    """Bytes that a row of 43 tokens keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.dim() > 1 and counted(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.tensor([record(43, 1)["input_ids"]])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(input_ids=ids, use_cache=False)
    assert out.logits.requires_grad  # all that is kept lives on
    return sum(kept.values())


def test_every_layer_is_computed_twice_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, real = make("cpu", LoraSection(r=4)), list[int](), modeling_transnormer.decoder_layer
    recomputation.use(model, "host")
    monkeypatch.setattr(
        modeling_transnormer, "decoder_layer", lambda x, state, w, *rest: (seen.append(w.number), real(x, state, w, *rest))[1]
    )
    gradients(model, Rows(1000))
    assert seen == [0, 1, 2, 2, 1, 0]
    assert not model.get_base_model().model.layers[0]._gradient_checkpointing_func.args[0].store.kept


def test_a_pass_that_was_cut_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was on its way back when memory ran out is not taken for what enters the layer next time."""
    monkeypatch.setattr(recomputation, "StateStore", lambda device, host: StateStore(device, host=True))
    kept = recomputation.Kept(torch.device("cpu"), True)
    for start in (0.0, 10.0):
        for number in range(3):
            kept.put(number, torch.tensor([start + number]))
        assert kept.take(2) == start + 2
        assert kept.take(1) == start + 1  # that of layer 0 comes
    assert kept.take(0) == 10


@pytest.mark.gpu
def test_on_a_gpu_the_residual_stream_waits_in_host_memory() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"decoder_layers": 12, "decoder_embed_dim": 256, "hidden_dim": 256, "glu_dim": 256}
    peaks = {}
    for own in (True, False):
        base = TransnormerForCausalLM(TransnormerConfig(**sizes)).cuda().bfloat16()
        model = lora.attach(base, LoraSection(r=4), "recipe.yaml", 1, lambda line: None).train()
        recomputation.use(model, "host", own=own)
        step(model, [record(4096, 1)], Rows(4096), seed=1)
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, [record(4096, 1)], Rows(4096), seed=1)
        peaks[own] = torch.cuda.max_memory_allocated() - before
    assert peaks[False] - peaks[True] > 6 * 4096 * 256 * 2  # most of the twelve layers' inputs
