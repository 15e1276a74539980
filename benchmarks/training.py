"""Real tokens a second and peak memory of `tnl train` itself, read from its metrics.jsonl.

    python benchmarks/training.py --models 7b 1b --data huanhuan.json --work /tmp/bench
    python benchmarks/training.py --models 7b --only "1 x 2,048" --work /dev/shm/bench --seconds 300

Every figure comes from the command a person runs, on random weights of the real shapes. None is printed unless the golden
values pass on this device, the loss falls and every gradient norm is finite and not zero.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from random_model import write
from safetensors.torch import load_file

from tnl.model.load import load_model

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "long"
WARM = 2  # logged lines that are left out: shapes and caches are cold
RECIPE = """
model: {{path: {model}, dtype: bfloat16}}
data: {{train: {train}, eval: 0, max_length: {max_length}, format: {format}{system}}}
lora: {{r: 8, lora_alpha: 32, lora_dropout: 0.1}}
train: {{output_dir: {out}, per_device_train_batch_size: {batch}, gradient_accumulation_steps: {accumulation}, max_steps: {steps},
  logging_steps: {logging}, save_strategy: "no", gradient_checkpointing: {checkpointing}, learning_rate: 1.0e-4}}
generation: {{max_new_tokens: 8}}
"""
# name: format, records a batch, batches a step, tokens a record, steps, recomputation; OVERRIDES: what the command says besides
WORK = {
    "Huanhuan, 4 x 4": ("alpaca", 4, 4, 384, 144, "false"),
    "Huanhuan, shared prompt": ("alpaca", 4, 4, 384, 144, "false"),
    "1 x 2,048": ("text", 1, 1, 2048, 40, "false"),
    "4 x 384": ("text", 4, 1, 384, 60, "false"),
    "1 x 8,192": ("text", 1, 1, 8192, 15, "false"),
    "1 x 8,192, recomputed": ("text", 1, 1, 8192, 15, "true"),
    "4 x 384, recomputed": ("text", 4, 1, 384, 24, "true"),
}
WHOLE = "whole recipe"
"""recipes/huanhuan-7b.yaml as it is: three epochs, measuring, checkpoints, questions; its figure is the time by the clock."""
WORK |= dict.fromkeys((WHOLE, f"{WHOLE}, shared prompt"), ("alpaca", 4, 4, 384, 0, "false"))
OVERRIDES = {name: ["data.shared_prompt=true"] for name in WORK if name.endswith("shared prompt")}


def parity() -> None:
    """Stop unless this device computes the golden logits and loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(GOLDEN, dtype="float32", device=device)
    expected = load_file(GOLDEN / "expected.safetensors", device=device)
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["labels"])
    error = (out.logits - expected["train_logits"]).abs().max().item()
    if not error < 1e-4 or not abs(out.loss - expected["loss"]) < 1e-4:
        sys.exit(f"no figure: the golden logits are off by {error:.1e} on {device}")
    print(f"golden logits within {error:.1e} on {device} ({model.backend} kernels)")


def long_text(path: Path, tokens: int) -> Path:
    """A document of more than `tokens` tokens of random Chinese characters: random data, never zeros."""
    draw = random.Random(0)
    common = [chr(c) for c in range(0x4E00, 0x5600)]
    path.write_text("".join(draw.choice(common) for _ in range(tokens)), encoding="utf-8")
    return path


def written(name: str, model: Path, data: Path, work: Path) -> Path:
    """The recipe of one kind of work."""
    form, batch, accumulation, length, steps, checkpointing = WORK[name]
    train = data if form == "alpaca" else long_text(work / "text.txt", length * batch * steps * 2)
    values = {"model": model, "train": train, "max_length": length, "format": form, "out": work / "run", "batch": batch}
    values |= {"accumulation": accumulation, "steps": steps, "logging": max(1, steps // 12), "checkpointing": checkpointing}
    values["system"] = ", system: 现在你要扮演皇帝身边的女人--甄嬛" if form == "alpaca" else ""
    (work / "recipe.yaml").write_text(RECIPE.format(**values), encoding="utf-8")
    return work / "recipe.yaml"


def measure(name: str, model: Path, data: Path, work: Path, seconds: float) -> dict[str, object]:
    """Run `tnl train` on one kind of work, for so many seconds at most, all that it says shown; returns its row of the table."""
    checkpointing = WORK[name][-1]
    work.mkdir(parents=True, exist_ok=True)
    if name.startswith(WHOLE):
        words = [str(ROOT / "recipes/huanhuan-7b.yaml"), f"model.path={model}", f"data.train={data}", f"train.output_dir={work / 'run'}"]
    else:
        words = [str(written(name, model, data, work))]
    start = time.monotonic()
    command = [sys.executable, "-m", "tnl", "train", *words, *OVERRIDES.get(name, [])]
    try:
        made = subprocess.run(command, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"work": name, "failed": "no time was left"}
    if made.returncode:
        return {"work": name, "failed": f"exit {made.returncode}: see above"}
    paths = json.loads((work / "run" / "run.json").read_text(encoding="utf-8"))["paths"]
    fast = paths["attention"] == "Triton" and paths["lora"] == "fused" and (checkpointing == "true" or paths["step"] == "in CUDA graphs")
    if name in OVERRIDES and "once" not in paths["rows"]:
        return {"work": name, "failed": f"no figure: the prompt is not shared: {paths}"}
    if torch.cuda.is_available() and not fast:
        return {"work": name, "failed": f"no figure: a part fell back: {paths}"}
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps_ = [line for line in lines if "loss" in line]
    if not steps_[-1]["loss"] < steps_[0]["loss"] + 0.05 or not all(0 < line["grad_norm"] < 1e6 for line in steps_):
        return {"work": name, "failed": f"no figure: losses {[line['loss'] for line in steps_]}"}
    return {
        "work": name,
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in steps_[WARM:])),
        "peak_gib": round(max(line["peak_memory_reserved"] for line in steps_) / 2**30, 1),
        "loss": [steps_[0]["loss"], steps_[-1]["loss"]],
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1b"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and runs")
    parser.add_argument("--data", type=Path, default=ROOT / "tnl" / "demo" / "persona.json", help="instruction records")
    parser.add_argument("--only", nargs="+", default=list(WORK), choices=WORK, metavar="WORK", help=f"one or more of {', '.join(WORK)}")
    parser.add_argument("--seconds", type=float, default=3600, help="when to stop, whatever is left")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    end = time.monotonic() + arguments.seconds
    print("golden values")
    parity()
    rows = []
    for size in arguments.models:
        print(f"random weights of the {size} in {arguments.work / size}")
        model = write(size, arguments.work / size)
        for name in arguments.only:
            print(f"== {size}, {name}")
            folder = arguments.work / f"{size}-{list(WORK).index(name)}"
            shutil.rmtree(folder, ignore_errors=True)  # a finished run would be left as it is
            row = {"model": size} | measure(name, model, arguments.data.resolve(), folder, max(end - time.monotonic(), 0.1))
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False))
            if arguments.out:
                arguments.out.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{card}, torch {torch.__version__}, commit {commit or 'unknown'}\n")
    print("| model | work | tokens/s | peak GiB | seconds in all |\n|---|---|---|---|---|")
    for row in rows:
        speed = row.get("tokens_per_second", row.get("failed"))
        print(f"| {row['model']} | {row['work']} | {speed} | {row.get('peak_gib', '')} | {row.get('seconds', '')} |")


if __name__ == "__main__":
    main()
