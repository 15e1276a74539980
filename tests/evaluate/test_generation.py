"""Sample answers: which questions, and that they disturb nothing."""

from pathlib import Path

import pytest
import torch

from tnl.data.template import TEMPLATES
from tnl.errors import DataError
from tnl.evaluate import generation
from tnl.generate.sampling import Settings
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

torch.set_num_threads(1)
TOKENIZER = Path(__file__).resolve().parents[1] / "golden" / "tokenizer"

CHATML = TEMPLATES["chatml"]


@pytest.fixture(scope="module")
def tokenizer() -> BaiChuanTokenizer:
    return BaiChuanTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}
    return TransnormerForCausalLM(TransnormerConfig(vocab_size=6100, init_std=0.5, **sizes)).eval()


def record(name: str, question: list[int], *answers: list[int]) -> dict[str, object]:
    ids, labels = list(question), [-100] * len(question)
    for answer in answers:
        ids += [*answer, 2, 77]
        labels += [*answer, 2, -100]
    return {"id": name, "input_ids": ids, "labels": labels}


def test_questions_are_asked_once_and_expect_the_first_answer(tokenizer: BaiChuanTokenizer) -> None:
    records = [record("a", [300, 301], [400, 401], [402]), record("b", [300, 301], [500]), record("c", [302, 303], [600])]
    samples, prompts = generation.choose(records, tokenizer, CHATML)
    assert [sample.id for sample in samples] == ["a", "c"] and prompts == [[300, 301], [302, 303]]
    assert samples[0].expected == generation.decode(tokenizer, [400, 401])
    assert len(generation.choose([record(str(i), [300 + i, 5], [9]) for i in range(9)], tokenizer, CHATML)[0]) == generation.COUNT


def test_a_plain_text_asks_for_its_second_half(tokenizer: BaiChuanTokenizer) -> None:
    text = {"id": "t", "input_ids": [300, 301, 302, 303], "labels": [-100, 301, 302, 303]}
    samples, prompts = generation.choose([text], tokenizer, CHATML)
    assert prompts == [[300, 301]] and samples[0].expected == generation.decode(tokenizer, [302, 303])


def test_answers_repeat_and_leave_the_generators_alone(model: TransnormerForCausalLM, tokenizer: BaiChuanTokenizer) -> None:
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    settings = Settings(max_new_tokens=500, do_sample=True, temperature=2.0)
    first = generation.answer(model, tokenizer, [[300, 301], [302]], settings, seed=1)
    assert torch.equal(torch.rand(1), expected) and model.training
    assert first == generation.answer(model, tokenizer, [[300, 301], [302]], settings, seed=1)
    assert first != generation.answer(model, tokenizer, [[300, 301], [302]], settings, seed=2)


def test_a_vocabulary_larger_than_the_tokenizer_has_no_text(tokenizer: BaiChuanTokenizer) -> None:
    assert len(tokenizer) <= 6000
    generation.decode(tokenizer, [300, 6050])


def test_samples_come_back_from_their_file(tmp_path: Path) -> None:
    samples = [generation.Sample("a", "问\n题", "答", before="前", after=None)]
    generation.write(samples, tmp_path / "samples.jsonl")
    assert generation.read(tmp_path / "samples.jsonl") == samples and generation.read(tmp_path / "none") == []
    (tmp_path / "samples.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"samples\.jsonl"):
        generation.read(tmp_path / "samples.jsonl")


def test_short_keeps_the_end() -> None:
    assert generation.short(None) == "" and generation.short("a" * 5, 10) == "aaaaa" and generation.short("x" * 20 + "end", 3) == "...end"
