import json
import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from tnl.errors import ModelError
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizer"


def cases() -> list[dict]:
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["encode"]


@pytest.fixture(scope="module")
def tokenizer() -> BaiChuanTokenizer:
    return BaiChuanTokenizer.from_pretrained(GOLDEN)


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tokenizer.model").read_bytes())
    return tmp_path


@pytest.mark.parametrize("case", cases(), ids=lambda case: repr(case["text"][:20]))
def test_ids_and_text_are_the_published_ones(tokenizer: BaiChuanTokenizer, case: dict) -> None:
    assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]
    assert tokenizer(case["text"])["input_ids"] == case["ids_special"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip"]


def test_the_model_file_alone_gives_the_same_tokenizer(alone: Path) -> None:
    tokenizer = BaiChuanTokenizer.from_pretrained(alone)
    for case in cases():
        assert tokenizer(case["text"])["input_ids"] == case["ids_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_pad_is_unk_and_never_the_end_token(tokenizer: BaiChuanTokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0, 1, 2)
    assert BaiChuanTokenizer.from_pretrained(GOLDEN, pad_token="</s>").pad_token_id == 0
    assert len(tokenizer) == tokenizer.vocab_size == 6000


def test_padding_masks_by_length(tokenizer: BaiChuanTokenizer) -> None:
    batch = tokenizer(["<unk>a", "a long one"], padding=True, add_special_tokens=False)
    assert batch["input_ids"][0][0] == 0 and batch["attention_mask"][0][0] == 1
    assert batch["attention_mask"][0][-1] == 0


@pytest.mark.parametrize("bos", [True, False])
def test_saving_and_loading_keeps_everything(tmp_path: Path, bos: bool) -> None:
    first = BaiChuanTokenizer.from_pretrained(GOLDEN, add_bos_token=bos)
    first.save_pretrained(tmp_path)
    second = pickle.loads(pickle.dumps(BaiChuanTokenizer.from_pretrained(tmp_path)))
    for case in cases():
        assert second(case["text"])["input_ids"] == first(case["text"])["input_ids"] == (case["ids_special"] if bos else case["ids"])
    assert (second.pad_token_id, second.chat_template, len(second)) == (0, first.chat_template, len(first))


def test_special_tokens_mask_and_both_edges() -> None:
    tokenizer = BaiChuanTokenizer.from_pretrained(GOLDEN, add_eos_token=True)
    batch = tokenizer("a", return_special_tokens_mask=True)
    assert batch["input_ids"][0] == 1 and batch["input_ids"][-1] == 2
    assert batch["special_tokens_mask"] == [1] + [0] * (len(batch["input_ids"]) - 2) + [1]


def test_the_chat_template_is_chatml_where_the_folder_has_none(tokenizer: BaiChuanTokenizer, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "你是谁？"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你是谁？<|im_end|>\n<|im_start|>assistant\n"
    own = BaiChuanTokenizer.from_pretrained(GOLDEN, chat_template="{{ messages[0]['content'] }}")
    own.save_pretrained(tmp_path)
    assert BaiChuanTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == "S"


def test_an_unknown_role_is_refused(tokenizer: BaiChuanTokenizer) -> None:
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "user\n<|im_end|>", "content": "x"}], tokenize=False)


def test_a_folder_without_the_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.model is missing"):
        BaiChuanTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError):
        BaiChuanTokenizer()


def piece_boundary(data: bytes, near: int) -> int:
    from tnl.data.pieces import varint

    at = 0
    while at < near:
        _, at = varint(data, at)
        size, at = varint(data, at)
        at += size
    return at


def test_a_truncated_model_file_is_refused(alone: Path) -> None:
    data = (alone / "tokenizer.model").read_bytes()
    for cut in (0, 1, len(data) // 2, piece_boundary(data, len(data) // 2), len(data) - 1):
        (alone / "tokenizer.model").write_bytes(data[:cut])
        with pytest.raises(ModelError, match="is not a whole SentencePiece model"):
            BaiChuanTokenizer.from_pretrained(alone)
    (alone / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="is not a whole"):
        BaiChuanTokenizer.from_pretrained(alone)


def test_the_auto_classes_find_it_without_remote_code(alone: Path) -> None:
    (alone / "config.json").write_bytes((GOLDEN.parent / "base" / "config.json").read_bytes())
    assert type(AutoTokenizer.from_pretrained(alone)) is BaiChuanTokenizer
    # the published tokenizer_config.json names a file of code; it is not there and is not asked for
    (alone / "tokenizer_config.json").write_bytes((GOLDEN / "tokenizer_config.json").read_bytes())
    assert type(AutoTokenizer.from_pretrained(alone, use_fast=False)) is BaiChuanTokenizer


def test_the_tutorials_collator_pads_with_it(tokenizer: BaiChuanTokenizer) -> None:
    rows = [
        {"input_ids": [5, 2], "attention_mask": [1, 1], "labels": [-100, 2]},
        {"input_ids": [5], "attention_mask": [1], "labels": [-100]},
    ]
    batch = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 2], [5, 0]]
    assert (batch["attention_mask"].tolist(), batch["labels"].tolist()) == ([[1, 1], [1, 0]], [[-100, 2], [-100, -100]])
    assert tokenizer.batch_decode([[2015, 2909, 2]], skip_special_tokens=True) == ["你是谁？"]
