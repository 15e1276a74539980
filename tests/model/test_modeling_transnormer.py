"""Parity with the authors' published code on the golden values, through the Auto classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation import TextStreamer

import tnl.model  # noqa: F401 (registers the Auto classes)
from tnl.model import modeling_transnormer
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache

GOLDEN = Path(__file__).parents[1] / "golden"
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
FOLDERS = ("base", "long", "right-pad", "left-pad", "bias-elu")
NEVER = 160  # an end token outside the vocabulary: decoding goes on to max_new_tokens


@pytest.fixture(scope="module")
def base() -> TransnormerForCausalLM:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "base")


def golden(folder: str, device: str) -> tuple[TransnormerForCausalLM, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / folder, device_map=device)
    expected = GOLDEN / folder.removesuffix("-sharded") / "expected.safetensors"
    return model, load_file(expected, device=device)


def worst(actual: Tensor, expected: Tensor, real: Tensor) -> float:
    return (actual - expected)[real].abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_training_logits_hidden_states_loss_and_gradients(folder: str, device: str) -> None:
    model, expected = golden(folder, device)
    model.train()
    real = expected["attention_mask"].bool()
    out = model(
        expected["input_ids"],
        attention_mask=expected["attention_mask"],
        labels=expected["labels"],
        output_hidden_states=True,
        use_cache=False,
    )
    assert worst(out.logits, expected["train_logits"], real) < 1e-4
    assert abs(out.loss - expected["loss"]) < 1e-4
    assert len(out.hidden_states) == model.config.decoder_layers + 1
    for i, hidden in enumerate(out.hidden_states):
        assert worst(hidden, expected[f"hidden_states.{i}"], real) < 1e-4, i
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = [key.removeprefix("grad.") for key in expected if key.startswith("grad.")]
    assert len(names) == (0 if folder == "long" else len(gradients))  # none were recorded for the long sequence
    for name in names:
        assert (gradients[name] - expected[f"grad.{name}"]).abs().max() < 1e-4, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_inference_logits_and_states(folder: str, device: str) -> None:
    model, expected = golden(folder, device)
    mask = expected["attention_mask"]
    with torch.inference_mode():
        out = model(expected["input_ids"], attention_mask=mask, use_cache=True)
    assert worst(out.logits, expected["eval_logits"], mask.bool()) < 1e-4
    whole = mask.bool().all(1)
    for i, state in enumerate(out.past_key_values.states):
        assert state.dtype == torch.float32
        assert worst(state, expected[f"state.{i}"], whole) < 1e-4, i
    assert out.past_key_values.seen.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", ("base", "base-sharded", "long", "bias-elu"))
def test_greedy_decoding(folder: str, device: str) -> None:
    model, expected = golden(folder, device)
    prompt, ids = expected["prompt_ids"], expected["greedy_ids"]
    made = model.generate(prompt, max_new_tokens=ids.shape[1], do_sample=False, eos_token_id=NEVER)
    assert made[:, prompt.shape[1] :].tolist() == ids.tolist()
    cache = TransnormerCache(model.config.decoder_layers)
    with torch.inference_mode():
        steps = [model(prompt, past_key_values=cache).logits[:, -1]]
        for t in range(ids.shape[1]):
            steps.append(model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1])
    logits = torch.stack(steps, 1)
    assert (logits - expected["greedy_logits"]).abs().max() < 1e-4
    assert cache.get_seq_length() == prompt.shape[1] + ids.shape[1]


@pytest.mark.parametrize("side", ("left", "right"))
def test_a_padded_row_goes_on_as_it_would_alone(base: TransnormerForCausalLM, side: str) -> None:
    """Also where the tokens that follow are padded in their turn."""
    torch.manual_seed(0)
    rows = [torch.randint(3, 160, (n,)) for n in (5, 12, 9)]
    more = [torch.randint(3, 160, (n,)) for n in (4, 1, 3)]

    def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        width = max(map(len, parts))
        ids, mask = torch.zeros(len(parts), width, dtype=torch.long), torch.zeros(len(parts), width, dtype=torch.long)
        for i, part in enumerate(parts):
            where = slice(width - len(part), None) if side == "left" else slice(0, len(part))
            ids[i, where], mask[i, where] = part, 1
        return ids, mask

    with torch.inference_mode():
        ids, mask = padded(rows)
        out = base(ids, attention_mask=mask, use_cache=True)
        ids, mask = padded(more)
        out = base(ids, attention_mask=mask, past_key_values=out.past_key_values)
        for i, (row, rest) in enumerate(zip(rows, more)):
            alone = base(torch.cat([row, rest])[None], use_cache=True)
            assert (out.logits[i][mask[i].bool()] - alone.logits[0, len(row) :]).abs().max() < 1e-5
            for batched, single in zip(out.past_key_values.states, alone.past_key_values.states):
                assert (batched[i] - single[0]).abs().max() < 1e-5
        assert out.past_key_values.seen.tolist() == [len(a) + len(b) for a, b in zip(rows, more)]


@pytest.mark.parametrize("settings", ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}))
def test_generate_agrees_with_and_without_cache_and_left_padded(base: TransnormerForCausalLM, settings: dict) -> None:
    torch.manual_seed(1)
    prompt = torch.randint(3, 160, (2, 11))
    arguments = {"max_new_tokens": 12, "eos_token_id": NEVER, **settings}
    made = []
    for extra in ({}, {"use_cache": False}):
        torch.manual_seed(2)
        made.append(base.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments, **extra)[:, 11:].tolist())
    torch.manual_seed(2)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(prompt)], 1)
    made.append(base.generate(ids, attention_mask=mask, **arguments)[:, 14:].tolist())
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_a_token_that_was_drawn_is_not_asked_for_its_mask(
    base: TransnormerForCausalLM, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the mask on the host would wait for the device at every token."""
    masks: list[tuple[int, ...] | None] = []

    def arrange(x: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        masks.append(None if mask is None else tuple(mask.shape))
        return real_arrange(x, mask, *rest)

    real_arrange = modeling_transnormer.arrange
    monkeypatch.setattr(modeling_transnormer, "arrange", arrange)
    prompt, mask = torch.randint(3, 160, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3], cache = 0, TransnormerCache(base.config.decoder_layers)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": NEVER, **settings}
    whole = base.generate(prompt, attention_mask=mask, past_key_values=cache, **arguments)
    assert masks == [(2 * settings.get("num_beams", 1), 7), None, None, None]
    if not settings:  # a call's own tokens are held against its mask, be it a single one
        base.generate(whole, attention_mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1), past_key_values=cache, **arguments)
        assert masks[4:] == [(2, 11), None, None, None]


def test_generate_streams_and_goes_on_from_a_cache(base: TransnormerForCausalLM) -> None:
    class Ids(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    torch.manual_seed(3)
    prompt, streamer = torch.randint(3, 160, (1, 9)), Ids()
    whole = base.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=NEVER, streamer=streamer)
    assert streamer.seen == [*whole[0].tolist(), -1]
    cache = TransnormerCache(3)
    base.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=NEVER, past_key_values=cache)
    rest = base.generate(whole[:, :13], max_new_tokens=6, do_sample=False, eos_token_id=NEVER, past_key_values=cache)
    assert rest.tolist() == whole.tolist()


@pytest.mark.parametrize("training", (False, True))
def test_packed_rows_are_exact(base: TransnormerForCausalLM, training: bool) -> None:
    torch.manual_seed(4)
    lengths = (1, 17, 70, 3)
    parts = [torch.randint(3, 160, (1, n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    row = torch.cat(parts, 1)
    base.train(training)
    packed = base(row, position_ids=positions, labels=row, num_items_in_batch=torch.tensor(10))
    alone = [base(part, labels=part, num_items_in_batch=torch.tensor(10)) for part in parts]
    base.eval()
    assert (packed.logits - torch.cat([out.logits for out in alone], 1)).abs().max() < 1e-5
    assert abs(packed.loss - sum(out.loss for out in alone)) < 1e-5


def test_gradient_checkpointing_recomputes_and_changes_nothing(base: TransnormerForCausalLM) -> None:
    torch.manual_seed(5)
    ids = torch.randint(3, 160, (2, 33))
    calls = []
    hook = base.model.layers[1].channel_mixer.l1.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        base.train()
        base.zero_grad()
        if checkpointing:
            base.gradient_checkpointing_enable()
        base(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in base.parameters()])
    hook.remove()
    base.gradient_checkpointing_disable()
    base.eval()
    assert len(calls) == 3  # once without, twice with
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_positions_and_decays_stay_float32_in_a_half_model(base: TransnormerForCausalLM) -> None:
    model = TransnormerForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.bfloat16).to(torch.bfloat16)
    mixer = model.model.layers[0].token_mixer
    exact = base.model.layers[0].token_mixer
    assert mixer.qkvu_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.lrpe.theta, exact.lrpe.theta) and torch.equal(mixer.log_decay, exact.log_decay)
    out = model(torch.randint(3, 160, (1, 20)), use_cache=True)
    assert {state.dtype for state in out.past_key_values.states} == {torch.float32}


def test_save_and_load_again(base: TransnormerForCausalLM, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 160, (1, 20))
    assert torch.equal(base(ids).logits, again(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_an_untied_head_and_layer_norm_and_no_activation() -> None:
    config = TransnormerConfig(
        vocab_size=50,
        decoder_embed_dim=24,
        decoder_layers=2,
        decoder_attention_heads=3,
        hidden_dim=24,
        glu_dim=-1,
        linear_act_fun="none",
        norm_type="layernorm",
        tie_word_embeddings=False,
    )
    model = TransnormerForCausalLM(config)
    names = {name for name, _ in model.named_parameters()}
    assert {"lm_head.weight", "model.layers.1.token_mixer.norm.weight", "model.final_norm.bias"} <= names
    assert model.model.layers[0].channel_mixer.l1.weight.shape == (24, 24)
    assert model(torch.arange(10)[None]).logits.isfinite().all()


def test_two_conversations_do_not_touch_each_other(base: TransnormerForCausalLM) -> None:
    torch.manual_seed(6)
    a, b = torch.randint(3, 160, (1, 12)), torch.randint(3, 160, (1, 12))
    caches = TransnormerCache(3), TransnormerCache(3)
    mixed: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        for t in range(12):
            for i, ids in enumerate((a, b)):
                mixed[i].append(base(ids[:, t : t + 1], past_key_values=caches[i]).logits)
        for i, ids in enumerate((a, b)):
            assert (torch.cat(mixed[i], 1) - base(ids).logits).abs().max() < 1e-5
