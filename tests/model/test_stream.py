"""Reading by segments says what reading at once says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.model import stream
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache
from tnl.model.stream import Bucket, hidden_states, loss_by_position, prefill, token_losses, total

torch.set_num_threads(1)
T = 300


@pytest.fixture(scope="module")
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 3, "decoder_attention_heads": 2, "glu_dim": 24}
    config = TransnormerConfig(**sizes, linear_use_lrpe_list=[1, 0, 0], init_std=0.2)
    return TransnormerForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 60, (T,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def losses(model: TransnormerForCausalLM, ids: Tensor) -> Tensor:
    """The loss of tokens 1 ... T - 1, in one pass."""
    with torch.no_grad():
        return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")


@pytest.mark.parametrize("length", [1, 7, 64, T - 1, T, T + 1])
def test_losses_are_those_of_one_pass(model: TransnormerForCausalLM, ids: Tensor, losses: Tensor, length: int) -> None:
    parts = list(token_losses(model, ids, segment_length=length, chunk=5))
    assert torch.cat([positions for positions, _ in parts]).tolist() == list(range(1, T))
    torch.testing.assert_close(torch.cat([part for _, part in parts]), losses, rtol=1e-10, atol=1e-10)


def test_only_supervised_tokens_count(model: TransnormerForCausalLM, ids: Tensor, losses: Tensor) -> None:
    labels = ids.clone()
    labels[torch.rand(T, generator=torch.Generator().manual_seed(2)) < 0.6] = -100
    labels[:80] = -100  # whole segments without one
    labels[80] = ids[80]  # predicted by the last token of the segment before
    parts = list(token_losses(model, ids, labels.tolist(), segment_length=20))
    positions = torch.cat([positions for positions, _ in parts])
    assert positions.tolist() == (labels != -100).nonzero()[:, 0].tolist() and positions[0] == 80
    torch.testing.assert_close(torch.cat([part for _, part in parts]), losses[positions - 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 33, T])
def test_prefill_goes_on_from_where_it_stood(model: TransnormerForCausalLM, ids: Tensor, length: int) -> None:
    expected = TransnormerCache(3)
    with torch.no_grad():
        logits = model(ids[None], past_key_values=expected, use_cache=True).logits[:, -1]
    cache = TransnormerCache(3)
    prefill(model, ids[:111], cache, segment_length=length)
    actual = prefill(model, ids[111:], cache, segment_length=length)
    torch.testing.assert_close(actual, logits, rtol=1e-10, atol=1e-10)
    for a, b in zip(cache.states, expected.states):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert cache.seen is not None and cache.seen.tolist() == [T]


def test_a_memory_mapped_document_by_position(model: TransnormerForCausalLM, ids: Tensor, losses: Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids.numpy().astype(np.uint16))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    buckets = loss_by_position(model, [(mapped, None)], segment_length=70, first=32)
    assert [(b.start, b.stop) for b in buckets] == [(0, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    assert [b.tokens for b in buckets] == [31, 32, 64, 128, T - 256]
    for bucket in buckets:
        expected = losses[max(bucket.start - 1, 0) : bucket.stop - 1].mean()
        assert bucket.loss == pytest.approx(float(expected), rel=1e-10) and bucket.value == pytest.approx(math.exp(bucket.loss))
    assert total(buckets).tokens == T - 1 and total(buckets).loss == pytest.approx(float(losses.mean()), rel=1e-10)
    assert not math.isfinite(Bucket(0, 1, 1, 1e4).value)


def test_documents_do_not_see_each_other(model: TransnormerForCausalLM, ids: Tensor, losses: Tensor) -> None:
    labels = torch.where(torch.arange(T) < 40, ids, -100)
    buckets = loss_by_position(model, [(ids, None), (ids, labels), (ids[:1], None)], segment_length=64, first=1024)
    (bucket,) = buckets
    expected = torch.cat([losses, losses[:39]])
    assert bucket.tokens == len(expected) and bucket.loss == pytest.approx(float(expected.mean()), rel=1e-10)


def test_no_more_than_a_segment_lives(model: TransnormerForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(len(x)) or forward(x))
    for start, hidden in hidden_states(model, ids.tolist(), segment_length=100):
        assert len(hidden) == 100 and start % 100 == 0 and not hidden.requires_grad
    list(token_losses(model, ids, segment_length=100, chunk=30))
    assert max(seen) == 30
    seen.clear()
    prefill(model, ids, TransnormerCache(3), segment_length=100)
    assert seen == [1], "a prompt needs the logits after its last token alone"


def test_what_cannot_be_read(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        list(hidden_states(model, ids, segment_length=0))
    with pytest.raises(ValueError, match="nothing to read"):
        prefill(model, [], TransnormerCache(3))
    assert loss_by_position(model, [([5], None)]) == [] and math.isnan(total([]).loss)
    assert stream.SEGMENT > 0


@pytest.mark.gpu
def test_on_a_gpu(model: TransnormerForCausalLM, ids: Tensor, losses: Tensor) -> None:
    buckets = loss_by_position(model.cuda(), [(ids, None)], segment_length=64)
    assert total(buckets).loss == pytest.approx(float(losses.mean()), rel=1e-9)
    model.cpu()
