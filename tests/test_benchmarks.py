"""A benchmark that prints its rows as they come, on the smallest shapes: the others are run on a card alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_long_rows_are_measured_one_after_another(tmp_path: Path) -> None:
    rows = ["fast-256", "lean-256", "forward-256", "fast-96"]
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks/long_sequence.py"), "--model", "demo", "--agree", "demo", "--only", *rows]
    command += ["--segment", "64", "--seconds", "600", "--work", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    log = json.loads(out.read_text(encoding="utf-8"))
    assert log["parts"] == dict.fromkeys(rows, "done")
    assert [f"{row['mode']}-{row['tokens']}" for row in log["rows"]] == rows
    fast, lean, forward, short = log["rows"]
    assert fast["warm"] and lean["warm"] and short["warm"] and (fast["recomputed"], lean["recomputed"]) == ("nothing", "layers")
    assert all(row["tokens_per_second"] > 0 for row in log["rows"]) and forward["prefill_tokens_per_second"] > 0
    assert done.stdout.index('"mode": "fast"') < done.stdout.index("== lean-256"), "a row is printed when it is measured"


def test_a_row_that_there_is_not_is_said() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/long_sequence.py"), "--only", "fast"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 2 and "needed: agreement, or MODE-LENGTH such as fast-32768" in done.stderr
