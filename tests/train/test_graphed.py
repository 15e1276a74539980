"""The graphed form of a step against the eager one: what is recorded on a GPU is called on a CPU."""

from typing import Any

import pytest
import torch
from torch import nn

from tnl.data.collate import collate_padded
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection
from tnl.train import graphed as graphed_form
from tnl.train import lora, recomputation
from tnl.train.graphed import Graphed, why_not
from tnl.train.plan import LADDER
from tnl.train.step import Rows, step

SIZES = {"vocab_size": 50, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(TransnormerConfig(**SIZES, linear_use_lrpe_list=[1, 0]))
    model = lora.attach(base, LoraSection(**{"r": 4, "lora_dropout": 0.2, **options}), "recipe.yaml", 1, lambda line: None)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    model = model.to(device).train()
    model.get_base_model().model.pick_kernels("triton" if device == "cuda" else "reference")
    return model


def record(length: int, number: int) -> dict[str, Any]:
    ids = torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    return {"id": f"r{number}", "input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]}


STEPS = [
    [record(n, 10 * i + j) for j, n in enumerate(lengths)] for i, lengths in enumerate([(9, 20, 5), (11, 19), (8, 24, 3), (4,), (30,)])
]


def steps_of(model: nn.Module, rows: Rows, graphed: Graphed | None) -> list[tuple[float, list[torch.Tensor]]]:
    """Loss and gradients of some steps, gradients dropped between them as Trainer does."""
    found = []
    for number, records in enumerate(STEPS):
        loss = step(model, records, rows, seed=number, graphed=graphed).loss
        found.append((float(loss), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", ["none", "glu", "layer"])
@pytest.mark.parametrize("budget", [1000, 24], ids=["one row a step", "several rows a step"])
def test_graphs_give_the_bits_of_the_eager_form(device: str, level: recomputation.Level, budget: int) -> None:
    """With nothing computed again, whatever is in the graphs."""
    rows = Rows(budget, multiple=16)
    eager = steps_of(make(device), rows, None)
    model = make(device)
    recomputation.use(model, level)
    graphed = Graphed(model)
    found = steps_of(model, rows, graphed)
    assert len(graphed.graphs.known) == 2
    for (loss, grads), (other, others) in zip(found, eager):
        assert loss == other and len(grads) == len(others) > 0
        assert all(torch.equal(a, b) for a, b in zip(grads, others))


def test_the_fused_packed_graphed_step_is_that_of_plain_peft_on_the_padded_batch() -> None:
    """In float32 to 1e-5; Triton in its interpreter where there is no card."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = STEPS[0]
    plain, model = (make(device, lora_dropout=0.0, lora_alpha=12) for _ in range(2))
    plain.get_base_model().model.pick_kernels("reference")
    loss = plain(**{name: x.to(device) for name, x in collate_padded(records, 0).items()}).loss
    loss.backward()
    model.get_base_model().model.pick_kernels("triton")
    graphed = Graphed(model)
    for _ in range(2):
        model.zero_grad()
        result = step(model, records, Rows(1000, multiple=16), seed=1, graphed=graphed)
    assert len(graphed.graphs.known) == result.rows == 1
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == ("lora_" not in name)
        if p.grad is not None and q.grad is not None:
            assert q.grad.norm() > 0 and (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_adds_to_what_an_eager_row_has_left(device: str) -> None:
    """In the last step the first row's shape is new, and the second's has its graph."""
    rows, lengths = Rows(48, multiple=16), [(9,), (10,), (40, 12)]
    steps = [[record(length, 100 * i + j) for j, length in enumerate(row)] for i, row in enumerate(lengths)]
    found = {}
    for form in ("eager", "graphed"):
        model = make(device)
        graphed = Graphed(model) if form == "graphed" else None
        for number, records in enumerate(steps):
            model.zero_grad()
            step(model, records, rows, seed=number, graphed=graphed)
        found[form] = [p.grad for p in model.parameters() if p.grad is not None]
    assert graphed is not None and len(graphed.graphs.known) == 1 and len(graphed.seen) == 2
    for a, b in zip(found["graphed"], found["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_rows_filled_up_teach_the_same() -> None:
    model = make("cpu")
    for (loss, grads), (other, others) in zip(steps_of(model, Rows(1000), None), steps_of(model, Rows(1000, multiple=16), None)):
        assert loss == pytest.approx(other, rel=1e-5)
        for a, b in zip(grads, others):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_long_rows_are_filled_up_in_longer_steps() -> None:
    """Never by more than a 16th, where that is more than the least step; lengths that the plan chooses from stay as they are."""
    rows = Rows(100_000, multiple=64)
    lengths = [rows.batches([record(n, 1)])[0]["input_ids"].shape[1] for n in (1, 64, 65, 1700, 2047, 2049, 4000, 9000)]
    assert lengths == [64, 64, 128, 1728, 2048, 2176, 4096, 9216]
    assert all(tokens % rows.step_of(tokens) == 0 for tokens in LADDER if tokens >= 128)
    assert [Rows(10).step_of(tokens) for tokens in (1, 5000)] == [1, 1], "a CPU has no need of it"


def test_a_graph_takes_what_the_model_reads() -> None:
    model = make("cpu")
    graphed = Graphed(model)
    steps_of(model, Rows(1000, multiple=16), graphed)
    assert {len(inputs) for inputs in graphed.inputs.values()} == {6}, "ids, positions, dropout's keys, index, targets, share; no labels"


def test_shapes_beyond_the_most_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_form, "MOST", 0)
    model = make("cpu")
    graphed = Graphed(model)
    steps_of(model, Rows(1000, multiple=16), graphed)
    assert not graphed.graphs.known and graphed.seen


def test_memory_that_runs_out_costs_the_graphs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines = make("cpu"), list[str]()
    graphed, rows = Graphed(model), Rows(1000, multiple=16, say=lines.append)
    steps_of(model, rows, graphed)
    run, fails = Graphed.run, [True]

    def out_of_memory(self: Graphed, *args: Any) -> torch.Tensor | None:
        if fails.pop() if fails else False:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, *args)

    monkeypatch.setattr(Graphed, "run", out_of_memory)
    expected = steps_of(make("cpu"), Rows(1000, multiple=16), None)
    found = steps_of(model, rows, graphed)
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert lines == ["out of memory: from now on without CUDA graphs, whose memory is free again; the gradients stay the same"]
    assert rows.budget == 1000 and not graphed.on


def test_what_cannot_be_recorded_is_named() -> None:
    model = make("cpu")
    assert why_not(model) == "there is no GPU"


@pytest.mark.gpu
def test_what_cannot_be_recorded_on_a_gpu_is_named() -> None:
    model = make("cuda")
    assert why_not(model) == ""
    hook = model.get_base_model().model.embed_tokens.register_forward_hook(lambda *args: None)
    assert "embed_tokens has a hook" in why_not(model)
    hook.remove()
    for level, why in (("glu", ""), ("layer", ""), ("host", "what enters a recomputed layer waits in host memory")):
        recomputation.use(model, level)
        assert why_not(model) == why
