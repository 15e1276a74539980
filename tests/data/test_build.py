import json
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from tnl.data.build import Dataset, build
from tnl.data.formats import read_records
from tnl.data.template import IGNORED, TEMPLATES, encode_conversation
from tnl.errors import DataError
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

TOKENIZER = BaiChuanTokenizer.from_pretrained(Path(__file__).resolve().parents[1] / "golden" / "tokenizer")


@dataclass(frozen=True)
class Section:
    train: Any
    eval: Any = 0.05
    format: str = "auto"
    columns: dict[str, str] | None = None
    encoding: str | None = None
    template: str = "chatml"
    system: str | None = None
    persona: str | None = None
    max_length: int | None = 384
    overlong: str = "truncate"
    packing: str = "batch"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def persona(count: int) -> list[dict]:
    return [{"instruction": f"第{i}问", "input": "", "output": f"第{i}答"} for i in range(count)]


def ids(records: list[dict]) -> list[str]:
    return [record["id"].rsplit(":", 1)[1] for record in records]


def text_of(record: dict) -> str:
    return TOKENIZER.decode([label for label in record["labels"].tolist() if label not in (IGNORED, 2)])


def test_records_are_what_the_template_encodes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", persona(3))
    dataset = build(Section(path, eval=0, system="S"), TOKENIZER, seed=1)
    for record, read in zip(dataset.train, read_records(path), strict=True):
        encoded = encode_conversation(read.messages, TOKENIZER, TEMPLATES["chatml"], system="S")
        expected = {"id": read.id, "input_ids": encoded.input_ids.tolist(), "labels": encoded.labels.tolist()}
        assert {**record, **{name: record[name].tolist() for name in ("input_ids", "labels")}} == expected
    assert dataset.eval == []


def test_the_report_accounts_for_every_row_and_token(tmp_path: Path) -> None:
    dataset = build(Section(write(tmp_path / "a.json", persona(40))), TOKENIZER)
    report = dataset.report
    assert (report.rows, report.records, report.train_records, report.eval_records) == (40, 40, 38, 2)
    assert report.tokens == sum(len(record["input_ids"]) for record in dataset.train)
    assert report.supervised == sum(label != IGNORED for record in dataset.train for label in record["labels"])
    assert report.longest == max(len(record["input_ids"]) for record in dataset.train + dataset.eval)
    assert report.percentiles[50] <= report.percentiles[99] <= report.longest
    assert report.template_hash == TEMPLATES["chatml"].hash and len(report.sources[0].sha256) == 64


def test_the_split_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = persona(200)
    first = build(Section(write(tmp_path / "a.json", rows)), TOKENIZER, seed=3)
    second = build(Section(write(tmp_path / "b.json", rows[::-1])), TOKENIZER, seed=3)
    other = build(Section(tmp_path / "a.json"), TOKENIZER, seed=4)
    held = [sorted(text_of(record) for record in dataset.eval) for dataset in (first, second, other)]
    assert held[0] == held[1] != held[2] and len(held[0]) == 10


def test_no_near_duplicate_is_held_out(tmp_path: Path) -> None:
    rows = [{"instruction": "你是谁？", "output": f"答{i}"} for i in range(30)]
    rows += [{"instruction": f"问{i}", "output": "我是 甄嬛。" if i % 2 else "我是甄嬛"} for i in range(30)]
    rows += [{"instruction": "ＷＨＯ are you", "output": "a1"}, {"instruction": "who are you?!", "output": "a2"}]
    dataset = build(Section(write(tmp_path / "a.json", rows + persona(4)), eval=0.5), TOKENIZER)
    assert sorted(text_of(record) for record in dataset.eval) == [f"第{i}答" for i in range(4)]
    assert "4 records are held out instead of 50%: 4 records are without a near-duplicate among the others" in dataset.report.notices[-1]


def test_too_few_records_hold_out_none_and_say_so(tmp_path: Path) -> None:
    dataset = build(Section(write(tmp_path / "a.json", persona(5))), TOKENIZER)
    assert (len(dataset.train), len(dataset.eval)) == (5, 0)
    assert dataset.report.notices == ["no record is held out instead of 5%: 5 records are too few"]
    assert len(build(Section(tmp_path / "a.json", eval=0.99), TOKENIZER).train) == 1


def test_files_of_its_own_for_evaluation_and_their_overlap(tmp_path: Path) -> None:
    train, held = write(tmp_path / "a.json", persona(10)), write(tmp_path / "b.json", persona(12)[9:])
    dataset = build(Section(train, eval=str(held)), TOKENIZER)
    assert (len(dataset.train), len(dataset.eval), dataset.report.overlap) == (10, 3, 1)
    assert "1 of 3 held-out records are trained on too" in dataset.report.notices[-1]
    report = build(Section(train, eval=[held]), TOKENIZER).report
    assert report.rows == 10 and [source.path for source in report.sources] == [train, held]


def test_many_duplicates_are_a_warning(tmp_path: Path) -> None:
    dataset = build(Section(write(tmp_path / "a.json", persona(1) * 9 + persona(2)[1:]), eval=0), TOKENIZER)
    assert dataset.report.duplicates == 8 and "8 of 10 records are duplicates" in dataset.report.notices[-1]


LONG = [{"instruction": "a", "output": "b " * 400}, {"instruction": "c", "output": "d"}]


def test_overlong_records_are_cut_dropped_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", LONG)
    section = Section(path, eval=0, max_length=64)
    cut = build(section, TOKENIZER)
    assert len(cut.train[0]["input_ids"]) == 64 and cut.train[0]["labels"][-1] == 2
    assert (cut.report.truncated, cut.report.dropped) == (1, 0) and "cut, the end token kept" in cut.report.notices[0]
    dropped = build(replace(section, overlong="drop"), TOKENIZER)
    assert (ids(dropped.train), dropped.report.truncated, dropped.report.dropped) == (["record 2"], 0, 1)
    with pytest.raises(DataError, match=r"record 1: 1 record exceeds max_length 64 .*longest 4\d\d.*Set data.max_length: 4"):
        build(replace(section, overlong="error"), TOKENIZER)
    whole = build(replace(section, max_length=None), TOKENIZER)
    assert len(whole.train[0]["input_ids"]) > 400 and whole.report.truncated == 0


def test_a_record_with_nothing_left_to_learn_is_an_error_unless_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [*persona(1), {"instruction": "x " * 400, "output": "y"}])
    section = Section(path, eval=0, max_length=64)
    with pytest.raises(DataError, match=r"record 2: .*in 1 of them no answer would be left"):
        build(section, TOKENIZER)
    assert build(replace(section, overlong="drop"), TOKENIZER).report.dropped == 1
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    masked = write(tmp_path / "b.json", [{"messages": turns}])
    with pytest.raises(DataError, match="nothing is left to learn"):
        build(Section(masked, eval=0), TOKENIZER)
    with pytest.raises(DataError, match="0 trained tokens: all 1 records are dropped") as caught:
        build(Section(masked, eval=0, overlong="drop"), TOKENIZER)
    assert caught.value.exit_code == 3


def test_the_tutorials_template_cuts_the_end_token(tmp_path: Path) -> None:
    section = Section(write(tmp_path / "a.json", LONG), eval=0, max_length=64, template="chatml-tutorial")
    assert build(section, TOKENIZER).train[0]["labels"][-1] != 2


def test_documents_are_learned_whole_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("却说曹操自迎天子。" * 300, encoding="utf-8")
    dataset = build(Section(tmp_path / "a.txt", eval=0, max_length=100), TOKENIZER)
    joined = [i for record in dataset.train for i in record["input_ids"]]
    assert joined == [*TOKENIZER.sp_model.encode("却说曹操自迎天子。" * 300), 2]
    assert len({record["id"] for record in dataset.train}) == len(dataset.train) > 5


def transcript(scenes: int, lines: int = 2) -> str:
    return "\n\n".join("\n".join(f"{'AB'[j % 2]}: {i} {j} x{i * 31 + j}" for j in range(lines)) for i in range(scenes))


def test_a_transcript_teaches_the_persona_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(transcript(40), encoding="utf-8")
    dataset = build(Section(tmp_path / "a.txt", persona="B"), TOKENIZER)
    assert (len(dataset.train), len(dataset.eval)) == (38, 2)
    assert all("1 x" in text_of(record) for record in dataset.train)
    assert dataset.report.speakers == {"A": 40, "B": 40}


def test_one_long_scene_is_held_out_by_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(transcript(1, 400), encoding="utf-8")
    dataset = build(Section(tmp_path / "a.txt", persona="B", eval=0.2, max_length=120), TOKENIZER)
    assert len(dataset.eval) > 1 and max(len(r["input_ids"]) for r in dataset.train + dataset.eval) <= 120
    learned = [line for record in dataset.train + dataset.eval for line in text_of(record).split("0 ")[1:]]
    assert len(learned) == 200


def test_only_scenes_are_cut_in_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(transcript(1, 60), encoding="utf-8")
    turns = [{"role": role, "content": f"{role} {i} " * 8} for i in range(9) for role in ("user", "assistant")]
    write(tmp_path / "b.json", [{"messages": turns}])
    dataset = build(Section(tmp_path, persona="B", eval=0, max_length=200), TOKENIZER)
    assert ["window" in record["id"] for record in dataset.train].count(False) == 1
    assert dataset.report.truncated == 1


def test_an_unknown_template_or_share_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", persona(3))
    with pytest.raises(DataError, match="unknown template 'llama'"):
        build(Section(path, template="llama"), TOKENIZER)
    with pytest.raises(DataError, match=r"data\.eval: is no share"):
        build(Section(path, eval=1.5), TOKENIZER)


def test_a_persona_keeps_its_identity_in_training(tmp_path: Path) -> None:
    """As in Huanhuan's records: one question asked again and again, once answered otherwise, is no duplicate to be held out."""
    who = [{"instruction": "你是谁？", "input": "", "output": "我是甄嬛，家父是大理寺少卿甄远道。"}] * 50
    other = [{"instruction": "你是谁？", "input": "", "output": "臣妾甄嬛。"}]
    path = write(tmp_path / "a.json", [*persona(200), *who, *other, *persona(20)])
    dataset: Dataset = build(Section(path, system="现在你要扮演皇帝身边的女人--甄嬛"), TOKENIZER, seed=42)
    questions = {record.id: record.messages[0].content for record in read_records(path)}
    assert (len(dataset.train) + len(dataset.eval), dataset.report.duplicates) == (271, 69)
    assert len(dataset.eval) == 14
    assert sum(questions[record["id"]] == "你是谁？" for record in dataset.train) == 51
    assert not {questions[r["id"]] for r in dataset.train} & {questions[r["id"]] for r in dataset.eval}


@pytest.mark.parametrize("length", [100, None])
def test_a_document_in_its_file_gives_the_same_records(length: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "novel"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("".join(f"却说曹操{i}自迎天子{j}。\n" for j in range(200)), encoding="utf-8")
    section = Section(folder, eval=0.34 if length is None else 0, max_length=length, format="text")
    expected = build(section, TOKENIZER)
    monkeypatch.setattr("tnl.data.files.LONG", 100)
    monkeypatch.setattr("tnl.data.pieces.PIECE", 50)
    monkeypatch.setattr("tnl.data.files.PIECE", 30)
    monkeypatch.setattr("tnl.data.build.STRETCH", 1 << 16)
    found = build(section, TOKENIZER)
    assert found.report == expected.report
    for side in ("train", "eval"):
        for a, b in zip(getattr(found, side), getattr(expected, side), strict=True):
            assert a["id"] == b["id"] and all(numpy.array_equal(a[name], b[name]) for name in ("input_ids", "labels"))
    if length is None:
        assert (len(found.train), len(found.eval)) == (2, 1) and found.report.longest > 2000
    else:
        assert found.report.train_records > 50 and found.report.longest == 100


def test_ids_lie_in_mapped_files(tmp_path: Path) -> None:
    dataset = build(Section(write(tmp_path / "a.json", persona(3)), eval=0), TOKENIZER)
    base = dataset.train[0]["input_ids"]
    while isinstance(base.base, numpy.ndarray):
        base = base.base
    assert isinstance(base.base, mmap.mmap) and base.dtype == numpy.int32


def test_near_duplicates_are_found_however_long_a_document_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy with other punctuation must not be held out from itself."""
    texts = ["却说曹操自迎天子" * 40, "却说曹操，自迎天子。" * 40, "山水风云" * 60, "春夏秋冬" * 70]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    for stretch in (1 << 16, 16):
        monkeypatch.setattr("tnl.data.build.STRETCH", stretch)
        dataset = build(Section(tmp_path, eval=0.5, max_length=None, format="text"), TOKENIZER)
        assert {Path(record["id"]).name[0] for record in dataset.eval} == {"2", "3"}
