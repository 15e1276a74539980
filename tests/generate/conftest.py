"""A tiny random model that speaks the golden tokenizer, and the golden folders."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_model, load_tokenizer
from tnl.model.modeling_transnormer import TransnormerForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 6,000 pieces, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=6000,
        decoder_embed_dim=32,
        hidden_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        glu_dim=48,
        linear_use_lrpe_list=[1, 0],
    )
    model = TransnormerForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, folder)
    return folder


@pytest.fixture(scope="session")
def model(base: Path) -> Any:
    return load_model(base, device="cpu")


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base)
