"""How many steps there will be: epochs, what train.min_steps adds, and a word where they are few."""

import json
from pathlib import Path

import pytest

from tnl.data.build import build
from tnl.data.store import lengths_of
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_tokenizer
from tnl.recipe.sections import DataSection, TrainSection
from tnl.train import order
from tnl.train.step import ROUND, Rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("train", "records", "epochs", "steps"),
    [
        ({}, 100, 3, 75),
        ({"num_train_epochs": 2.5}, 100, 2.5, 63),
        ({"min_steps": 100}, 28, 15, 105),
        ({"min_steps": 100}, 4000, 3, 3000),
        ({"min_steps": 100, "max_steps": 9}, 28, 15, 9),
        ({"dataloader_drop_last": True}, 30, 3, 21),
        ({"min_steps": 10}, 1, 10, 10),
    ],
)
def test_epochs_and_steps(train: dict[str, float], records: int, epochs: float, steps: int) -> None:
    section = TrainSection(**train)  # type: ignore[arg-type]
    assert (order.epochs(section, records, 4), order.count_steps(section, records, 4)) == (epochs, steps)


def test_few_steps_are_advised_upon_unless_they_were_asked_for() -> None:
    assert "train.min_steps=100 adds epochs" in order.words(TrainSection(), 28, 16)
    assert "teach little" not in order.words(TrainSection(), 2800, 16) + order.words(TrainSection(max_steps=6), 28, 16)
    assert "15 epochs instead of 3, because train.min_steps is 100" in order.words(TrainSection(min_steps=100), 28, 4)


def test_filled_rows_hold_every_record_once_an_epoch() -> None:
    lengths = [5, 3, 9, 2, 7, 1, 30, 4]
    units = order.units_of(DataSection(train="x", packing="fill", row_tokens=10), lengths, 64)
    assert all(sum(lengths[i] for i in unit) <= 10 or len(unit) == 1 for unit in units) and len(units) == 5
    sampler = order.StepSampler(lengths, 2, seed=1, units=units)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 3
        assert sorted(i for step in epochs[-1] for i in step) == list(range(8))
    assert epochs[0] != epochs[1]


def test_what_batch_sizes_count() -> None:
    assert order.units_of(DataSection(train="x"), [3, 4], 64) == [[0], [1]]
    assert order.units_of(DataSection(train="x", packing="fill"), [3, 4], 64) == [[0, 1]]  # the budget stands for what is left open
    assert order.words(TrainSection(), 320, 16, order.UNITS["fill"]).startswith("60 optimizer steps of 16 rows (20 an epoch)")


SETS = {name: ROOT.parent / "shared" / "data" / f"{name}.json" for name in ("huanhuan", "alpaca_zh_demo")}
"""Where they lie beside the project."""


@pytest.mark.parametrize("packing", ["batch", "fill"])
@pytest.mark.parametrize("name", ["made up", *(name for name, path in SETS.items() if path.is_file())])
def test_of_the_tokens_that_are_computed_97_percent_are_real(name: str, packing: str, tmp_path: Path) -> None:
    """As on a GPU: an epoch's steps of 16 records, or of one filled row, whose rows are filled up to few lengths."""
    file = SETS.get(name, tmp_path / "records.json")
    if name == "made up":
        rows = [{"instruction": f"第{i}问", "input": "", "output": "春夏秋冬，山水风云。" * (i * i % 23 + 1)} for i in range(1000)]
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    section = DataSection(train=str(file), eval=0, max_length=1024, packing=packing, system="现在你要扮演皇帝身边的女人--甄嬛")  # type: ignore[arg-type]
    records = build(section, load_tokenizer(ROOT / "tests/golden/tokenizer", TransnormerConfig())).train
    lengths, real, computed = lengths_of(records), 0, 0
    rows = Rows(4096, multiple=ROUND)
    for step in order.StepSampler(lengths, {"batch": 16, "fill": 1}[packing], seed=1, units=order.units_of(section, lengths, rows.budget)):
        batches = rows.batches([records[i] for i in step])
        real += sum(lengths[i] for i in step)
        computed += sum(batch["input_ids"].numel() for batch in batches)
    assert real == sum(lengths) and real >= 0.97 * computed, f"{real / computed:.1%}"
