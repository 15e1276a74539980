"""The tokens that all records begin with, computed once a row: the same loss and gradients as computing them with every record."""

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tnl.data.build import build
from tnl.data.packing import shared_tokens
from tnl.errors import RecipeError
from tnl.evaluate import perplexity
from tnl.model import modeling_transnormer
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_tokenizer
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.load import load
from tnl.recipe.sections import LoraSection
from tnl.train import callbacks, check, lora, recomputation, shared_prompt
from tnl.train import run as training
from tnl.train import step as steps
from tnl.train.graphed import Graphed
from tnl.train.step import Rows, step

SIZES = {"vocab_size": 50, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_attention_heads": 2, "glu_dim": 24}
PROMPT = 17
PLAIN = LoraSection(r=2, lora_dropout=0.0)
Gradients = tuple[float, dict[str, Tensor]]


def make(section: LoraSection | None = PLAIN, lrpe: tuple[int, ...] = (1, 0, 0), **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(
        TransnormerConfig(**SIZES, decoder_layers=len(lrpe), linear_use_lrpe_list=list(lrpe), init_std=0.3, **changes)
    )
    model = lora.attach(base, section, "recipe.yaml", 1, lambda line: None)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model.double().train()


def make_records(rests: tuple[int, ...] = (2, 40, 9, 3, 25, 2, 70)) -> list[dict[str, Any]]:
    """Records of the same prompt and as many tokens more; their first one is not learned, the others now and then, the last always."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 50, (PROMPT,), generator=generator).tolist()
    records = []
    for number, rest in enumerate(rests):
        ids = torch.randint(0, 50, (rest,), generator=generator).tolist()
        ids[0] = number  # no two go on alike
        learned = [False, *(torch.rand(rest - 1, generator=generator) < 0.6).tolist()]
        learned[-1] = True
        labels = [token if yes else -100 for token, yes in zip(ids, learned)]
        records.append({"id": f"r:{number}", "input_ids": prompt + ids, "labels": [-100] * PROMPT + labels})
    return records


def gradients(model: nn.Module, seed: int | None = None, records: list[dict[str, Any]] | None = None, **rows: Any) -> Gradients:
    model.zero_grad(set_to_none=True)
    result = step(model, records or make_records(), Rows(**{"budget": 10_000, **rows}), seed)
    return float(result.loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact_loss(model: nn.Module, seed: int | None = None, **rows: Any) -> float:
    """Sum of the step's token losses, in float64."""
    found, real = list[Tensor](), steps.row_loss
    with mock.patch.object(steps, "row_loss", lambda *args: (found.append(real(*args)), found[-1])[1]):
        gradients(model, seed, **rows)
    return sum(float(loss.detach()) for loss in found)


def assert_same(found: Gradients, expected: Gradients, bound: float = 1e-10) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)  # a step's loss is float32
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, grad in expected[1].items():
        assert grad.abs().max() > 0
        assert (found[1][name] - grad).abs().max() <= bound * max(1, float(grad.abs().max())), name


@pytest.mark.parametrize(
    "rows", [{}, {"budget": 60}, {"budget": 1}, {"multiple": 64}], ids=["one row", "several", "1 record a row", "filled"]
)
@pytest.mark.parametrize("lrpe", [(1, 0, 0), (1, 1, 1), (0, 0, 0)], ids=["first LRPE", "all LRPE", "no LRPE"])
def test_a_shared_prompt_gives_the_same_gradients(lrpe: tuple[int, ...], rows: dict[str, int]) -> None:
    model = make(lrpe=lrpe)
    assert_same(gradients(model, shared=PROMPT, **rows), gradients(model))
    assert exact_loss(model, shared=PROMPT, **rows) == pytest.approx(exact_loss(model), rel=1e-12)


@pytest.mark.parametrize(
    "section", [None, LoraSection(r=2, lora_dropout=0.0, target_modules=["l1"]), LoraSection(use_dora=True, lora_dropout=0.0)]
)
def test_whatever_is_trained(section: LoraSection | None) -> None:
    model = make(section)
    assert_same(gradients(model, shared=PROMPT), gradients(model))


@pytest.mark.parametrize("level", ["glu", "layer"])
@pytest.mark.parametrize("activation", ["elu", "silu"])
def test_recomputed_layers(activation: str, level: recomputation.Level) -> None:
    model = make(linear_act_fun=activation)
    expected = gradients(model)
    recomputation.use(model, level)
    assert_same(gradients(model, shared=PROMPT), expected)


def test_decays_of_every_strength() -> None:
    model = make()
    for layer, decay in zip(model.get_base_model().model.layers, (-3.0, -1e-7, -0.5)):
        layer.token_mixer.log_decay.copy_(torch.tensor([decay, decay / 10]))
    assert_same(gradients(model, shared=PROMPT), gradients(model))


def test_a_part_of_the_prompt_can_be_shared() -> None:
    model = make()
    assert_same(gradients(model, shared=5, budget=80), gradients(model))


def test_in_the_body_of_a_graph() -> None:
    model = make()
    expected = gradients(model)
    graphed = Graphed(model)
    for _ in range(3):
        model.zero_grad()
        loss = step(model, make_records(), Rows(1000, multiple=64, shared=PROMPT), seed=1, graphed=graphed).loss
    assert len(graphed.graphs.known) == 1
    assert_same((float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), expected)


@pytest.mark.parametrize(
    "layout",
    [{"budget": 60}, {"budget": 1}, {"multiple": 64}, {"segment_length": 16}, {"budget": 100, "segment_length": 100, "multiple": 64}],
)
def test_dropout_is_the_same_however_rows_are_laid_out(layout: dict[str, int]) -> None:
    """Long rows in segments compute the prompt with every record: with the masks that a shared one has, once is as good."""
    model = make(LoraSection(r=2, lora_dropout=0.4))
    expected = gradients(model, 1, shared=PROMPT)
    assert_same(gradients(model, 1, make_records()[::-1], shared=PROMPT, **layout), expected)
    assert abs(gradients(model, 2, shared=PROMPT)[0] - expected[0]) > 1e-4
    assert abs(gradients(model, 1)[0] - expected[0]) > 1e-4  # not shared, each record has masks of its own


def test_gradients_are_those_of_finite_differences() -> None:
    """With dropout, its masks held by the seed."""
    model, h = make(LoraSection(r=2, lora_dropout=0.4)), 1e-6
    _, grads = gradients(model, 1, shared=PROMPT)
    learned = sum(perplexity.count_supervised(record) for record in make_records())
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name, grad in grads.items():
        direction = torch.randn(grad.shape, dtype=torch.float64, generator=generator)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].add_(direction, alpha=sign * h)
            losses.append(exact_loss(model, 1, shared=PROMPT))
            with torch.no_grad():
                parameters[name].sub_(direction, alpha=sign * h)
        assert (losses[0] - losses[1]) / (2 * h * learned) == pytest.approx(float((grad * direction).sum()), rel=1e-5, abs=1e-8), name


def test_the_triton_forms() -> None:
    """With LRPE and without; in the interpreter where there is no card."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make(LoraSection(r=2, lora_dropout=0.3), (1, 0))
    records = make_records((2, 9, 20))
    expected = gradients(model, 1, records, shared=PROMPT)
    model = model.float().to(device)
    model.get_base_model().model.pick_kernels("triton")
    found = gradients(model, 1, records, shared=PROMPT)
    assert_same((found[0], {name: grad.cpu().double() for name, grad in found[1].items()}), expected, 2e-5)


def test_fewer_tokens_enter_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = list[int](), modeling_transnormer.decoder_layer
    monkeypatch.setattr(modeling_transnormer, "decoder_layer", lambda x, *rest: (seen.append(x.shape[1]), real(x, *rest))[1])
    model, records = make(), make_records()
    whole = sum(len(record["input_ids"]) for record in records)
    result = step(model, records, Rows(10_000, shared=PROMPT))
    assert seen == [whole - 6 * PROMPT] * 3 and result.tokens == whole and result.rows == 1


def test_the_budget_of_a_row_counts_the_prompt_once() -> None:
    rows = Rows(60, shared=PROMPT)
    sizes = [batch["input_ids"].shape[1] for batch in rows.batches(make_records())]
    assert sorted(sizes) == [PROMPT + 38, PROMPT + 43, PROMPT + 70]
    hidden = steps.hidden_states(make(), rows.idle(), torch.device("cpu"))  # of a process that has fewer rows than the others
    assert len(hidden) == PROMPT + 2 and hidden.isfinite().all()


def test_when_memory_runs_out_the_gradients_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows shrink, then layers are recomputed, then the longest record is computed in segments, its prompt with it."""
    model, real = make(LoraSection(r=2, lora_dropout=0.4)), steps.hidden_states
    records = make_records((3, 40, 9, 3, 25, 2, 300))
    expected = gradients(model, 1, records, shared=PROMPT)

    def meagre(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        if batch["input_ids"].numel() > 270:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, device)

    monkeypatch.setattr(steps, "hidden_states", meagre)
    rows = Rows(10_000, shared=PROMPT)
    model.zero_grad()
    loss = step(model, records, rows, 1).loss
    assert rows.segment_length == 256 and rows.budget <= 256
    assert_same((float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), expected)


def test_a_resumed_run_shares_as_before() -> None:
    model, rows = make(), Rows(100, shared=PROMPT)
    again = Rows(50)
    again.restore(rows.state(model), model)
    assert again.shared == PROMPT


def test_what_cannot_share_is_refused() -> None:
    inner = make().get_base_model().model
    ids = torch.zeros(2, 8, dtype=torch.int64)
    for arguments in (
        {"input_ids": ids, "position_ids": torch.arange(8).expand(2, 8)},
        {"input_ids": ids[:1]},
        {"input_ids": ids[:1, :3], "position_ids": torch.arange(3)[None]},
    ):
        with pytest.raises(ValueError, match="in one packed row alone"):
            inner(**arguments, shared=3)


def write(base: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A recipe of 12 records with one form of question, 4 a step."""
    rows = [
        {"instruction": f"皇上问的第{i}件事，你可还记得清楚？", "input": "", "output": f"臣妾记得第{i}件。"}
        for i in "一二三四五六七八九十甲乙"
    ]
    (folder / "records.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    train = {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    sections: dict[str, Any] = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": str(folder / "records.json"), "eval": 0, "system": "现在你要扮演皇帝身边的女人甄嬛，说话要有分寸。"},
        "lora": {"r": 2, "lora_dropout": 0.0},
        "train": train | {"logging_steps": 1, "save_steps": 2, "use_cpu": True, "learning_rate": 1e-2},
        "generation": {"max_new_tokens": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections[section] = value if not name else sections[section] | {name: value}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(sections, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("changes", "shared", "said"),
    [
        ({}, True, r"the (\d+) tokens that all records begin with are computed once a row: \d+% fewer tokens$"),
        ({"lora": None, "data.packing": "fill", "data.row_tokens": 200}, True, r"once a row: \d+% fewer tokens$"),
        ({"data.shared_prompt": False}, False, ""),
        ({"data.packing": "none"}, False, ""),
        ({"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 1}, False, ""),
        ({"lora.lora_dropout": 0.1}, False, r"all records begin with the same \d+ tokens; data\.shared_prompt=true .* one dropout for all"),
        ({"lora.lora_dropout": 0.1, "data.shared_prompt": True}, True, r"\d+% fewer tokens, one dropout for all records of a step$"),
        ({"train.neftune_noise_alpha": 5}, False, r"one noise for all"),
        ({"data.system": None, "data.shared_prompt": True}, False, r"too few to share \(needed 16\)$"),
        ({"data.system": None}, False, ""),
    ],
)
def test_when_a_run_shares(base: Path, tmp_path: Path, changes: dict[str, Any], shared: bool, said: str) -> None:
    recipe = load(write(base, tmp_path, changes))
    records = build(recipe.data, load_tokenizer(base), seed=1).train
    prompt = shared_prompt.choose(recipe, records, 4096)
    assert bool(prompt.tokens) == shared == bool(prompt.spared) and prompt.tokens in (0, shared_tokens(records))
    assert re.search(said, prompt.line) and bool(said) == bool(prompt.line)


def test_the_share_that_is_spared() -> None:
    """Of 16 records of 100 tokens, 40 of them the prompt: 1,000 tokens in one row, and in rows of 400 three."""
    assert shared_prompt.share(40, [100] * 32, 16, 1000) == pytest.approx(15 * 40 / 1600)
    assert shared_prompt.share(40, [100] * 32, 16, 400) == pytest.approx(13 * 40 / 1600)
    assert shared_prompt.share(40, [100] * 32, 16, 64) == 0 == shared_prompt.share(40, [100] * 32, 16, 20)


def test_padded_records_cannot_share(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.shared_prompt: is true, and padded records have no row in common"):
        load(write(base, tmp_path, {"data.packing": "none", "data.shared_prompt": True}))


def test_a_run_says_so_and_learns_the_same(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, tokens = {}, {}
    for shared in (True, False):
        (folder := tmp_path / str(shared)).mkdir()
        work = training.run(write(base, folder, {"data.shared_prompt": shared}))
        lines = [line for line in callbacks.read_metrics(work.metrics) if "loss" in line]
        losses[shared], tokens[shared] = [line["loss"] for line in lines], [line["tokens"] for line in lines]
        said = capsys.readouterr().out
        assert ("are computed once a row" in said) == shared
        assert ("the first" in work.read_metadata()["paths"]["rows"]) == shared
    assert losses[True] == pytest.approx(losses[False], rel=1e-4) and len(losses[True]) == 6
    assert tokens[True] == tokens[False]  # real tokens count, computed or not
    check.run(write(base, folder, {"data.shared_prompt": True, "train.output_dir": str(folder / "other")}))
    assert "are computed once a row" in capsys.readouterr().out
