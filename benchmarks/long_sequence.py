"""Long rows through `tnl train`'s own pipeline, and reading forward: tokens a second, peak memory, and that neither grows with the length.

    python benchmarks/long_sequence.py --seconds 540                                     # 32k, 128k and 1M: fast, lean and forward only
    python benchmarks/long_sequence.py --only fast-32768 forward-32768                   # two rows
    python benchmarks/long_sequence.py --lengths 4194304 --modes lean --memory 24
    python benchmarks/long_sequence.py --only agreement

Random weights of the real shapes, LoRA r=8 on all linear layers, dropout 0.1, bfloat16, one document of random characters a step. The
rows run one after another in one process, which imports, compiles and warms up once: a row is one step of `tnl train`, the first of
its mode two, of which the first does not count. Weights are written to --work, by default the machine's memory where it has room.

No figure without: the golden values on this device, gradients of a streamed bfloat16 row that are as near the float32 ones of one
pass as one bfloat16 pass is (of six layers and 2,048 tokens before any row; `agreement`: of all layers, up to 16,384), gradient norms of
every step that are finite and not zero, and on a card the kernels of a card in every part.
"""

import argparse
import contextlib
import gc
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import parts
import torch
from random_model import SIZES, TOKENIZER, in_memory, write
from torch import Tensor, nn
from training import ROOT, parity

from tnl.data.collate import collate_rows
from tnl.data.pieces import blocks_of, encode_blocks
from tnl.model.load import load_model
from tnl.model.state import TransnormerCache
from tnl.model.stream import prefill, token_losses
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.recipe.sections import LoraSection
from tnl.train import lora, recomputation
from tnl.train.long_sequence import streamed_backward
from tnl.train.run import run
from tnl.train.step import Rows, forward_backward, head_loss

RECIPE = """
model: {{path: {model}, dtype: bfloat16}}
data: {{train: {train}, eval: 0, format: text, max_length: {length}}}
lora: {{r: 8, lora_alpha: 32, lora_dropout: 0.1}}
train: {{output_dir: {out}, per_device_train_batch_size: 1, gradient_accumulation_steps: 1, max_steps: {steps}, logging_steps: 1,
  save_strategy: "no", learning_rate: 1.0e-5, segment_length: {segment}, state_offload: {offload}, gradient_checkpointing: {lean}}}
generation: {{max_new_tokens: 2}}
"""
LENGTHS = [32768, 131072, 1048576]
MODES = ["fast", "lean", "forward"]
MARGIN = 1.15  # how much farther from float32 a streamed bfloat16 gradient may be than one pass in bfloat16
SHARED_MEMORY, ROOM = Path("/dev/shm"), 40 << 30
BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - BEGAN:4.0f} s] {line}", flush=True)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def agreement(size: str, lengths: list[int], segment: int, layers: int | None = None) -> list[dict[str, float]]:
    """Relative distance from the float32 gradients of one pass: of one bfloat16 pass, and of a streamed one. Raises where it is larger."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = in_memory(size, device, torch.bfloat16, layers=layers).state_dict()
    rows: list[dict[str, float]] = []
    for length in lengths:
        ids = torch.randint(3, 60000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        record = {"id": "r", "input_ids": ids, "labels": ids}
        found: dict[str, Tensor] = {}
        for name in ("exact", "one pass", "streamed"):
            # float32 through the definition: kernels for it alone would be compiled for nothing else
            dtype, backend = (torch.float32, "reference") if name == "exact" else (torch.bfloat16, "auto")
            base = in_memory(size, device, dtype, layers=layers, backend=backend)
            base.load_state_dict(weights)
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
        say(f"{length} tokens: gradients off float32 by {one:.2%} in one pass, {streamed:.2%} streamed (bfloat16)")
        if not streamed <= MARGIN * one:
            raise RuntimeError("streamed gradients are farther off than rounding explains")
        rows.append({"tokens": length, "one_pass": one, "streamed": streamed})
    return rows


def document(path: Path, tokens: int) -> Path:
    """A text of exactly so many tokens, the end token among them: what is left over would be a row of its own."""
    sp, draw = BaiChuanTokenizer.from_pretrained(TOKENIZER).sp_model, random.Random(0)
    letters = [piece for piece in map(sp.id_to_piece, range(sp.get_piece_size())) if len(piece) == 1 and piece.isalpha()]
    text, missing = "", tokens - 1
    while missing:
        # neighbours may be joined to one token, so that some are still missing
        text = text + "".join(draw.choices(letters, k=missing)) if missing > 0 else text[:missing]
        missing = tokens - 1 - sum(map(len, encode_blocks(sp, blocks_of(text))))
    path.write_text(text, encoding="utf-8")
    return path


class Tee(io.TextIOBase):
    """Standard output that is kept, too."""

    def __init__(self) -> None:
        self.out, self.kept = sys.stdout, io.StringIO()

    def write(self, text: str) -> int:
        self.kept.write(text)
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()


class Bench:
    """The rows of the table, in one process."""

    def __init__(self, options: argparse.Namespace, log: parts.Log) -> None:
        self.options, self.log, self.warm = options, log, set[str]()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.card = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"

    def hold(self) -> None:
        """Stop unless this device computes what it should."""
        say(f"{self.card}, torch {torch.__version__}: golden values, then a short row's gradients")
        parity()
        agreement(self.options.agree, [2048 if self.device == "cuda" else 256], 500 if self.device == "cuda" else 60, layers=6)

    def agreement(self) -> None:
        self.log["agreement"] = agreement(self.options.agree, self.options.agree_lengths, 1000)

    def model(self) -> Path:
        folder: Path = self.options.work / self.options.model
        if not (folder / "config.json").is_file():
            say(f"writing random weights of the {self.options.model} to {folder}")
        return write(self.options.model, folder)

    def row(self, mode: str, length: int) -> None:
        """Measure one row and print it."""
        model = self.model()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        say(f"{mode}, {length:,} tokens: begins")
        made = self.forward(model, length) if mode == "forward" else self.train(model, mode, length)
        self.warm.add(mode)
        say(json.dumps({"mode": mode, "tokens": length} | made, ensure_ascii=False))
        self.log.setdefault("rows", []).append({"mode": mode, "tokens": length} | made)
        self.log["figures"] |= {f"{mode} {length}, {name}": value for name, value in made.items() if name in UNITS}

    def train(self, model: Path, mode: str, length: int) -> dict[str, Any]:
        """A step of `tnl train` on a document of `length` tokens; two where the mode has not run here yet."""
        options, work = self.options, self.options.work / f"{self.options.model}-{mode}-{length}"
        shutil.rmtree(work, ignore_errors=True)  # a finished run would be left as it is
        work.mkdir(parents=True)
        steps = options.steps or (1 if mode in self.warm else 2)
        values = {"model": model, "train": document(work / "text.txt", length * steps), "length": length, "out": work / "run"}
        values |= {"steps": steps, "segment": options.segment, "offload": options.offload, "lean": str(mode == "lean").lower()}
        (work / "recipe.yaml").write_text(RECIPE.format(**values), encoding="utf-8")
        tee = Tee()
        with contextlib.redirect_stdout(tee):  # type: ignore[type-var]
            run(work / "recipe.yaml", memory=options.memory)
        lines = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if "loss" in line]
        if len(found) != steps or not all(0 < line["grad_norm"] < 1e6 for line in found):
            raise RuntimeError(f"no figure: gradient norms {[line['grad_norm'] for line in found]} in {steps} steps")
        paths = json.loads((work / "run/run.json").read_text(encoding="utf-8"))["paths"]
        if self.device == "cuda" and not (paths["attention"] == "Triton" and paths["lora"] == "fused"):
            raise RuntimeError(f"no figure: a part fell back: {paths}")
        said = [line for line in tee.kept.getvalue().splitlines() if "states between them" in line]
        speed = found[-1]["tokens_per_second"]
        return {
            "tokens_per_second": round(speed, 1),
            "seconds_a_step": round(length / speed, 1),
            "peak_gib": round(found[-1]["peak_memory_reserved"] / 2**30, 2),
            "recomputed": paths["recomputed"],
            "states": said[0].rpartition(": ")[2] if said else "none",
            "warm": steps > 1 or mode in self.warm,
        }

    def forward(self, model: Path, length: int) -> dict[str, Any]:
        """Reading a document forward: its loss, and as a prompt."""
        net, segment = load_model(model, dtype="bfloat16", device=self.device).eval(), self.options.segment
        ids = torch.randint(3, 60000, (length,), generator=torch.Generator().manual_seed(1))

        def loss(part: Tensor) -> None:
            float(sum(losses.sum() for _, losses in token_losses(net, part, segment_length=segment)))

        def prompt() -> None:
            prefill(net, ids, TransnormerCache(len(net.model.layers)), segment_length=segment).sum().item()

        loss(ids[: 2 * segment])
        seconds = timed(lambda: loss(ids))
        peak = torch.cuda.max_memory_reserved() / 2**30 if self.device == "cuda" else 0.0
        say(f"perplexity: {length / seconds:,.0f} tokens/s; now as a prompt")
        speeds = {"tokens_per_second": round(length / seconds, 1), "prefill_tokens_per_second": round(length / timed(prompt), 1)}
        return speeds | {"peak_gib": round(peak, 2)}


UNITS = ("tokens_per_second", "seconds_a_step", "peak_gib", "prefill_tokens_per_second")
GOALS = {
    **{f"fast {length}, tokens_per_second": (12300.0, False) for length in LENGTHS},
    **{f"fast {length}, peak_gib": (26.0, True) for length in LENGTHS},
    **{f"lean {length}, tokens_per_second": (10000.0, False) for length in LENGTHS},
    **{f"lean {length}, peak_gib": (16.5, True) for length in LENGTHS},
    "fast 1048576, seconds_a_step": (88.0, True),
    "lean 1048576, seconds_a_step": (108.0, True),
    "lean 4194304, seconds_a_step": (480.0, True),
    **{f"forward {length}, tokens_per_second": (38000.0, False) for length in LENGTHS},
    **{f"forward {length}, prefill_tokens_per_second": (38000.0, False) for length in LENGTHS},
}
"""Issue 7's, for one H100 and the 7B."""


def timed(work: Callable[[], None]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def child(options: argparse.Namespace) -> int:
    """Run rows in this process; 3 where the card is in error."""
    log = parts.read(options.out)
    bench = Bench(options, log)
    log["machine"] = f"{bench.card}, torch {torch.__version__}"
    bench.hold()
    work: dict[str, Callable[[], None]] = {}
    for name in options.only:
        mode, _, length = name.partition("-")
        work[name] = bench.agreement if name == "agreement" else partial(bench.row, mode, int(length))
    return 0 if parts.run(work, log, options.out) else 3


def report(log: parts.Log, model: str) -> None:
    """The tables."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    print(f"\n{log.get('machine', '')}, commit {commit or 'unknown'}, {time.monotonic() - BEGAN:.0f} s in all\n")
    print("| model | mode | tokens | tokens/s | as a prompt | s a step | peak GiB | recomputed | states | warm |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in log.get("rows", []):
        cells = [row.get(key, "") for key in ("prefill_tokens_per_second", "seconds_a_step", "peak_gib", "recomputed", "states", "warm")]
        print(f"| {model} | {row['mode']} | {row['tokens']:,} | {row['tokens_per_second']:,} | {' | '.join(map(str, cells))} |")
    if model == "7b":
        measured = {name: goal for name, goal in GOALS.items() if name in log["figures"]}
        print(f"\n{parts.table(log['figures'], measured)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--only", nargs="+", help="rows by name, MODE-LENGTH, or agreement; default: every mode of every length")
    parser.add_argument("--seconds", type=float, default=540, help="when to stop, whatever is left")
    parser.add_argument("--work", type=Path, help="a folder for weights and runs, kept; default: one of its own, in memory where it fits")
    parser.add_argument("--segment", type=int, default=4096)
    parser.add_argument("--offload", choices=["auto", "gpu", "host"], default="auto")
    parser.add_argument("--steps", type=int, help="steps a row; default: one, and two for the first row of a mode")
    parser.add_argument("--memory", type=float, help="GiB of the card that training may use")
    parser.add_argument("--agree", default="385m", choices=SIZES, help="the model whose gradients are compared")
    parser.add_argument("--agree-lengths", nargs="*", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--out", type=Path, help="a JSON file for the rows, written as they come; it is made anew")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only or [f"{mode}-{length}" for length in sorted(options.lengths) for mode in options.modes]
    for name in options.only:
        mode, _, length = name.partition("-")
        if name != "agreement" and not (mode in MODES and length.isdigit() and int(length) > 0):
            parser.error(f"--only: {name!r} (needed: agreement, or MODE-LENGTH such as fast-32768)")
    return options


def main() -> int:
    options = arguments()
    if options.child:
        return child(options)
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(prefix="long-", dir=SHARED_MEMORY if roomy else None) as folder:
        work = options.work or Path(folder)
        out = (options.out or Path(folder) / "rows.json").absolute()
        out.unlink(missing_ok=True)
        given = [word for name in FORWARDED if (value := getattr(options, name)) is not None for word in words(name, value)]
        command = [sys.executable, "-u", str(Path(__file__).resolve()), *given, "--work", str(work)]
        log = parts.supervise(command, options.only, out, options.seconds - (time.monotonic() - BEGAN))
    report(log, options.model)
    return 0 if all(state == "done" for state in log["parts"].values()) else 1


FORWARDED = ("model", "segment", "offload", "steps", "memory", "agree", "agree_lengths")


def words(name: str, value: Any) -> list[str]:
    """An option as a command line says it."""
    values = value if isinstance(value, list) else [value]
    return [f"--{name.replace('_', '-')}", *map(str, values)]


if __name__ == "__main__":
    sys.exit(main())
