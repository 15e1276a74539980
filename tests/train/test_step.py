"""One optimizer step: the same gradients however its records are laid out, and nothing that leaks from one to the next."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tnl.errors import DataError, MemoryBudgetError
from tnl.evaluate import perplexity
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection
from tnl.train import lora, recomputation
from tnl.train import step as steps
from tnl.train.step import Rows

torch.set_num_threads(1)
SIZES = {"vocab_size": 50, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}


def make_model(section: LoraSection | None = None, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(TransnormerConfig(**SIZES, linear_use_lrpe_list=[1, 0], init_std=0.2, **changes))
    model = lora.attach(base, section, "recipe.yaml", 1, lambda line: None)
    with torch.no_grad():
        for name, p in lora.trainable(model):
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model.train()


def make_records(lengths: tuple[int, ...] = (5, 70, 12, 1, 33, 9, 20, 3), seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    records = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, 50, (length,), generator=generator)
        learned = torch.rand(length, generator=generator) < 0.6
        labels = torch.where(learned, ids, -100)  # the first label may be supervised: it must not be learned from the record before
        records.append({"id": f"r:{i}", "input_ids": ids.tolist(), "labels": labels.tolist()})
    return records


LORA = LoraSection(r=2, lora_dropout=0.0)


def gradients(
    model: nn.Module, records: list[dict[str, Any]], seed: int | None = None, **rows: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    result = steps.step(model, records, Rows(**{"budget": 10_000, **rows}), seed)
    return float(result.loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accumulated(model: nn.Module, parts: list[list[dict[str, Any]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The definition: transformers' own loss of the unpacked records one by one, summed, divided by all supervised tokens."""
    model.zero_grad(set_to_none=True)
    total = sum(perplexity.count_supervised(record) for part in parts for record in part)
    loss = 0.0
    for part in parts:
        for record in part:
            if not perplexity.count_supervised(record):
                continue
            ids, labels = torch.tensor([record["input_ids"]]), torch.tensor([record["labels"]])
            out = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(total))
            out.loss.backward()
            loss += float(out.loss.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys() and a[1]
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("count", [8, 3], ids=["whole step", "last partial step"])
@pytest.mark.parametrize(
    "section", [LORA, None, LoraSection(r=2, lora_dropout=0.0, modules_to_save=["lm_head"])], ids=["lora", "full", "head"]
)
def test_layouts_agree_with_the_unpacked_definition(section: LoraSection | None, count: int) -> None:
    model, records = make_model(section), make_records()[:count]
    expected = accumulated(model, [records])
    assert_same(gradients(model, records), expected)  # packed: one row
    assert_same(gradients(model, records, budget=40), expected)  # several rows
    assert_same(gradients(model, records, budget=1), expected)  # one record a row: 8 x 1
    assert_same(gradients(model, records, padded=len(records)), expected)  # padded: 1 x 8
    assert_same(gradients(model, records, padded=2), expected)
    assert_same(gradients(model, records, chunk=7), expected)


def test_an_adapted_or_untied_head_is_right() -> None:
    for section, changes in [
        (LoraSection(r=2, lora_dropout=0.0, target_modules=["lm_head", "l1"]), {}),
        (LoraSection(r=2, lora_dropout=0.0), {"tie_word_embeddings": False}),
    ]:
        model, records = make_model(section, **changes), make_records()
        assert_same(gradients(model, records, budget=60), accumulated(model, [records]))


def test_label_smoothing_is_that_of_transformers() -> None:
    # only this test needs it
    from transformers.trainer_pt_utils import LabelSmoother

    model, records = make_model(LORA), make_records((30,))
    ids, labels = torch.tensor([records[0]["input_ids"]]), torch.tensor([records[0]["labels"]])
    expected = LabelSmoother(0.1)({"logits": model(input_ids=ids).logits}, labels, shift_labels=True)
    assert gradients(model, records, label_smoothing=0.1)[0] == pytest.approx(float(expected), rel=1e-5)


def test_no_record_learns_from_its_neighbour() -> None:
    model, records = make_model(LORA), make_records((20, 20))
    records[0]["labels"] = [-100] * 20
    records[1]["labels"] = list(records[1]["input_ids"])
    changed = copy.deepcopy(records)
    changed[0]["input_ids"] = [(i + 7) % 50 for i in changed[0]["input_ids"]]
    assert_same(gradients(model, records), gradients(model, changed))


def test_checkpointing_changes_nothing() -> None:
    model, records = make_model(LoraSection(r=2, lora_dropout=0.3)), make_records()
    steps.seed_all(3)
    expected = gradients(model, records)
    recomputation.use(model, "host")
    assert recomputation.level_of(model) == "layer"
    steps.seed_all(3)
    assert_same(gradients(model, records), expected)


def test_a_seed_repeats_dropout() -> None:
    model, records = make_model(LoraSection(r=2, lora_dropout=0.5)), make_records()
    losses = [float(steps.step(model, records, Rows(10_000), seed=seed).loss) for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
    assert steps.seed_of(1, 2) != steps.seed_of(2, 1)


def test_dropout_does_not_ask_where_the_data_lies() -> None:
    model, records = make_model(LoraSection(r=2, lora_dropout=0.5)), make_records()
    here, there, renumbered = (
        [{**record, "id": f"{place}:record {i + first}"} for i, record in enumerate(records)]
        for place, first in (("/one/data.json", 1), ("/other/data.json", 1), ("/one/data.json", 2))
    )
    losses = [float(steps.step(model, rows, Rows(10_000), seed=1).loss) for rows in (here, there, renumbered)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("layout", [{"budget": 40}, {"padded": 3}, {"padded": 8}, {"segment_length": 16}])
def test_dropout_is_the_same_however_rows_are_laid_out(layout: dict[str, int]) -> None:
    """Its masks are a function of the step, the record and the token's position in it."""
    model, records = make_model(LoraSection(r=2, lora_dropout=0.4)).double(), make_records()
    expected = gradients(model, records, seed=1)
    assert_same(gradients(model, records[::-1], seed=1, **layout), expected)
    assert abs(gradients(model, records, seed=2)[0] - expected[0]) > 1e-4


def test_counts() -> None:
    model, records = make_model(LORA), make_records()
    result = steps.step(model, records, Rows(40))
    assert result.tokens == sum(len(r["input_ids"]) for r in records)
    assert result.supervised == sum(perplexity.count_supervised(r) for r in records) and result.rows > 1


def test_nothing_supervised_is_an_error() -> None:
    records = [{"id": "a:record 1", "input_ids": [1, 2], "labels": [1, -100]}]
    with pytest.raises(DataError, match="a:record 1"):
        steps.step(make_model(LORA), records, Rows(100))


class Meagre:
    """A device that holds so many tokens a row, fewer without checkpointing."""

    def __init__(self, plain: int, recomputed: int) -> None:
        self.plain, self.recomputed, self.real = plain, recomputed, steps.hidden_states

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        limit = self.recomputed if recomputation.level_of(model) == "layer" else self.plain
        if batch["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 320.00 MiB")
        return self.real(model, batch, device)


def test_out_of_memory_splits_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = make_model(LoraSection(r=2, lora_dropout=0.0)), make_records()
    expected = gradients(model, records)
    lines: list[str] = []
    monkeypatch.setattr(steps, "hidden_states", Meagre(80, 80))
    rows = Rows(10_000, say=lines.append)
    model.zero_grad(set_to_none=True)
    result = steps.step(model, records, rows, seed=1)
    assert_same((float(result.loss), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)
    assert lines and all("gradients stay the same" in line for line in lines) and rows.budget <= 80
    lines.clear()
    steps.step(model, records, rows, seed=1)
    assert not lines, "what was learned about memory holds for the next step"


def test_then_checkpoints_then_gives_up_with_the_line_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = make_model(LORA), make_records()
    lines: list[str] = []
    monkeypatch.setattr(steps, "hidden_states", Meagre(30, 100))
    steps.step(model, records, Rows(10_000, say=lines.append), seed=1)
    assert "the layers' GLUs computed again" in lines[-2] and "gradient_checkpointing" in lines[-1]
    monkeypatch.setattr(steps, "hidden_states", Meagre(30, 60))
    with pytest.raises(MemoryBudgetError, match=r"data\.max_length=40") as caught:
        steps.step(model, records, Rows(10_000, say=lines.append), seed=1)
    assert caught.value.exit_code == 7 and "r:1 has 70 tokens" in str(caught.value)


@pytest.mark.parametrize("level", ["none", "glu", "layer"])
def test_a_checkpoint_brings_back_what_is_computed_again(level: str) -> None:
    model, rows = make_model(LORA), Rows(100)
    rows.restore({**rows.state(model), "checkpointing": level}, model)
    assert recomputation.level_of(model) == level == rows.state(model)["checkpointing"]


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(steps, "hidden_states", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        steps.step(make_model(LORA), make_records(), Rows(100))
