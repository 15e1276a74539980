"""A model folder of a published size with random weights: for speed, memory and loading, never for answers.

python benchmarks/random_model.py 7b /tmp/7b            # safetensors
python benchmarks/random_model.py 7b /tmp/7b --pickled  # three pickled shards, as the 7B was published
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tnl.generate.adapters import LAYER
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import Lrpe, TransnormerForCausalLM

SIZES = {  # layers, width, heads, glu_dim
    "demo": (6, 256, 4, 704),
    "385m": (24, 1024, 8, 2816),
    "1b": (16, 2048, 16, 5632),
    "7b": (30, 4096, 32, 11008),
}
PIECES = 6000
TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "tokenizer"


def config_of(size: str, layers: int | None = None) -> TransnormerConfig:
    """The published config of a size (of fewer layers where given): LRPE in layer 0, swish, 64,000 tokens."""
    full, width, heads, glu_dim = SIZES[size]
    layers = layers or full
    return TransnormerConfig(
        decoder_layers=layers,
        decoder_embed_dim=width,
        hidden_dim=width,
        decoder_attention_heads=heads,
        glu_dim=glu_dim,
        linear_act_fun="swish",
        linear_use_lrpe_list=[1] + [0] * (layers - 1),
        architectures=["TransnormerForCausalLM"],
    )


def in_memory(size: str, device: str, dtype: torch.dtype, *, layers: int | None = None, backend: str = "auto", seed: int = 0) -> Any:
    """A model of random weights (normal, std 0.02) on a device, without a folder, in eval mode.

    Greedily it says nothing but what the golden tokenizer has pieces for (3 to PIECES): every other token's logit is half of one's.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = TransnormerForCausalLM(config_of(size, layers))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("theta"):
                parameter.normal_(0, 0.02)
        rows = model.model.embed_tokens.weight
        rows[PIECES:] = rows[torch.arange(PIECES, len(rows), device=device) % (PIECES - 3) + 3] / 2
        rows[:3] = rows[3:6] / 2
    for module in model.modules():
        if isinstance(module, Lrpe):
            module.theta.data = module.theta.data.float()
            module.reset_parameters()
    model.model.backend = backend
    return model.to(device).eval().requires_grad_(False)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Random ids, no two prompts alike."""
    return tuple(torch.randint(3, PIECES, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def random_adapter(model: Any, seed: int, rank: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A [rank, in] and B [out, rank] for every projection of every layer."""
    generator, matrices = torch.Generator("cpu").manual_seed(seed), {}
    for layer in range(model.config.decoder_layers):
        for name, part in LAYER.items():
            module = f"model.layers.{layer}.{part}.{name}"
            N, K = model.get_submodule(module).weight.shape
            a, b = (torch.randn(shape, generator=generator) * 0.04 for shape in ((rank, K), (N, rank)))
            matrices[module] = a, b
    return matrices


def write(size: str, folder: Path, *, pickled: bool = False, seed: int = 0) -> Path:
    """Write config, tokenizer and bfloat16 weights (normal, std 0.02) in three shards; a folder that is there is kept."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(size)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in TransnormerForCausalLM(config).state_dict().items() if name != "lm_head.weight"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    names, index = list(shapes), {}
    single, last = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    for i in range(3):
        shard: dict[str, Tensor] = {}
        for name in names[i * len(names) // 3 : (i + 1) * len(names) // 3]:
            if name.endswith("theta"):
                D = config.decoder_embed_dim
                shard[name] = (10000.0 ** (-2 * torch.arange(D).double() / D)).view(shapes[name]).bfloat16()
                continue
            shard[name] = (
                torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(0, config.init_std, generator=generator).cpu()
            )
        file = f"{single}-{i + 1:05}-of-00003.{last}"
        torch.save(shard, folder / file) if pickled else save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
    (folder / f"{single}.{last}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    config.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pickled", action="store_true")
    arguments = parser.parse_args()
    print(write(arguments.size, arguments.folder, pickled=arguments.pickled))
