"""A packed, fused, graphed run learns as plain PEFT in float32 does: two loss curves over the same records, close to each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tnl.data.collate import collate_padded
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection, TrainSection
from tnl.train import arguments, lora
from tnl.train.graphed import Graphed
from tnl.train.paths_taken import paths_taken, why_eager
from tnl.train.step import ROUND, Rows
from tnl.train.trainer import TnlTrainer

LORA = LoraSection(r=8, lora_alpha=32, lora_dropout=0.0)
BATCH = 8
WINDOW = 20
"""Steps whose losses are averaged before curves are compared: single steps differ in their records."""
WORDS, NEXT = 64, 4
"""Records are walks over so many of the vocabulary's tokens; any of NEXT may follow one. Whoever knows which ones is at log NEXT = 1.39."""


def make_records(vocabulary: int, count: int) -> list[dict[str, Any]]:
    """Walks of 16 to 47 tokens; the first third is not learned."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randperm(vocabulary, generator=generator)[:WORDS]
    follows = torch.randint(WORDS, (WORDS, NEXT), generator=generator)
    records = []
    for number in range(count):
        length = int(torch.randint(16, 48, (), generator=generator))
        place, choices, ids = number % WORDS, torch.randint(NEXT, (length,), generator=generator).tolist(), []
        for choice in choices:
            ids.append(int(words[place]))
            place = int(follows[place, choice])
        records.append({"id": f"walk {number}", "input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return records


def make_model(config: TransnormerConfig, device: str, dtype: torch.dtype, start: dict[str, Tensor] | None = None) -> nn.Module:
    """Random weights, rounded to bfloat16, in `dtype`; start: the adapter's first weights (None: as lora.attach makes them)."""
    torch.manual_seed(0)
    with torch.device(device):
        base = TransnormerForCausalLM(config).to(torch.bfloat16).to(dtype)
    base.model.pick_kernels("reference" if start else "auto")
    model = lora.attach(base, LORA, "curve", 0, lambda line: None)
    for name, parameter in lora.trainable(model) if start else ():
        parameter.data.copy_(start[name])
    return model.train()


def trainer_of(model: nn.Module, records: list[dict[str, Any]], rate: float, run: Path) -> TnlTrainer:
    """Trainer with packed rows and CUDA graphs, a line a step."""
    device = next(model.parameters()).device
    section = TrainSection(
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=device.type == "cpu",
    )
    args, settings = arguments.build(section, "curve", run, device, measured=False)
    rows = Rows(BATCH * 64, multiple=ROUND)
    trainer = TnlTrainer(model, args, settings, rows, records, [])
    trainer.graphed = Graphed(model)
    if device.type == "cuda":
        taken = paths_taken(model, rows, why_eager(model, rows, trainer.engine, True))
        assert (taken["attention"], taken["lora"], taken["step"]) == ("Triton", "fused", "in CUDA graphs")
    return trainer


def our_curve(model: nn.Module, records: list[dict[str, Any]], rate: float, run: Path) -> list[float]:
    """The losses of every step."""
    trainer = trainer_of(model, records, rate, run)
    trainer.train()
    assert trainer.graphed is not None and trainer.graphed.graphs.known
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def peft_curve(model: nn.Module, records: list[dict[str, Any]], rate: float) -> list[float]:
    """The same by nothing but PEFT's forward, autograd and AdamW, on padded batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for first in range(0, len(records), BATCH):
        batch = collate_padded(records[first : first + BATCH], 0)
        loss = model(**{name: x.to(parameters[0].device) for name, x in batch.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smooth(losses: list[float]) -> Tensor:
    """Means of WINDOW steps."""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, WINDOW, 1).mean(1)


def compare(config: TransnormerConfig, steps: int, rate: float, device: str, dtype: torch.dtype, run: Path, band: float) -> None:
    """Assert that our curve stays within `band` nats of PEFT's, in means of WINDOW steps, and that both learn more than 2 nats."""
    records = make_records(config.vocab_size, BATCH * steps)
    model = make_model(config, device, dtype)
    start = {name: p.detach().float().clone() for name, p in lora.trainable(model)}
    ours = smooth(our_curve(model, records, rate, run))
    del model
    theirs = smooth(peft_curve(make_model(config, device, torch.float32, start), records, rate))
    apart = (ours - theirs).abs()
    told = f"PEFT from {theirs[0]:.3f} to {theirs[-1]:.3f} nats; apart by {apart.max():.2g} at most, {apart.mean():.2g} on average"
    print(told)
    assert len(ours) == len(theirs) == steps - WINDOW + 1
    assert theirs[-1] < theirs[0] - 2 and apart.max() <= band, told


SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "decoder_embed_dim": 32,
    "hidden_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "glu_dim": 48,
}
MIDDLE: dict[str, Any] = {
    "vocab_size": 64000,
    "decoder_embed_dim": 1024,
    "hidden_dim": 1024,
    "decoder_attention_heads": 8,
    "decoder_layers": 24,
    "glu_dim": 2816,
}
"""The 385M."""


def shape(sizes: dict[str, Any], **changes: Any) -> TransnormerConfig:
    """LRPE in the first layer alone, as published."""
    return TransnormerConfig(**sizes, linear_use_lrpe_list=[1] + [0] * (sizes["decoder_layers"] - 1), linear_act_fun="swish", **changes)


def test_a_run_follows_peft_in_float32(tmp_path: Path) -> None:
    compare(shape(SIZES, init_std=0.3), 100, 3e-3, "cpu", torch.float32, tmp_path, 1e-4)


@pytest.mark.slow
def test_a_run_in_bfloat16_follows_peft_in_float32(tmp_path: Path) -> None:
    compare(shape(SIZES, init_std=0.3), 150, 3e-3, "cpu", torch.bfloat16, tmp_path, 0.1)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_700_steps_at_the_385ms_shapes_follow_peft_in_float32(tmp_path: Path) -> None:
    """In bfloat16, of which a gradient is some percent of noise. The whole test takes about three minutes of a card."""
    compare(shape(MIDDLE), 700, 1e-3, "cuda", torch.bfloat16, tmp_path, 0.1)


class Unwaiting(TrainerCallback):
    """From step 8 on, once shapes are known, whatever waits for the card is an error."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if 8 <= state.global_step < 24 else "default")


@pytest.mark.gpu
def test_between_two_lines_of_the_log_the_host_waits_for_no_step_but_the_one_before(tmp_path: Path) -> None:
    """That one's numbers come in pinned memory, behind an event (guard.py)."""
    records = make_records(SIZES["vocab_size"], BATCH)
    trainer = trainer_of(make_model(shape(SIZES, init_std=0.3), "cuda", torch.bfloat16), records * 32, 1e-3, tmp_path)
    trainer.args.logging_steps = trainer.state.logging_steps = 1000
    trainer.add_callback(Unwaiting())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 32
