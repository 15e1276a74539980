"""Pretrain the demo base on one GPU, in the minutes given.

    python scripts/pretrain_demo.py --tokens .pretrain --tokenizer tnl/demo/base --out OUT --minutes 6.5

`.pretrain` is what scripts/demo_corpus.py wrote. Rows are streams of whole documents whose state is carried from one step to the
next: half of the text restarts at every document, half runs on for as many as 150,000 tokens, so that the model stays itself
after a long reading. The learning rate follows the clock: warm-up, then a straight line to zero at the last minute.
With `--steps` it follows the steps instead, and a run repeats another.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from demo_corpus import WEIGHTS
from torch import Tensor

import tnl.model  # noqa: F401  registers the classes
from tnl.kernels.linear_cross_entropy import linear_cross_entropy
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

SHAPE = {"decoder_embed_dim": 256, "hidden_dim": 256, "decoder_layers": 5, "decoder_attention_heads": 4, "glu_dim": 1024}
TINY = {"decoder_embed_dim": 32, "hidden_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 64}
SHORTEST_RUN, LONGEST_RUN = 1_000, 150_000  # tokens that one state lives through, where documents do not restart it
EVAL_TOKENS, EVAL_WIDTH = 65_536, 1024
PROMPTS = [
    "你叫什么名字？",
    "你是谁？",
    "写一首有“月”字的诗。",
    "讲讲关公的故事。",
    "“床前明月光”的下一句是什么？",
    "What does courage mean?",
]

Shards = dict[str, list[np.ndarray]]


def read_shards(folder: Path, part: str) -> Shards:
    """Source -> its documents as ids."""
    shards = {}
    for name in WEIGHTS:
        with np.load(folder / f"{name}.{part}.npz") as shard:
            shards[name] = np.split(shard["tokens"], np.cumsum(shard["lengths"])[:-1])
    return shards


def stream(shards: Shards, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One epoch as [rows, length] ids and positions; a position of 0 restarts the state."""
    documents = [ids for name, found in shards.items() for ids in found * WEIGHTS[name]]
    order = rng.permutation(len(documents))
    lengths = np.asarray([len(documents[i]) for i in order])
    restarts = np.zeros(len(order), dtype=bool)
    ends = np.cumsum(lengths)
    first = 0
    while first < len(order):
        run = math.exp(rng.uniform(math.log(SHORTEST_RUN), math.log(LONGEST_RUN)))
        last = max(first + 1, int(np.searchsorted(ends, ends[first] - lengths[first] + run)))
        restarts[first : last if rng.random() < 0.5 else first + 1] = True
        first = last
    starts = np.zeros(ends[-1], dtype=bool)
    starts[(ends - lengths)[restarts]] = True
    length = len(starts) // rows
    tokens = np.concatenate([documents[i] for i in order])[: rows * length].reshape(rows, length)
    starts = starts[: rows * length].reshape(rows, length)
    starts[:, 0] = True
    column = np.arange(length, dtype=np.int32)
    return tokens, column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)


def batches(shards: Shards, rows: int, width: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids, positions and next ids [rows, width], epoch after epoch; a row goes on where its row of the batch before stopped."""
    rng = np.random.default_rng(seed)
    while True:
        tokens, positions = stream(shards, rows, rng)
        for a in range(0, tokens.shape[1] - width, width):
            part = torch.from_numpy(tokens[:, a : a + width + 1].astype(np.int64)).to(device)
            yield part[:, :-1], torch.from_numpy(positions[:, a : a + width].astype(np.int64)).to(device), part[:, 1:]


def forward(model: TransnormerForCausalLM, ids: Tensor, positions: Tensor, targets: Tensor, cache: TransnormerCache | None) -> Tensor:
    """Mean loss of the batch; `cache`, where given, is read and brought to the batch's end."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        hidden = model.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)[0]
        total = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(), chunk=16_384)
    return total / targets.numel()


def optimizers(model: TransnormerForCausalLM, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for the embedding (which is the head as well)."""
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and (p.ndim != 2 or "embed" in name)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def rate(progress: float, warmup: float = 0.02) -> float:
    return min(progress / warmup, (1 - progress) / (1 - warmup))


@torch.no_grad()
def held_out_losses(model: TransnormerForCausalLM, shards: Shards) -> dict[str, float]:
    """Source -> mean loss a token over its first EVAL_TOKENS held-out tokens, documents cut into rows of EVAL_WIDTH."""
    losses = {}
    device = next(model.parameters()).device
    for name, documents in shards.items():
        pieces = [ids[a : a + EVAL_WIDTH + 1].astype(np.int64) for ids in documents for a in range(0, len(ids) - 1, EVAL_WIDTH)]
        ids = np.concatenate([p[:-1] for p in pieces])[:EVAL_TOKENS]
        targets = np.concatenate([p[1:] for p in pieces])[:EVAL_TOKENS]
        positions = np.concatenate([np.arange(len(p) - 1) for p in pieces])[:EVAL_TOKENS]
        row = [torch.from_numpy(x)[None].to(device) for x in (ids, positions, targets)]
        losses[name] = float(forward(model, *row, None))
    return losses


@torch.no_grad()
def samples(model: TransnormerForCausalLM, tokenizer: Any) -> Iterator[str]:
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=next(model.parameters()).device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=2, pad_token_id=0)
        yield f"  {prompt}\n    {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)!r}"


class Log:
    """Lines on the screen and in a file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def train(model: TransnormerForCausalLM, shards: tuple[Shards, Shards], arguments: argparse.Namespace, log: Log) -> None:
    """Until the minutes or the steps are over; logs the loss, and the held-out losses five times."""
    device = next(model.parameters()).device
    steps = optimizers(model, arguments.lr, arguments.weight_decay)
    cache = TransnormerCache(len(model.model.layers))
    began, report, tokens, running = time.perf_counter(), 0.2, 0, torch.zeros((), device=device)
    for step, (ids, positions, targets) in enumerate(batches(shards[0], arguments.rows, arguments.width, arguments.seed, device)):
        seconds = time.perf_counter() - began
        progress = step / arguments.steps if arguments.steps else seconds / (60 * arguments.minutes)
        if progress >= 1:
            break
        if progress >= report:
            report += 0.2
            log(f"step {step}: held out {summary(held_out_losses(model, shards[1]))}")
        for optimizer in steps:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * max(rate(progress), 1e-3)
        loss = forward(model, ids, positions, targets, cache)
        loss.backward()
        cache.states = [None if state is None else state.detach() for state in cache.states]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        running += loss.detach()
        if step % 100 == 99 or step == 4:
            seconds = time.perf_counter() - began
            mean = running.item() / (5 if step == 4 else 95 if step == 99 else 100)
            log(f"step {step + 1:5} {seconds:6.1f} s {tokens / 1e6:7.1f} M tokens {tokens / seconds / 1e3:6.0f} k/s loss {mean:.4f}")
            running.zero_()
    log(f"{step} steps, {tokens:,} tokens, {time.perf_counter() - began:.1f} s")


def summary(losses: dict[str, float]) -> str:
    return f"mean {sum(losses.values()) / len(losses):.4f} | " + " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path(".pretrain"))
    parser.add_argument("--tokenizer", type=Path, default=Path("tnl/demo/base"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.5)
    parser.add_argument("--steps", type=int, default=0, help="train so many steps, whatever they take")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smoke test: a model of few parameters")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    tokenizer = BaiChuanTokenizer.from_pretrained(arguments.tokenizer)
    shape = TINY if arguments.tiny else SHAPE
    lrpe = [1] + [0] * (shape["decoder_layers"] - 1)
    config = TransnormerConfig(vocab_size=len(tokenizer), linear_act_fun="swish", linear_use_lrpe_list=lrpe, **shape)
    model = TransnormerForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("theta"))
    shards = read_shards(arguments.tokens, "train"), read_shards(arguments.tokens, "eval")
    with (arguments.out / "log").open("w", encoding="utf-8") as file:
        log = Log(file)
        log(f"{sum(p.numel() for p in model.parameters()):,} parameters; torch {torch.__version__}; {vars(arguments)}")
        train(model, shards, arguments, log)
        model = model.to(torch.bfloat16).eval()
        losses = held_out_losses(model, shards[1])
        log(f"held out, weights in bfloat16: {summary(losses)}")
        model.config.dtype = "bfloat16"
        model.save_pretrained(arguments.out)
        (arguments.out / "held_out.json").write_text(json.dumps(losses, indent=1), encoding="utf-8")
        for path in arguments.tokenizer.glob("tokenizer*"):
            shutil.copy(path, arguments.out / path.name)
        for sample in samples(model, tokenizer):
            log(sample)


if __name__ == "__main__":
    main()
