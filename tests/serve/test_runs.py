import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tnl.serve.run import Serving


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "output"
    for name, status in (("huanhuan", "finished"), ("甄嬛-2", "interrupted"), ("damaged", "unfinished")):
        (root / name).mkdir(parents=True)
        (root / name / "run.json").write_text(json.dumps({"status": status, "secret": "path"}), encoding="utf-8")
    metrics = [{"step": step, "loss": 3 - step / 10, "tokens_per_second": 10.0} for step in range(1, 21)]
    lines = [json.dumps(line) for line in metrics]
    (root / "huanhuan" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 21, "loss": NaN}', '{"step": 22, "lo']), encoding="utf-8")
    (root / "huanhuan" / "samples.jsonl").write_text(
        '{"question": "你是谁？", "before": "", "after": "我是甄嬛。"}\n[1]\n', encoding="utf-8"
    )
    (root / "damaged" / "run.json").write_text("{", encoding="utf-8")
    (root / "no run").mkdir()
    outside = root.parent / "output_evil"
    outside.mkdir()
    (outside / "run.json").write_text("{}", encoding="utf-8")
    (root / "link").symlink_to(outside)
    return root


@pytest.fixture(scope="module")
def watched(start: Callable[..., Any], base: Path, root: Path) -> Any:
    return start(base, Serving(runs=root))


def test_all_runs(watched: Any) -> None:
    with watched.client() as client:
        found = client.get("/v1/runs").json()
    assert found["object"] == "list"
    assert {run["id"]: run["status"] for run in found["data"]} == {"huanhuan": "finished", "甄嬛-2": "interrupted", "damaged": "new"}
    first = next(run for run in found["data"] if run["id"] == "huanhuan")
    assert first["last"] == {"step": 21, "loss": None} and "metrics" not in first and "path" not in json.dumps(found)


def test_one_run_from_a_step_on(watched: Any) -> None:
    with watched.client() as client:
        whole = client.get("/v1/runs/huanhuan").json()
        later = client.get("/v1/runs/huanhuan", params={"after": 17}).json()
        few = client.get("/v1/runs/huanhuan", params={"limit": 2}).json()
        empty = client.get("/v1/runs/甄嬛-2").json()
    assert [line["step"] for line in whole["metrics"]] == list(range(1, 22)) and whole["metrics"][-1]["loss"] is None
    assert whole["samples"] == [{"question": "你是谁？", "before": "", "after": "我是甄嬛。"}]
    assert [line["step"] for line in later["metrics"]] == [18, 19, 20, 21]
    assert [line["step"] for line in few["metrics"]] == [20, 21]
    assert empty["metrics"] == [] and empty["samples"] == [] and empty["last"] == {}


@pytest.mark.parametrize("name", ["link", "nobody", "no run", "..", "%2e%2e%2foutput_evil", "huanhuan%00", "x" * 150])
def test_other_names_are_404(watched: Any, name: str) -> None:
    with watched.client() as client:
        assert client.get(f"/v1/runs/{name}").status_code == 404


WRONG = [("after", "x"), ("after", "-2"), ("limit", "0"), ("limit", "99999"), ("limit", "1.5"), ("after", "NaN")]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_parameters(watched: Any, name: str, value: str) -> None:
    with watched.client() as client:
        reply = client.get("/v1/runs/huanhuan", params={name: value})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == name


def test_it_only_reads(watched: Any, root: Path) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))
    with watched.client() as client:
        client.get("/v1/runs/huanhuan")
        assert client.delete("/v1/runs/huanhuan").status_code == 405
    assert sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*")) == before
