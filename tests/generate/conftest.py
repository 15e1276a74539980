"""A tiny random model that speaks the golden tokenizer, and the golden folders."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tnl.adapter.metadata import describe, write_metadata
from tnl.data.template import TEMPLATES
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
        tie_word_embeddings=False,  # a tied random model says its last token for ever
    )
    model = TransnormerForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
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


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """A random adapter in a run's folder, with tnl.json."""
    torch.manual_seed(1)
    names = ["qkvu_proj", "out_proj", "l1", "l2", "l3"]
    model = get_peft_model(load_model(base, device="cpu"), LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    folder = tmp_path / "run" / "adapter"
    model.save_pretrained(str(folder))
    generation = {"do_sample": False, "max_new_tokens": 6}
    write_metadata(folder, describe(folder, str(base), template=TEMPLATES["alpaca"], system="说书人", generation=generation))
    return folder
