"""What a run says of the forms its parts take."""

import pytest
import torch
from torch import nn

from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection, TrainSection
from tnl.train import lora
from tnl.train import paths_taken as forms
from tnl.train.paths_taken import paths_taken, why_eager, words
from tnl.train.step import Rows, alone

SIZES = {"vocab_size": 50, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 24}


def make(section: LoraSection | None, backend: str) -> nn.Module:
    torch.manual_seed(0)
    base = TransnormerForCausalLM(TransnormerConfig(**SIZES))
    base.model.pick_kernels(backend)
    return lora.attach(base, section, "recipe.yaml", 1, lambda line: None)


def test_the_fast_path() -> None:
    pytest.importorskip("triton")
    line = words(paths_taken(make(LoraSection(), "triton"), Rows(100), ""))
    assert line == "computed: attention Triton; LoRA fused; loss in chunks of 1024; rows packed; recomputed nothing; step in CUDA graphs"


def test_the_option_that_leaves_it_is_named() -> None:
    pytest.importorskip("triton")
    paths = paths_taken(make(LoraSection(use_dora=True, target_modules=["l1"]), "triton"), Rows(100), "")
    assert paths["lora"].startswith("by PEFT's own forward in 2 of 2 modules, because of DoraLinear")


@pytest.mark.parametrize(
    ("packing", "rows", "said"),
    [
        ("batch", Rows(4096), "8 records a step (batch x accumulation: 2 x 4), end to end in rows of at most 4,096 tokens"),
        (
            "fill",
            Rows(512, multiple=64),
            "8 rows a step (batch x accumulation: 2 x 4), end to end in rows of at most 512 tokens, filled",
        ),
        ("batch", Rows(512, segment_length=256), "of at most 512 tokens; longer ones in segments of 256"),
        ("none", Rows(4096, padded=2), "8 records a step (batch x accumulation: 2 x 4), padded, 2 at once"),
    ],
)
def test_how_batches_become_rows(packing: str, rows: Rows, said: str) -> None:
    section = TrainSection(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert said in forms.rows_of_a_step(section, packing, 8, rows)


@pytest.mark.parametrize(("section", "form"), [(LoraSection(), "plain PyTorch"), (None, "none")])
def test_without_triton(section: LoraSection | None, form: str) -> None:
    paths = paths_taken(make(section, "reference"), Rows(100, padded=4, label_smoothing=0.1), "")
    assert paths == {
        "attention": "plain PyTorch",
        "lora": form,
        "loss": "by the head's own forward",
        "rows": "padded, 4 records at once",
        "recomputed": "nothing",
        "step": "in CUDA graphs",
    }


@pytest.mark.parametrize(
    ("section", "rows", "wanted", "said"),
    [
        (LoraSection(), Rows(100), False, "train.cuda_graphs is false"),
        (LoraSection(), Rows(100, padded=4), True, "records are padded"),
        (LoraSection(), Rows(100, label_smoothing=0.1), True, "there is no GPU"),
        (LoraSection(), Rows(100), True, "there is no GPU"),
    ],
)
def test_why_a_step_is_not_recorded(section: LoraSection, rows: Rows, wanted: bool, said: str) -> None:
    pytest.importorskip("triton")
    model = make(section, "triton")
    assert why_eager(model, rows, alone(model), wanted) == said
    assert words(paths_taken(model, rows, said)).endswith(f"step eager, since {said}")


@pytest.mark.parametrize(("section", "rows"), [(LoraSection(), Rows(100, label_smoothing=0.1)), (LoraSection(use_dora=True), Rows(100))])
def test_a_part_outside_keeps_a_gpu_from_recording(section: LoraSection, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(forms, "why_not", lambda model: "")
    model = make(section, "triton")
    assert why_eager(model, rows, alone(model), True) == "a part falls to a form of its own"
