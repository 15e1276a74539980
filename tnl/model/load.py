"""A model and its tokenizer from a folder, for every room to the right."""

from __future__ import annotations

from pathlib import Path

import torch

from tnl import hub
from tnl.errors import ModelError, RecipeError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.convert import as_dtype, read_config
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.tokenization_baichuan import BaiChuanTokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    backend: str = "auto",
) -> TransnormerForCausalLM:
    """The model in a local folder, in eval mode. Raises ModelError; RecipeError for a device that is not there.

    device auto: the GPU where there is one, else the CPU. dtype auto: bfloat16 on a GPU, float32 on a CPU.
    """
    device = pick_device(device)
    chosen = (torch.float32 if device.type == "cpu" else torch.bfloat16) if dtype == "auto" else as_dtype(dtype)
    return TransnormerForCausalLM.from_pretrained(hub.resolve(str(path)), dtype=chosen, device_map=device, backend=backend)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device by name; auto is the first GPU, or the CPU. Raises RecipeError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise RecipeError(f"device {device}", "is none (there are auto, cpu, cuda, cuda:0, mps)", "Name one of them") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        todo = "Leave the device at auto, or install the CUDA build of PyTorch"
        raise RecipeError(f"device {device}", "there is no GPU that PyTorch can use", todo)
    return found


def load_tokenizer(path: str | Path, config: TransnormerConfig | None = None) -> BaiChuanTokenizer:
    """The tokenizer in a model folder; refused where it can make ids that the model has no row for."""
    folder = hub.resolve(str(path))
    tokenizer = BaiChuanTokenizer.from_pretrained(folder)
    config = config or read_config(folder)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            folder,
            f"the tokenizer has {len(tokenizer)} pieces, the model rows for {config.vocab_size}",
            "Use the tokenizer.model that was published with the weights",
        )
    return tokenizer
