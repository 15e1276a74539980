"""The base model of a run: where it lies, where it is trained and in which numbers; what makes a run this run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnl import hub
from tnl.data.files import find_files
from tnl.data.template import TEMPLATES
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.convert import read_config, weight_files
from tnl.model.load import load_model, load_tokenizer, pick_device
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.recipe.load import Recipe
from tnl.run_dir import fingerprint
from tnl.train import arguments, plan, together
from tnl.train.show import say


@dataclass(frozen=True)
class Base:
    """The base model of a run, its weights not yet loaded."""

    folder: Path
    config: TransnormerConfig
    tokenizer: BaiChuanTokenizer
    device: torch.device
    dtype: torch.dtype


def prepare(recipe: Recipe, memory: float | None = None, *, weights: bool = True) -> Base:
    """Find the base model and decide where it is trained, and in which numbers. weights: False leaves those of a repository there."""
    for paths_of_records in (recipe.data.train, recipe.data.eval):
        if isinstance(paths_of_records, (str, list)):
            find_files(paths_of_records)  # gigabytes are not fetched for records that are not there
    folder = hub.resolve(recipe.model.path, recipe.model.hub, recipe.model.revision, weights=weights)
    config = read_config(folder)
    device = together.own_device(pick_device("cpu" if recipe.train.use_cpu else "auto"))
    # read when cuBLAS first runs: the same recipe gives the same bits on a GPU too
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # read when memory is first taken: rows of many lengths, and their graphs, leave no holes
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if memory is not None:
        plan.cap(device, memory)
    wanted = recipe.model.dtype
    if wanted == "auto":
        # every weight in bfloat16 would lose most of its updates to rounding
        half = arguments.asks_for_bfloat16(recipe.train) or (device.type == "cuda" and torch.cuda.is_bf16_supported() and recipe.lora)
        wanted = "bfloat16" if half else "float32"
    return Base(folder, config, load_tokenizer(folder, config), device, getattr(torch, wanted))


def slow_dtype(recipe: Recipe, base: Base) -> str:
    """A line for the person where another dtype would be faster here; "" where none would."""
    if recipe.model.dtype != "bfloat16" or base.device.type != "cpu":
        return ""
    return "model.dtype: bfloat16 is several times slower than float32 on most CPUs; model.dtype=auto takes float32, of twice the memory"


def fingerprint_of(recipe: Recipe, base: Base) -> dict[str, Any]:
    """What makes this run this run: the recipe's values, the contents of every file it reads."""
    files = {"data": find_files(recipe.data.train)[0], "base": [base.folder / "config.json", *weight_files(base.folder)]}
    if isinstance(recipe.data.eval, (str, list)):
        files["eval"] = find_files(recipe.data.eval)[0]
    tokenizer = base.folder / "tokenizer.model"
    files["tokenizer"] = [tokenizer] if tokenizer.is_file() else []
    return fingerprint(recipe, files, template=TEMPLATES[recipe.data.template].hash, dtype=str(base.dtype))


def whole_base(recipe: Recipe, base: Base) -> nn.Module:
    """The base where it can be whole beside what is shared out: on this process's device, or on the CPU."""
    device = plan.roomy(base.config, base.dtype, base.device)
    if device != base.device:
        say("the whole model does not fit this GPU: questions are answered on the CPU, which takes minutes")
    return load_model(base.folder, dtype=base.dtype, device=device, backend=recipe.model.backend, mapped=True)
