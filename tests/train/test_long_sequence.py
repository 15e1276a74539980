"""A streamed row has the gradients of one pass, wherever it is cut and wherever its states wait."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tnl.data.collate import collate_long, collate_rows
from tnl.errors import MemoryBudgetError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache
from tnl.recipe.sections import LoraSection
from tnl.train import long_sequence, lora, plan, recomputation, state_store
from tnl.train import run as training
from tnl.train import step as steps
from tnl.train.callbacks import read_metrics
from tnl.train.long_sequence import chains, cut, streamed_backward
from tnl.train.step import Rows, forward_backward, head_loss

torch.set_num_threads(1)
SIZES = {"vocab_size": 50, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}
LORA = LoraSection(r=2, lora_dropout=0.0)
Batch = dict[str, Tensor]


def make_model(section: LoraSection | None, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(TransnormerConfig(**SIZES, linear_use_lrpe_list=[1, 0], **{"init_std": 0.2, **changes}))
    model = lora.attach(base, section, "recipe.yaml", 1, lambda line: None)
    with torch.no_grad():
        for name, p in lora.trainable(model):
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model.to(dtype).train()


def make_record(length: int, seed: int, learned: float = 0.5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (length,), generator=generator)
    labels = torch.where(torch.rand(length, generator=generator) < learned, ids, -100)
    return {"id": f"r:{seed}", "input_ids": ids.tolist(), "labels": labels.tolist()}


ONE = [make_record(130, 0)]
PACKED = [make_record(n, i) for i, n in enumerate((1, 63, 64, 5, 7))]  # edges of records at 64 and 128, and off them


def loss_of(model: nn.Module) -> Any:
    return partial(head_loss, model, rows=Rows(1, chunk=11))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_pass(model: nn.Module, records: list[dict[str, Any]], supervised: int = 40) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss, rows = forward_backward(model, Rows(10_000), records, supervised)
    assert rows == 1
    return float(loss), gradients(model)


def streamed(model: nn.Module, batch: Batch, length: int, **options: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = streamed_backward(model, batch, length, loss_of(model), **{"supervised": 40, **options})
    return float(loss), gradients(model)


def assert_same(actual: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], bound: float) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys() and expected[1]
    for name, grad in expected[1].items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((actual[1][name] - grad).abs().max()) <= bound * scale, name


@pytest.mark.parametrize("records", [ONE, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("section", [LORA, None], ids=["lora", "full"])
def test_gradients_are_those_of_one_pass(section: LoraSection | None, records: list[dict[str, Any]]) -> None:
    model, batch = make_model(section), collate_rows(records)
    expected = one_pass(model, records)
    T = batch["input_ids"].shape[1]
    if section is None:
        assert expected[1]["model.embed_tokens.weight"].any() and expected[1]["model.layers.0.token_mixer.lrpe.theta"].any()
    for length in (1, 7, 64, T - 1, T, T + 5):
        assert_same(streamed(model, batch, length), expected, 1e-10)
    for length in (13, 64):
        assert_same(streamed(model, batch, length, mode="lean"), expected, 1e-10)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (LoraSection(r=2, lora_dropout=0.0, target_modules=["l1"]), {}),  # no gradient reaches the first layer's state from below
        (LoraSection(r=2, lora_dropout=0.0, target_modules=["lm_head", "qkvu_proj"]), {}),
        (LoraSection(r=2, lora_dropout=0.0, modules_to_save=["embed_tokens"]), {"tie_word_embeddings": False}),
        (None, {"tie_word_embeddings": False, "bias": True, "norm_type": "layernorm"}),
    ],
    ids=["l1", "head", "embedding", "untied"],
)
def test_whatever_is_trained(section: LoraSection | None, changes: dict[str, Any]) -> None:
    model = make_model(section, **changes)
    assert_same(streamed(model, collate_rows(PACKED), 20), one_pass(model, PACKED), 1e-10)


@pytest.mark.parametrize("section", [LORA, None], ids=["lora", "full"])
def test_float32(section: LoraSection | None) -> None:
    model = make_model(section, torch.float32, init_std=0.1)
    for length in (7, 64):
        assert_same(streamed(model, collate_rows(ONE), length), one_pass(model, ONE), 1e-5)


@pytest.mark.parametrize("offload", ["gpu", "host"])
@pytest.mark.parametrize("every", [None, 2, 5, 100])
def test_where_states_wait_changes_no_bit(offload: str, every: int | None) -> None:
    for section in (LORA, LoraSection(r=2, lora_dropout=0.4)):
        model, batch = make_model(section), collate_rows(PACKED)
        torch.manual_seed(1)
        expected = streamed(model, batch, 12)
        torch.manual_seed(1)
        assert_same(streamed(model, batch, 12, offload=offload, every=every), expected, 0.0)


def test_gradients_accumulate() -> None:
    model, batch = make_model(LORA), collate_rows(ONE)
    expected = streamed(model, batch, 20)[1]
    streamed_backward(model, batch, 33, loss_of(model), supervised=40)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * expected[name], rtol=1e-9, atol=1e-12)


def with_dropout(model: nn.Module, batch: Batch, length: int) -> tuple[float, dict[str, Tensor]]:
    """One graph over all segments, each under the seed that streaming gives it."""
    model.zero_grad(set_to_none=True)
    seed = int(torch.randint(2**62, ()))
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    cache, total = TransnormerCache(len(inner.model.layers)), torch.zeros(())
    for i, segment in enumerate(cut(batch, length)):
        torch.manual_seed(seed + i)
        window = {name: batch[name][:, segment.start : segment.stop] for name in ("input_ids", "position_ids")}
        hidden = inner.model(**window, past_key_values=cache, use_cache=True).last_hidden_state[0]
        index, targets = long_sequence.targets_of(batch, segment.start, segment.stop)
        total = total + loss_of(model)(hidden[index], targets) / 40
    total.backward()
    return float(total.detach()), gradients(model)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_dropout_draws_the_same_masks_in_both_passes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(LoraSection(r=2, lora_dropout=0.4)), collate_rows(PACKED)
    torch.manual_seed(5)
    expected = with_dropout(model, batch, 17)
    seen: dict[int, list[list[Tensor]]] = {}
    forward = long_sequence._Stream.forward

    def watched(self: Any, i: int, states: Any) -> Any:
        hidden, finals = forward(self, i, states)
        seen.setdefault(i, []).append([final.detach().clone() for final in finals])
        return hidden, finals

    monkeypatch.setattr(long_sequence._Stream, "forward", watched)
    torch.manual_seed(5)
    assert_same(streamed(model, batch, 17, mode=mode), expected, 1e-10)
    assert len(seen) == 9
    for passes in list(seen.values())[:-1]:
        assert len(passes) == 2 and all(torch.equal(a, b) for a, b in zip(*passes))


def test_randomness_goes_on_as_if_one_seed_had_been_drawn() -> None:
    model, batch = make_model(LoraSection(r=2, lora_dropout=0.4)), collate_rows(ONE)
    losses = []
    for length in (30, 50):
        torch.manual_seed(3)
        first = streamed(model, batch, length)[0]
        losses.append((first, float(torch.rand(())), streamed(model, batch, length)[0]))
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] != losses[0][2], "another row, other masks"


def test_what_no_gradient_reaches_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = make_record(40, 1), make_record(40, 2, 0.0), make_record(40, 3)
    first["labels"] = first["labels"][:15] + [-100] * 25
    records = [first, second, third]
    model, batch = make_model(LORA), collate_rows(records)
    segments = cut(batch, 10)
    assert [s.start for s in segments if not s.continues] == [0, 40, 80]
    assert chains(segments) == [[0, 1], [8, 9, 10, 11]]
    expected, calls = one_pass(model, records), []
    forward = long_sequence._Stream.forward
    monkeypatch.setattr(long_sequence._Stream, "forward", lambda self, i, s: calls.append(i) or forward(self, i, s))
    assert_same(streamed(model, batch, 10), expected, 1e-10)
    assert calls == [0, 1, 0, 8, 9, 10, 11, 10, 9, 8]


def test_nothing_supervised_is_nothing() -> None:
    model = make_model(LORA)
    assert streamed(model, collate_rows([make_record(20, 0, 0.0)]), 5) == (0.0, {})


def test_labels_at_the_edge_of_a_segment_are_learned_by_the_token_before() -> None:
    record = make_record(20, 0, 0.0)
    record["labels"][10] = 7
    model, batch = make_model(LORA), collate_rows([record])
    assert [s.learned for s in cut(batch, 10)] == [True, False]
    assert_same(streamed(model, batch, 10), one_pass(model, [record]), 1e-10)


def test_a_memory_mapped_row_without_positions(tmp_path: Path) -> None:
    ids = np.memmap(tmp_path / "ids.bin", np.uint16, "w+", shape=(1, 130))
    ids[0] = make_record(130, 4)["input_ids"]
    mapped = torch.from_numpy(np.memmap(tmp_path / "ids.bin", np.uint16, "c", shape=(1, 130)))
    record = {"id": "r", "input_ids": ids[0].tolist(), "labels": ids[0].tolist()}
    model = make_model(LORA)
    assert_same(streamed(model, {"input_ids": mapped, "labels": mapped}, 30), one_pass(model, [record]), 1e-10)


def test_a_record_as_it_lies_in_its_file_is_the_row_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No positions and no dropout keys of the whole row: a segment's are made when it is computed."""
    model, record = make_model(LoraSection(r=2, lora_dropout=0.4)), {**make_record(130, 4), "draw": 12345}
    given: list[dict[str, Any]] = []
    forward = model.get_base_model().model.forward  # type: ignore[operator, union-attr]
    monkeypatch.setattr(
        model.get_base_model().model,  # type: ignore[operator, union-attr]
        "forward",
        lambda **inputs: given.append(inputs) or forward(**inputs),
    )
    seen = []
    for batch in (collate_rows([record]), collate_long(record)):
        torch.manual_seed(5)
        seen.append((streamed(model, batch, 30), given[:]))
        given.clear()
    assert set(collate_long(record)) == {"input_ids", "labels", "draw"}
    assert_same(seen[1][0], seen[0][0], 0.0)
    for ours, theirs in zip(seen[1][1], seen[0][1], strict=True):
        for name in ("input_ids", "position_ids", "dropout_keys"):
            assert torch.equal(ours[name], theirs[name]) and ours[name].numel() <= 30


def test_the_mode_ends_with_the_row() -> None:
    model, batch = make_model(LORA), collate_rows(ONE)
    plain = [dict(vars(m)) for m in model.modules()]
    streamed(model, batch, 50, mode="lean")
    assert recomputation.level_of(model) == "none" and [vars(m).keys() for m in model.modules()] == [v.keys() for v in plain]


def test_lean_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(LORA), collate_rows(ONE)
    peaks = {}
    for mode in ("fast", "lean"):
        kept = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.__setitem__(0, kept[0] + x.numel()) or x, lambda x: x):
            streamed(model, batch, 130, mode=mode)
        peaks[mode] = kept[0]
    assert peaks["lean"] < peaks["fast"] / 2


@pytest.mark.parametrize("length", [0, -4])
def test_segments_hold_something(length: int) -> None:
    model = make_model(LORA)
    with pytest.raises(ValueError, match="at least one token"):
        streamed(model, collate_rows(ONE), length)
    with pytest.raises(ValueError, match="one row"):
        streamed(model, {name: x.expand(2, -1) for name, x in collate_rows(ONE).items()}, 10)


def test_states_that_fit_nowhere_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnl.train.state_store.free_host_bytes", lambda: 100)
    with pytest.raises(MemoryBudgetError, match="segment_length"):
        streamed(make_model(LORA), collate_rows(ONE), 10)


def test_a_step_of_the_optimizer_learns() -> None:
    model, batch = make_model(LORA, torch.float32), collate_rows(ONE)
    optimizer = torch.optim.Adam([p for _, p in lora.trainable(model)], lr=0.003)
    losses = []
    for _ in range(8):
        losses.append(streamed(model, batch, 40)[0])
        optimizer.step()
    assert all(b < a for a, b in pairwise(losses))


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_the_triton_forms(mode: str) -> None:
    """Fused LoRA with dropout, states and their gradients over the edges of segments; in the interpreter where there is no card."""
    pytest.importorskip("triton")
    records = [{**make_record(n, i), "draw": 7 + i} for i, n in enumerate((20, 1, 14))]
    model, batch = make_model(LoraSection(r=2, lora_dropout=0.3), linear_act_fun="swish"), collate_rows(records)
    expected = one_pass(model, records)
    model = model.float().to("cuda" if torch.cuda.is_available() else "cpu")
    model.get_base_model().model.pick_kernels("triton")  # type: ignore[operator, union-attr]
    loss, grads = streamed(model, batch, 12, mode=mode)
    assert_same((loss, {name: grad.cpu().double() for name, grad in grads.items()}), expected, 5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fast", "lean"])
@pytest.mark.parametrize("offload", ["gpu", "host"])
def test_on_a_gpu(offload: str, mode: str) -> None:
    model, batch = make_model(LORA).cuda(), collate_rows(PACKED)
    expected = one_pass(model, PACKED)
    for every in (1, 3):
        assert_same(streamed(model, batch, 9, offload=offload, mode=mode, every=every), expected, 1e-9)


# ---- as a part of a step, and of a run ----------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"padded": 2}], ids=["packed", "padded"])
def test_a_step_streams_what_is_longer_than_a_segment(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = make_model(LORA), [make_record(n, n) for n in (12, 90, 20, 41, 5)]
    model.zero_grad(set_to_none=True)
    expected = steps.step(model, records, Rows(1000))
    whole = gradients(model)
    calls: list[int] = []
    real = long_sequence.streamed_backward
    monkeypatch.setattr(
        steps, "streamed_backward", lambda m, b, n, *a, **k: calls.append(b["input_ids"].shape[1]) or real(m, b, n, *a, **k)
    )
    for checkpointing in (False, True):
        if checkpointing:
            recomputation.use(model, "host")
        model.zero_grad(set_to_none=True)
        result = steps.step(model, records, Rows(40, segment_length=40, **layout))
        assert_same((float(result.loss), gradients(model)), (float(expected.loss), whole), 1e-10)
        assert result.tokens == expected.tokens and result.supervised == expected.supervised
    assert sorted(calls) == [41, 41, 90, 90]


def test_out_of_memory_ends_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = make_model(LORA, torch.float32), [make_record(1500, 1)]
    real, lines = steps.hidden_states, list[str]()

    def meagre(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        if batch["input_ids"].numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, device)

    monkeypatch.setattr(steps, "hidden_states", meagre)
    rows = Rows(4096, say=lines.append)
    loss = steps.step(model, records, rows, seed=1).loss
    assert rows.segment_length == 704 and rows.budget == 704 and "segments of 704 tokens" in lines[-1]
    assert recomputation.level_of(model) == "layer"
    monkeypatch.undo()
    assert float(loss) == pytest.approx(float(steps.step(model, records, Rows(4096)).loss), rel=1e-4)
    restored = Rows(10)
    restored.restore(rows.state(model), model)
    assert restored.segment_length == 704


def test_a_run_in_segments_is_the_run_in_one_pass(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "novel.txt"
    text.write_text("".join(f"第{i}回 春夏秋冬{i % 7}，山水风云{i % 11}。\n" for i in range(60)), encoding="utf-8")
    runs = []
    for name, more in (("whole", ""), ("segments", ", segment_length: 64")):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            f"""
model: {{path: "{base}", dtype: float32}}
data: {{train: "{text}", eval: "{text}", format: text, max_length: null}}
lora: {{r: 2, lora_dropout: 0.0}}
train: {{output_dir: "{tmp_path / name}", max_steps: 3, logging_steps: 1, learning_rate: 2.0e-2, use_cpu: true{more}}}
generation: {{max_new_tokens: 2}}
""",
            encoding="utf-8",
        )
        runs.append([line for line in read_metrics(training.run(recipe).metrics) if "loss" in line])
    whole, parts = runs
    assert len(whole) == 3 and whole[0]["tokens"] > 10 * 64, "one document, not cut"
    for a, b in zip(whole, parts):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_memory_does_not_grow_with_the_length_but_for_the_kept_states(mode: str) -> None:
    """Counted on PyTorch's meta device: every tensor that lives at once."""
    with torch.device("meta"):
        config = TransnormerConfig(**SIZES, linear_use_lrpe_list=[1, 0])
        model = lora.attach(TransnormerForCausalLM(config), LORA, "recipe.yaml", 1, lambda line: None).train()
    peaks = {}
    for tokens in (256, 512):
        batch = {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "labels": torch.ones(1, tokens, dtype=torch.int64)}
        with plan.Live(model) as live:
            streamed_backward(model, batch, 64, loss_of(model), supervised=tokens, offload="gpu", mode=mode, every=1)
        model.zero_grad(set_to_none=True)
        peaks[tokens] = live.peak
    assert peaks[512] - peaks[256] == 4 * state_store.state_bytes(config)
    assert plan.trace(model, 256) > 2 * (peaks[256] - 3 * state_store.state_bytes(config)), "one pass"
