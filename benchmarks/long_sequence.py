"""Long rows through `tnl train` itself, and reading forward: tokens a second, peak memory, and that neither grows with the length.

    python benchmarks/long_sequence.py --models 7b --work /tmp/bench --lengths 32768 65536 262144 1048576 --out long.json
    python benchmarks/long_sequence.py --models 7b --work /tmp/bench --modes lean --lengths 4194304 --memory 24

Random weights of the real shapes, LoRA r=8 on all linear layers, dropout 0.1, bfloat16, one document of random characters a step. No
figure is printed unless the golden values pass on this device, the gradients of a streamed bfloat16 row are as near the float32 ones
of one pass as one bfloat16 pass is, and every gradient norm of the run is finite and not zero.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from random_model import write
from torch import Tensor, nn
from training import ROOT, long_text, parity

from tnl.data.collate import collate_rows
from tnl.model.load import load_model
from tnl.model.state import TransnormerCache
from tnl.model.stream import prefill, token_losses
from tnl.recipe.sections import LoraSection
from tnl.train import lora, recomputation
from tnl.train.long_sequence import streamed_backward
from tnl.train.step import Rows, forward_backward, head_loss

RECIPE = """
model: {{path: {model}, dtype: bfloat16}}
data: {{train: {train}, eval: 0, format: text, max_length: {length}}}
lora: {{r: 8, lora_alpha: 32, lora_dropout: 0.1}}
train: {{output_dir: {out}, per_device_train_batch_size: 1, gradient_accumulation_steps: 1, max_steps: {steps}, logging_steps: 1,
  save_strategy: "no", learning_rate: 1.0e-5, segment_length: {segment}, state_offload: {offload}, gradient_checkpointing: {lean}}}
generation: {{max_new_tokens: 2}}
"""
MARGIN = 1.15  # how much farther from float32 a streamed bfloat16 gradient may be than one pass in bfloat16


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def agreement(folder: Path, lengths: list[int], segment: int) -> list[dict[str, float]]:
    """Relative distance from the float32 gradients of one pass: of one bfloat16 pass, and of a streamed one. Exits where it is larger."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, float]] = []
    for length in lengths:
        ids = torch.randint(3, 60000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        record = {"id": "r", "input_ids": ids, "labels": ids}
        found: dict[str, Tensor] = {}
        for name, dtype in (("exact", "float32"), ("one pass", "bfloat16"), ("streamed", "bfloat16")):
            base = load_model(folder, dtype=dtype, device=device)
            model = lora.attach(base, LoraSection(lora_dropout=0.0), "recipe", 0, lambda line: None).train()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter_name, p in lora.trainable(model):
                    if "lora_B" in parameter_name:  # zeros would hide every gradient of lora_A
                        p.copy_(0.02 * torch.randn(p.shape, generator=generator))
            recomputation.use(model, "host")
            if name == "streamed":
                loss = partial(head_loss, model, rows=Rows(length))
                streamed_backward(model, collate_rows([record]), segment, loss, supervised=length - 1, mode="lean")
            else:
                forward_backward(model, Rows(length), [record], length - 1)
            found[name] = gradients(model)
            del base, model
        scale = found["exact"].norm()
        one, streamed = (float((found[name] - found["exact"]).norm() / scale) for name in ("one pass", "streamed"))
        print(f"{length} tokens: gradients off float32 by {one:.2%} in one pass, {streamed:.2%} streamed (bfloat16)")
        if not streamed <= MARGIN * one:
            sys.exit("no figure: streamed gradients are farther off than rounding explains")
        rows.append({"tokens": length, "one_pass": one, "streamed": streamed})
    return rows


def train(model: Path, work: Path, length: int, mode: str, options: argparse.Namespace) -> dict[str, object]:
    """One row of the table: `tnl train` on documents of `length` tokens."""
    work.mkdir(parents=True, exist_ok=True)
    text = long_text(work / "text.txt", int(1.15 * length * options.steps))  # some pairs of characters are one token
    values = {"model": model, "train": text, "length": length, "out": work / "run", "steps": options.steps, "segment": options.segment}
    values |= {"offload": options.offload, "lean": str(mode == "lean").lower()}
    (work / "recipe.yaml").write_text(RECIPE.format(**values), encoding="utf-8")
    command = [sys.executable, "-m", "tnl", "train", str(work / "recipe.yaml")]
    command += [] if options.memory is None else ["--memory", str(options.memory)]
    name = {"work": f"{mode}, segments of {options.segment:,}", "tokens": length}
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if made.returncode:
        return name | {"failed": f"exit {made.returncode}: {made.stderr.strip().splitlines()[-1:]}"}
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    sizes = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *steps], steps)]
    if not all(0 < line["grad_norm"] < 1e6 for line in steps):
        return name | {"failed": f"no figure: gradient norms {[line['grad_norm'] for line in steps]}"}
    whole = [line for line, size in zip(steps, sizes) if size == length]  # the last piece of the text is shorter
    warm = whole[1:] or whole
    speed = max(line["tokens_per_second"] for line in warm)
    said = [line for line in (made.stdout + made.stderr).splitlines() if "states between them" in line]
    return name | {
        "tokens_per_second": round(speed),
        "seconds_a_step": round(length / speed, 1),
        "peak_gib": round(max(line["peak_memory_reserved"] for line in steps) / 2**30, 2),
        "states": said[0].rpartition(": ")[2] if said else "none",
        "warm": len(whole) > 1,
    }


def forward(model: Path, length: int, segment: int) -> dict[str, object]:
    """Reading a document forward: its loss, and as a prompt."""
    net = load_model(model, dtype="bfloat16", device="cuda" if torch.cuda.is_available() else "cpu").eval()
    ids = torch.randint(3, 60000, (length,), generator=torch.Generator().manual_seed(1))
    seconds = {}
    for name in ("warm", "prefill", "loss"):
        start = time.monotonic()
        if name == "prefill":
            prefill(net, ids, TransnormerCache(len(net.model.layers)), segment_length=segment).sum().item()
        else:
            part = ids if name == "loss" else ids[: 4 * segment]
            float(sum(losses.sum() for _, losses in token_losses(net, part, segment_length=segment)))
        seconds[name] = time.monotonic() - start
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    row: dict[str, object] = {"work": "forward only", "tokens": length, "peak_gib": round(peak, 2)}
    return row | {"prefill_tokens_per_second": round(length / seconds["prefill"]), "tokens_per_second": round(length / seconds["loss"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["7b"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and runs")
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 65536, 262144, 1048576])
    parser.add_argument("--modes", nargs="*", choices=["fast", "lean", "forward"], default=["fast", "lean", "forward"])
    parser.add_argument("--segment", type=int, default=4096)
    parser.add_argument("--offload", choices=["auto", "gpu", "host"], default="auto")
    parser.add_argument("--steps", type=int, default=2, help="the first one also fills caches, and is left out where there are more")
    parser.add_argument("--memory", type=float, help="GiB of the card that training may use")
    parser.add_argument("--agree", default="385m", help="the model whose gradients are compared")
    parser.add_argument("--agree-lengths", nargs="*", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    parity()
    agreed = agreement(write(options.agree, options.work / options.agree), options.agree_lengths, 1000)
    rows: list[dict[str, object]] = []
    for size in options.models:
        model = write(size, options.work / size)
        for mode in options.modes:
            for length in options.lengths:
                folder = options.work / f"{size}-{mode}-{length}"
                made = forward(model, length, options.segment) if mode == "forward" else train(model, folder, length, mode, options)
                rows.append({"model": size} | made)
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{card}, torch {torch.__version__}, commit {commit or 'unknown'}\n")
    print("| model | work | tokens | tokens/s | s a step | peak GiB | states |\n|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row.get(key, "") for key in ("seconds_a_step", "peak_gib", "states")]
        speed = row.get("tokens_per_second", row.get("failed"))
        print(f"| {row['model']} | {row['work']} | {row['tokens']:,} | {speed} | {' | '.join(map(str, cells))} |")
    if options.out:
        options.out.write_text(json.dumps({"agreement": agreed, "rows": rows}, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
