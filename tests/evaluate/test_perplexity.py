"""The loss by rows is the loss of the definition."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tnl.errors import DataError, MemoryBudgetError, NumbersError
from tnl.evaluate import perplexity
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM

torch.set_num_threads(1)
SIZES = {"vocab_size": 40, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}


@pytest.fixture
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    return TransnormerForCausalLM(TransnormerConfig(**SIZES, init_std=0.3)).eval()


def make_records() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    records = []
    for i, length in enumerate((7, 30, 2, 71, 12)):
        ids = torch.randint(0, 40, (length,), generator=generator).tolist()
        labels = [token if j % 3 else -100 for j, token in enumerate(ids)]
        records.append({"id": f"r:{i}", "input_ids": ids, "labels": labels})
    return records


def definition(model: nn.Module, records: list[dict[str, Any]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for record in records:
        ids, labels = torch.tensor([record["input_ids"]]), torch.tensor([record["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        kept = labels[0, 1:] != -100
        total += float(nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum")) if kept.any() else 0.0
        count += int(kept.sum())
    return total / count, count


@pytest.mark.parametrize(("budget", "chunk"), [(10_000, 1024), (40, 7), (1, 1)])
def test_any_rows_give_the_loss_of_the_definition(model: TransnormerForCausalLM, budget: int, chunk: int) -> None:
    records = make_records()
    expected, count = definition(model, records)
    result = perplexity.loss(model, records, budget, chunk=chunk)
    assert result.loss == pytest.approx(expected, rel=1e-5) and result.tokens == count and result.records == 5
    assert result.value == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("budget", [10_000, 60, 30])
def test_what_all_records_begin_with_is_computed_once_a_row(
    model: TransnormerForCausalLM, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, records = list(range(1, 21)), make_records()
    for i, record in enumerate(records):
        record["input_ids"] = [*prompt, 30 + i, *record["input_ids"]]
        record["labels"] = [-100] * 21 + record["labels"]
    expected, count = definition(model, records)
    entered, forward = list[int](), model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **k: entered.append(k["input_ids"].shape[1]) or forward(*args, **k))
    result = perplexity.loss(model, records, budget)
    assert result.loss == pytest.approx(expected, rel=1e-6) and result.tokens == count
    whole = sum(len(record["input_ids"]) for record in records)
    if budget == 10_000:
        assert entered == [whole - 4 * 20]
    monkeypatch.setattr(perplexity, "LEAST", 21)
    entered.clear()
    assert perplexity.loss(model, records, 10_000).loss == pytest.approx(result.loss, rel=1e-6) and entered == [whole]


def test_measuring_leaves_mode_gradients_and_randomness_alone(model: TransnormerForCausalLM) -> None:
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    calls: list[int] = []
    perplexity.loss(model, make_records(), 40, after_row=lambda: calls.append(1))
    assert model.training and torch.equal(torch.rand(1), expected) and len(calls) > 1
    assert all(p.grad is None for p in model.parameters())


def test_no_record_is_predicted_from_its_neighbour(model: TransnormerForCausalLM) -> None:
    records = [{"id": "a", "input_ids": [1, 2, 3], "labels": [-100, -100, -100]}, {"id": "b", "input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    packed = perplexity.loss(model, records, 100)
    alone = perplexity.loss(model, records[1:], 100)
    assert packed.tokens == alone.tokens == 2 and packed.loss == pytest.approx(alone.loss, rel=1e-5)


def test_what_is_not_finite_is_named(model: TransnormerForCausalLM) -> None:
    records = make_records()
    records[3]["input_ids"][5] = 39
    for i in (0, 1, 2, 4):
        records[i]["input_ids"] = [min(token, 38) for token in records[i]["input_ids"]]
        records[i]["labels"] = [min(token, 38) for token in records[i]["labels"]]
    records[3]["labels"] = [-100 if token == 39 else token for token in records[3]["labels"]]
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.randn(40, 16))
        model.model.embed_tokens.weight[39] = float("nan")
    with pytest.raises(NumbersError, match=r"^r:3: the loss of this record is nan") as caught:
        perplexity.loss(model, records)
    assert caught.value.exit_code == 5


def test_nothing_to_measure_is_an_error(model: TransnormerForCausalLM) -> None:
    with pytest.raises(DataError, match="supervised token"):
        perplexity.loss(model, [{"id": "a", "input_ids": [1, 2], "labels": [1, -100]}])


def test_out_of_memory_takes_shorter_rows_then_says_what_fits(model: TransnormerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_records()
    expected, _ = definition(model, records)
    real, limit = perplexity.hidden_states, [100]

    def meagre(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        if batch["input_ids"].numel() > limit[0]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return real(model, batch, device)

    monkeypatch.setattr(perplexity, "hidden_states", meagre)
    assert perplexity.loss(model, records).loss == pytest.approx(expected, rel=1e-5)
    limit[0] = 50
    with pytest.raises(MemoryBudgetError, match=r"data\.max_length=35"):
        perplexity.loss(model, records)


def test_a_loss_that_no_float_can_exponentiate() -> None:
    assert perplexity.Perplexity(1000.0, 1, 1).value == math.inf


def test_long_records_are_read_by_segments_and_measured_by_position(model: TransnormerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_records()
    expected = perplexity.loss(model, records, 40)
    assert expected.by_position == ()
    monkeypatch.setattr(perplexity.stream, "SEGMENT", 16)
    monkeypatch.setattr(perplexity.stream, "FIRST_BUCKET", 20)
    lengths: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **k: lengths.append(input_ids.shape[1]) or forward(input_ids, **k))
    found = perplexity.loss(model, records, 20)  # 30 and 71 tokens have rows of their own
    assert max(lengths) <= 20 and lengths.count(16) == 5
    assert found.loss == pytest.approx(expected.loss, rel=1e-5) and found.tokens == expected.tokens
    assert [(b.start, b.stop) for b in found.by_position] == [(0, 20), (20, 40), (40, 80)]
    assert sum(b.tokens for b in found.by_position) == found.tokens
    assert sum(b.tokens * b.loss for b in found.by_position) == pytest.approx(found.loss * found.tokens, rel=1e-5)
    last = found.by_position[-1]
    parts = list(perplexity.token_losses(model, [records[3]], torch.device("cpu")))
    places, alone = (torch.cat(pair) for pair in zip(*parts))
    assert len(parts) == 5 and torch.equal(places, perplexity.supervised_places(records[3]))
    assert last.tokens == int((places >= 40).sum()) and last.loss == pytest.approx(float(alone[places >= 40].mean()), rel=1e-5)


def test_no_long_record_without_a_supervised_token_is_a_mistake(model: TransnormerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity.stream, "SEGMENT", 16)
    silent = {"id": "r:9", "input_ids": [1] * 50, "labels": [-100] * 50}
    assert list(perplexity.token_losses(model, [silent], torch.device("cpu"))) == []
    records = [silent, *make_records()]
    assert perplexity.loss(model, records, 20).tokens == perplexity.loss(model, make_records(), 20).tokens
