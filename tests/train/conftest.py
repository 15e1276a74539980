"""A model folder and records so small that a whole run takes a second or two."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM

torch.set_num_threads(1)
gc.freeze()  # Trainer collects garbage when it begins, half a second over all that torch has imported
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES: dict[str, Any] = {
    "vocab_size": 6000,
    "decoder_embed_dim": 16,
    "hidden_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "glu_dim": 24,
    "linear_use_lrpe_list": [1, 0],
    "init_std": 0.1,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as published: config, safetensors, tokenizer.model."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    TransnormerForCausalLM(TransnormerConfig(**SIZES)).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 records, no two alike."""
    words = "春夏秋冬山水风云日月花鸟"
    rows = [
        {
            "instruction": f"{words[i % 12]}是什么？{i}",
            "input": "",
            "output": f"{words[(i * 5 + 1) % 12]}{words[i % 7]}第{i}句。" * (1 + i % 3),
        }
        for i in range(44)
    ]
    file = tmp_path_factory.mktemp("data") / "records.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.fixture
def recipe(base: Path, records: Path, tmp_path: Path) -> Path:
    """10 steps of 8 records over two epochs, measured and saved every second step."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
model: {{path: "{base}", dtype: float32}}
data: {{train: "{records}", eval: 0.1, max_length: 64}}
lora: {{r: 2, lora_alpha: 8, lora_dropout: 0.2}}
train: {{output_dir: "{tmp_path / "run"}", per_device_train_batch_size: 4, gradient_accumulation_steps: 2, num_train_epochs: 2,
  learning_rate: 2.0e-2, logging_steps: 1, eval_steps: 2, save_steps: 2, save_total_limit: 2, use_cpu: true}}
generation: {{max_new_tokens: 4, do_sample: false}}
""",
        encoding="utf-8",
    )
    return file
