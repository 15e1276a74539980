"""LLaMA-7B as people fine-tune it: transformers and PEFT (and Liger's kernels, where liger-kernel is installed), on this card.

    python benchmarks/peer.py --data huanhuan.json

The same work as benchmarks/training.py: random weights, r=8, alpha=32, dropout 0.1 on all linear layers, bfloat16, 4 x 4 records a step
padded to the longest of their batch, then one row of 2,048 and of 8,192 tokens. Real tokens a second: padding does not count.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from random_model import TOKENIZER
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tnl.data.build import build
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.recipe.sections import DataSection
from tnl.train.order import StepSampler

SIZES = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def make(liger: bool) -> nn.Module:
    """The model on the GPU, every weight random; Liger's forms of norm, rotary embedding, GLU and loss where asked for."""
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # optional: the rival

        apply_liger_kernel_to_llama()
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        base = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8192))
        torch.set_default_dtype(torch.float32)
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def batches(lengths: list[int], count: int) -> list[dict[str, Tensor]]:
    """Batches of four padded records of such lengths, in the order of a run; random ids, the second half of each record learned."""
    found = []
    for step in list(StepSampler(lengths, 4, seed=42))[:count]:
        longest = max(lengths[i] for i in step)
        ids = torch.randint(3, SIZES["vocab_size"], (len(step), longest), device="cuda")
        size = torch.tensor([lengths[i] for i in step], device="cuda")[:, None]
        column = torch.arange(longest, device="cuda")[None]
        mask = column < size
        found.append({"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask | (column < size // 2), -100)})
    return found


def speed(model: nn.Module, work: list[dict[str, Tensor]], accumulation: int) -> float:
    """Real tokens a second over `work`, after a pass that warms its shapes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = sum(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel() for batch in work)
    start = 0.0
    for _ in ("warm", "timed"):
        torch.cuda.synchronize()
        start = time.monotonic()
        for number, batch in enumerate(work, start=1):
            (model(**batch, use_cache=False).loss / accumulation).backward()
            if number % accumulation == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        torch.cuda.synchronize()
    return tokens / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="instruction records")
    parser.add_argument("--steps", type=int, default=48, help="batches of four that are timed")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    tokenizer = BaiChuanTokenizer.from_pretrained(TOKENIZER)
    data = build(DataSection(train=str(options.data), eval=0, format="alpaca", max_length=384), tokenizer, seed=42)
    lengths = [len(record["input_ids"]) for record in data.train]
    rows: dict[str, float] = {}
    for name in ("HF + PEFT", "HF + PEFT + Liger")[: 1 + (importlib.util.find_spec("liger_kernel") is not None)]:
        model = make("Liger" in name)
        works = {"Huanhuan, batches of 4": (batches(lengths, options.steps), 4)}
        for length in (2048, 8192):
            ids = torch.randint(3, SIZES["vocab_size"], (1, length), device="cuda")
            works[f"1 x {length:,}"] = [{"input_ids": ids, "labels": ids}] * 4, 1
        for work, (made, accumulation) in works.items():
            torch.cuda.reset_peak_memory_stats()
            try:
                rows[f"{name}: {work}"] = found = round(speed(model, made, accumulation))
                print(f"{name}: {work}: {found} tokens/s, {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB", flush=True)
            except torch.OutOfMemoryError:
                print(f"{name}: {work}: out of memory", flush=True)
            model.zero_grad()
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
