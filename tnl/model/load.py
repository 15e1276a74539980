"""A model and its tokenizer from a folder, for every room to the right."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tnl import host, hub
from tnl.errors import MemoryBudgetError, ModelError, RecipeError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.convert import as_dtype, headers, read_config, weight_files
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.tokenization_baichuan import BaiChuanTokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    backend: str = "auto",
    mapped: bool = False,
) -> TransnormerForCausalLM:
    """The model in a local folder, in eval mode. Raises ModelError; RecipeError for a device that is not there; MemoryBudgetError.

    device auto: the GPU where there is one, else the CPU. dtype auto: bfloat16 on a GPU; float32 on a CPU, and bfloat16 where that alone
    fits its memory. mapped: on a CPU weights that need no conversion stay in their files, for somebody who takes them from there.
    """
    folder, device = hub.resolve(str(path)), pick_device(device)
    config = read_config(folder)
    wanted = [as_dtype(dtype)] if dtype != "auto" else [torch.bfloat16] if device.type != "cpu" else [torch.float32, torch.bfloat16]
    mapped = mapped and device.type == "cpu"
    chosen = fitting(folder, device, wanted, mapped)
    return TransnormerForCausalLM.from_pretrained(folder, config=config, dtype=chosen, device_map=device, backend=backend, mapped=mapped)


def fitting(folder: Path, device: torch.device, wanted: list[torch.dtype], mapped: bool = False) -> torch.dtype:
    """The first dtype in which a folder's weights fit the memory that is free: an operating system ends what takes more, without a word.

    mapped: what has the dtype already takes none. Raises MemoryBudgetError where none does.
    """
    stored = [(math.prod(shape), kept) for file in weight_files(folder) for shape, kept in headers(file).values()]
    room = free_memory(device)
    for dtype in wanted:
        need = dtype.itemsize * sum(count for count, kept in stored if not (mapped and kept == dtype))
        if need <= room:
            return dtype
    name = str(wanted[-1]).removeprefix("torch.")
    what = f"its weights take {need / 2**30:.1f} GiB in {name}, and {room / 2**30:.1f} GiB are free on {device}"
    raise MemoryBudgetError(folder, what, f"End other programs, or take {'bfloat16 or ' if wanted[-1].itemsize > 2 else ''}a smaller model")


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken on a device; infinite where nobody knows."""
    if device.type == "cpu":
        return host.available()
    if device.type != "cuda":
        return math.inf
    # what PyTorch keeps for later counts as taken
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
