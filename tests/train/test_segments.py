"""Rows stay whole where they fit; what does not is computed in segments, said in one line, and refused where nothing fits."""

from typing import Any

import pytest
import torch

from tnl.errors import MemoryBudgetError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.recipe.sections import TrainSection
from tnl.train import segments
from tnl.train.plan import GIB, Curve, Plan
from tnl.train.recomputation import Level
from tnl.train.segments import lay_out

SEVEN = TransnormerConfig(
    vocab_size=64000,
    decoder_embed_dim=4096,
    hidden_dim=4096,
    decoder_layers=30,
    decoder_attention_heads=32,
    glu_dim=11008,
    linear_use_lrpe_list=[1] + [0] * 29,
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 GiB of host memory."""
    has_free(monkeypatch, 128)


def has_free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr("tnl.train.segments.free_host_bytes", lambda: int(gib * GIB))


def needs() -> Plan:
    """13 GiB of weights; 3 MB a token, 1.7 with GLUs computed again, and 0.25 with every layer recomputed, 0.2 from host memory."""

    def curve(level: Level) -> Curve:
        per_token = {"none": 3e6, "glu": 1.7e6, "layer": 0.25e6, "host": 0.2e6}[level]
        return Curve(((256, 1e9 + 256 * per_token), (1024, 1e9 + 1024 * per_token)))

    return Plan(13 * GIB, 71_000_000, 2, curve, GIB)


def laid(room: float, longest: int, **train: Any) -> segments.Layout:
    return lay_out(needs(), SEVEN, CUDA, room * GIB, longest, TrainSection(**train))


def test_what_fits_whole_stays_whole() -> None:
    layout = laid(80, 8000)
    assert layout.segment_length is None and not layout.line and layout.choice.level == "none" and (layout.choice.budget or 0) >= 8192
    for longest, level in ((30_000, "glu"), (100_000, "layer"), (270_000, "host")):
        layout = laid(80, longest)
        assert layout.segment_length is None and layout.choice.level == level, "recomputing is tried first: it costs the same"


def test_a_million_tokens_go_in_segments() -> None:
    layout = laid(80, 1_048_576)
    assert layout.segment_length == 4096 and layout.choice.level == "none" and layout.choice.needed < 80 * GIB
    assert "segments of 4,096 tokens, with the gradients of one pass" in layout.line and "15.4 of 128.0 GiB of host memory" in layout.line
    assert layout.every == 1
    layout = laid(18, 1_048_576)
    assert layout.choice.level == "glu" and "GLUs computed again" in layout.line
    assert layout.choice.needed < 18 * GIB < layout.choice.otherwise
    layout = laid(16.5, 1_048_576)
    assert layout.choice.level == "layer" and "every layer recomputed," in layout.line and layout.choice.needed < 16.5 * GIB
    assert layout.segment_length is not None and layout.segment_length >= 1024
    assert laid(80, 1_048_576, gradient_checkpointing=True).choice.level == "layer"


def test_short_records_are_packed_into_rows_that_need_no_segments() -> None:
    layout = laid(80, 300_000, segment_length=2048)
    assert layout.segment_length == 2048 and layout.choice.budget == 2048
    layout = laid(80, 500, segment_length=2048)
    assert layout.segment_length == 2048 and not layout.line and layout.choice.budget == 2048
    assert laid(80, 500, segment_length=7).choice.budget == 7


def test_where_the_host_is_short_some_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, 5)
    layout = laid(80, 1_048_576)
    assert layout.every == 4 and "1 of 4 kept and the others computed again" in layout.line
    said = r"1,048,576 tokens .*256 segments of 62 MiB; there are 5\.0 GiB, enough for 339,968 tokens.*=auto, which keeps 1 of 4"
    with pytest.raises(MemoryBudgetError, match=said):
        laid(80, 1_048_576, state_offload="host")
    assert laid(80, 339_968, state_offload="host").every == 1
    with pytest.raises(MemoryBudgetError, match="enough for 339,968 tokens"):
        laid(80, 339_968 + 4096 * 2, state_offload="host")
    with pytest.raises(MemoryBudgetError, match="GPU memory"):
        laid(40, 10_048_576, state_offload="gpu")


def test_segments_that_do_not_fit_say_which_do() -> None:
    with pytest.raises(MemoryBudgetError, match=r"train\.segment_length: segments of 200,000 tokens need .*train\.segment_length=\d+") as e:
        laid(24, 1_048_576, segment_length=200_000)
    fits = int(str(e.value).rpartition("=")[2].rstrip("."))
    assert laid(24, 1_048_576, segment_length=fits).segment_length == fits
    with pytest.raises(MemoryBudgetError, match="smaller base model"):
        laid(13, 1_048_576, segment_length=4096)


def test_where_nothing_fits_the_choice_says_so() -> None:
    layout = laid(13, 1_048_576)
    assert layout.choice.budget is None and layout.segment_length is None


def test_a_segment_has_a_token() -> None:
    for length in (0, -5):
        with pytest.raises(ValueError, match="segment_length"):
            TrainSection(segment_length=length)


def test_on_a_cpu_states_are_a_part_of_what_rows_need() -> None:
    section = TrainSection(segment_length=4096)
    layout = lay_out(needs(), SEVEN, CPU, 60 * GIB, 1_048_576, section)
    short = lay_out(needs(), SEVEN, CPU, 60 * GIB, 8192, section)
    assert "15.4 GiB, counted above" in layout.line and layout.every == 1
    between = (256 - 2) * segments.state_bytes(SEVEN)
    assert layout.choice.needed - short.choice.needed == pytest.approx(between) and layout.choice.needed < 60 * GIB
    less = lay_out(needs(), SEVEN, CPU, short.choice.needed + 4 * GIB, 1_048_576, section)
    assert less.every > 1 and less.choice.needed <= short.choice.needed + 4 * GIB
