"""A tiny random base with the golden tokenizer, and a random adapter of it as plain peft saves it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_model
from tnl.model.modeling_transnormer import TransnormerForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
ALL = ["qkvu_proj", "out_proj", "l1", "l2", "l3"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_base(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    torch.manual_seed(seed)
    values = {"decoder_embed_dim": 32, "hidden_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "glu_dim": 48}
    config = TransnormerConfig(vocab_size=6000, **{**values, **sizes})
    TransnormerForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny-base")


@pytest.fixture
def make_adapter(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """make_adapter(**LoraConfig's fields) -> folder of a random adapter of `base`."""

    def make(name: str = "adapter", std: float = 0.1, on: Path = base, **fields: Any) -> Path:
        torch.manual_seed(1)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **fields})
        model = get_peft_model(load_model(on, device="cpu"), config)
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in parameter_name:
                parameter.data += torch.randn_like(parameter) * std
        folder = tmp_path / name
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return folder

    return make
