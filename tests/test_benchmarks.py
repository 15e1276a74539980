"""Benchmarks that hold on a CPU too, on the smallest shapes: long rows printed as they come, recall; the others are run on a card alone."""

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


@pytest.mark.slow
def test_a_fact_from_segments_back_is_learned_with_streaming_and_not_with_truncation(tmp_path: Path) -> None:
    """No question shares a segment with its fact; guessing is 1.386. The curves at 50,000 tokens stand in docs/log.md."""
    out = tmp_path / "recall.json"
    command = [sys.executable, str(ROOT / "benchmarks/recall.py"), "--segment", "16", "--distance", "64", "--steps", "120"]
    command += ["--ways", "streamed", "truncated", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    streamed, truncated = json.loads(out.read_text(encoding="utf-8"))
    assert streamed["test"]["loss"] < 1.1 and streamed["test"]["right"] > 0.4
    assert truncated["test"]["loss"] > 1.35 and truncated["test"]["right"] < 0.35


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_streamed_gradients_are_as_near_float32_as_one_pass_in_bfloat16() -> None:
    """The 385M, 2,048, 8,192 and 16,384 tokens; shorter ones on a CPU above, before any row is measured."""
    command = [sys.executable, str(ROOT / "benchmarks/long_sequence.py"), "--only", "agreement", "--seconds", "800"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0 and "16384 tokens: gradients off float32" in done.stdout, done.stdout + done.stderr
