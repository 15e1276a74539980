"""Run the three journeys and keep what a person sees in docs/journeys/.

    python scripts/make_journeys.py                     # the tutorial's reader, the person with a chat log: any machine
    python scripts/make_journeys.py 24gb --out FOLDER   # the person with a 24 GB card: needs a GPU, and random weights of the 7B's shapes

Commands and output are real; only this machine's folders are shortened, and how long a line took is left as it was.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOURNEYS = ROOT / "docs" / "journeys"
RECORDS = 1000
TUTORIAL = """
import importlib.util, json
spec = importlib.util.spec_from_file_location("tutorial", "tests/journeys/tutorial.py")
tutorial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tutorial)
space = {}
def run(code):
    exec(code.replace(tutorial.MODEL_PATH, "tnl/demo/base").replace("./output", OUTPUT), space)
run(tutorial.BEFORE_THE_FIRST_CELL)
for cell in ("load", "prompt"):
    run(tutorial.edited(cell))
run(f"tokenized_id = [process_func(record) for record in json.load(open({DATA!r}, encoding='utf-8'))]")
for cell in ("lora", "arguments", "train", "chat"):
    run(tutorial.edited(cell))
"""


class Journey:
    """A Markdown page that grows by headings, words and commands with their output."""

    def __init__(self, name: str, title: str, out: Path, data: Path, model: Path | None = None) -> None:
        self.path, self.lines = out / f"{name}.md", [f"# {title}", "", f"Made by `python scripts/make_journeys.py {name}`.", ""]
        self.work = Path(tempfile.mkdtemp(prefix="journey-"))
        self.data, self.model = data, model or self.work / "7b"

    def say(self, words: str) -> None:
        self.lines += [words, ""]

    def run(self, command: str, *, shown: str | None = None, stdin: str | None = None, limit: float = 1800) -> str:
        """Run a shell command in the repository's root and keep what it printed. Raises SystemExit where it fails."""
        shown = shown or command
        print(f"$ {shown}", flush=True)
        env = {
            **os.environ,
            "WORK": str(self.work),
            "SEVEN": str(self.model),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "120",
        }
        made = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=env,
            input=None if stdin is None else stdin.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
        )
        text = self.clean(made.stdout.decode())  # not by text=True, which would make lines of a progress bar's states
        print(text, flush=True)
        self.lines += ["```console", f"$ {self.clean(shown)}", *text.rstrip().splitlines(), "```", ""]
        self.write()
        if made.returncode:
            raise SystemExit(f"{shown}: exit {made.returncode}")
        return text

    def clean(self, text: str) -> str:
        """This machine's folders shortened, a progress bar's last state kept, no colour."""
        text = (
            text.replace("$SEVEN", "7b")
            .replace(str(self.model), "7b")
            .replace(str(self.data), "dataset/huanhuan.json")
            .replace("$WORK/", "")
            .replace(f"{self.work}/", "")
            .replace(f"{ROOT}/", "")
        )
        ends = [(line, line.split("\r")[-1].rstrip()) for line in text.replace("\r\n", "\n").split("\n")]
        lines = [end for line, end in ends if end or "\r" not in line]
        noise = re.compile(r"\d+%\||\[WARNING\]|it/s\]|Warning: |warnings\.warn|super\(\).__init__\(loader\)|`torch_dtype` is deprecated")
        return "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines if not noise.search(line))

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines).rstrip() + "\n", encoding="utf-8")

    def close(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


def tutorial(out: Path, data: Path, model: Path | None) -> None:
    """The tutorial's cells with their edits, then the same by one command."""
    page = Journey("tutorial", "The tutorial's reader", out, data)
    page.say(
        "The tutorial's own cells, with the edits of the README: plain transformers and peft. The demo base stands in for the 7B: "
        "7.6 million parameters, so that any machine can follow, and answers of that size. Of dataset/huanhuan.json the first "
        f"{RECORDS:,} records are taken."
    )
    some = page.work / "huanhuan-1000.json"
    some.write_text(json.dumps(json.loads(data.read_text(encoding="utf-8"))[:RECORDS], ensure_ascii=False), encoding="utf-8")
    script = f"OUTPUT = {str(page.work / 'output')!r}\nDATA = {str(some)!r}\n{TUTORIAL}"
    (page.work / "cells.py").write_text(script, encoding="utf-8")
    page.run(f"{sys.executable} $WORK/cells.py", shown="python cells.py   # every cell of the tutorial, edited")
    page.say("The same by `tnl`. First what would happen:")
    words = "recipes/huanhuan-7b.yaml model.path=demo model.dtype=float32 data.train=$WORK/huanhuan-1000.json"
    page.run(f"tnl check {words}")
    page.say("The run. So small a base wants ten times the tutorial's learning rate ([log](../log.md)):")
    page.run(f"tnl train {words} train.output_dir=$WORK/run train.learning_rate=1e-3 train.logging_steps=50")
    page.say("A talk, always with the most probable word (`--temperature 0`): drawing by chance, as the recipe does, suits a larger model.")
    page.run("tnl chat $WORK/run --temperature 0", stdin="你是谁？\n你父亲是谁？\n皇上驾到！\n/quit\n")
    page.say("Base and adapter as one model, and one question to it:")
    page.run("tnl merge $WORK/run $WORK/merged")
    page.run("tnl generate $WORK/merged 你是谁？ --temperature 0")
    page.close()


def chat_log(out: Path, data: Path, model: Path | None) -> None:
    """A script of a teahouse becomes its owner."""
    page = Journey("chat-log", "A person with their own chat log", out, data)
    page.say("[teahouse.txt](teahouse.txt) is a chat log: `name: line`, a blank line between scenes. 老周 keeps the teahouse.")
    page.run("head -9 docs/journeys/teahouse.txt")
    words = "recipes/transcript.yaml model.path=demo data.train=docs/journeys/teahouse.txt data.persona=老周"
    page.say("Who speaks, and what is learned of it:")
    page.run(f"tnl check {words}")
    page.run(f"tnl train {words} train.output_dir=$WORK/run")
    page.say("A talk. The first two lines are of the log, the third is not, and 28 records on so small a base leave little for it:")
    page.run("tnl chat $WORK/run --temperature 0", stdin="老板，来一壶热茶。\n今天怎么没人？\n我的伞丢了。\n/quit\n")
    page.close()


def card_of_24_gb(out: Path, data: Path, model: Path | None) -> None:
    """The 7B within 22.5 GiB of a larger card."""
    page = Journey("24gb", "A person with a 24 GB card", out, data, model)
    page.say("Random weights of the 7B's shapes stand in for the published ones; the process may take 22.5 GiB, as on a card of 24 GB.")
    page.run(f"{sys.executable} benchmarks/random_model.py 7b $SEVEN > /dev/null", shown="python benchmarks/random_model.py 7b 7b")
    words = f"recipes/7b-24gb.yaml model.path=$SEVEN data.train={data}"
    page.run(f"tnl check {words} --memory 22.5")
    page.run("time -p tnl generate $SEVEN 你是谁？ --max-new-tokens 1")
    steps = "train.max_steps=20 train.eval_steps=10 train.save_steps=10 train.logging_steps=5 generation.max_new_tokens=24"
    page.run(f"tnl train {words} {steps} data.eval=0.01 train.output_dir=$WORK/run --memory 22.5")
    page.run("tail -1 $WORK/run/metrics.jsonl")
    page.run("tnl chat $WORK/run --max-new-tokens 24", stdin="你是谁？\n/quit\n")
    page.run("tnl merge $WORK/run $WORK/merged")
    page.close()


PAGES = {"tutorial": tutorial, "chat-log": chat_log, "24gb": card_of_24_gb}
ANYWHERE = ["tutorial", "chat-log"]
"""The pages that need no GPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # not by choices: argparse of Python 3.11 holds the default of nargs="*" against them as one value
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"any of {', '.join(PAGES)} (default: {' '.join(ANYWHERE)})")
    parser.add_argument("--out", type=Path, default=JOURNEYS)
    parser.add_argument("--data", type=Path, help="instruction records (default: dataset/huanhuan.json)")
    parser.add_argument("--model", type=Path, help="a folder of random weights of the 7B (24gb), made there if need be")
    arguments = parser.parse_args()
    pages = arguments.pages or ANYWHERE
    if unknown := [page for page in pages if page not in PAGES]:
        parser.error(f"no page is called {unknown[0]} (there are {', '.join(PAGES)})")
    data = (arguments.data or ROOT / "dataset" / "huanhuan.json").resolve()
    if not data.is_file():
        raise SystemExit(f"{data}: there is no such file. The README says where to get it, or give --data.")
    for page in pages:
        PAGES[page](arguments.out, data, arguments.model)


if __name__ == "__main__":
    main()
