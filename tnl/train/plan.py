"""What a run needs of memory, from shapes alone, and the largest rows that fit.

A step is run on PyTorch's meta device, which computes nothing but makes every tensor's shape, and the bytes that live at once are
counted; two depths and two lengths give the rest, since memory is linear in both. So the plan knows whatever the layer's code does.
"""

import copy
import json
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tnl.errors import MemoryBudgetError
from tnl.kernels.dispatch import ops
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.sections import LoraSection
from tnl.train import lora
from tnl.train.step import Rows, enable_checkpointing, step

GIB = 1024**3
CUDA_OVERHEAD = 0.55 * GIB
"""Context, kernels and the workspaces of cuBLAS, which PyTorch does not count; measured on an H100."""
FRAGMENTS = 1.06
"""How much more than its tensors the allocator reserves."""
LADDER = [2**n * base // 4 for n in range(6, 19) for base in (4, 6)]
"""Row budgets that are chosen from: 64, 96, 128, 192 ... so that a little more or less free memory gives the same rows, and bits."""
CPU_ROW = 4096
"""Longer rows are no faster on a CPU, nor on a GPU beyond GPU_ROW."""
GPU_ROW = 16384
DEPTHS, LENGTHS = (2, 3), (256, 512)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that live at once, and the most there were; those of `model` were there before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.before = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Line:
    """peak bytes = fixed + per_token x tokens of a row."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class Plan:
    """Bytes that a run needs."""

    weights: int
    """Frozen weights, in the dtype they are loaded in."""
    trained: int
    """Trained weights."""
    states: int
    """What the optimizer keeps of each trained weight, in copies of it: 2 for Adam."""
    plain: Line
    """Activations, logits, temporaries and gradients of a row."""
    checkpointed: Line
    """The same where layers are recomputed."""
    overhead: float

    def total(self, tokens: int, checkpointing: bool) -> float:
        """Bytes at the highest point of a step whose longest row has so many tokens: in its backward pass, or in the update."""
        row = (self.checkpointed if checkpointing else self.plain).at(tokens)
        fragments = FRAGMENTS if self.overhead else 1.0
        return self.weights + self.overhead + fragments * (self.trained * (1 + self.states) + max(row, 2 * self.trained))

    def row_budget(self, memory: float, checkpointing: bool, most: int) -> int | None:
        """The longest row on the ladder that fits into `memory` bytes, at most `most`; None where not even the shortest does."""
        fitting = [tokens for tokens in LADDER if tokens <= most and self.total(tokens, checkpointing) <= memory]
        return fitting[-1] if fitting else None


@dataclass(frozen=True)
class Choice:
    """How long rows may be, or, with budget None, that nothing fits."""

    budget: int | None
    checkpointing: bool
    needed: float
    """Bytes at the highest point of a step."""
    memory: float
    """Bytes there are."""


def choose(plan: Plan, memory: float, longest: int, checkpointing: bool, most: int) -> Choice:
    """Take the longest rows that fit; where a record of `longest` tokens does not, with checkpointing though nobody asked for it."""
    for recompute in (True,) if checkpointing else (False, True):
        budget = plan.row_budget(memory, recompute, most)
        if budget is not None and plan.total(longest, recompute) <= memory:
            return Choice(budget, recompute, plan.total(max(budget, longest), recompute), memory)
    return Choice(None, True, plan.total(longest, True), memory)


def require(plan: Plan, choice: Choice, longest: int) -> int:
    """The row budget of a choice. Raises MemoryBudgetError with the line that would fit."""
    if choice.budget is not None:
        return choice.budget
    there = (
        f"{choice.needed / GIB:.1f} GiB with records of {longest} tokens, recomputing every layer (there are {choice.memory / GIB:.1f} GiB)"
    )
    what = f"training needs {there}"
    fits = plan.row_budget(choice.memory, True, longest)
    if fits is None:
        least = plan.total(LADDER[0], True) / GIB
        raise MemoryBudgetError("", what, f"The shortest rows need {least:.1f} GiB: take a smaller base model, or a larger card.")
    raise MemoryBudgetError("", what, f"This would fit: data.max_length={fits}.")


def here(device: torch.device, gib: float | None = None) -> float:
    """Bytes that a run may use: of the GPU what is free (and what this process was given of it), of a CPU's memory 70%; at most `gib`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine = (
            total * torch.cuda.get_per_process_memory_fraction(device) if hasattr(torch.cuda, "get_per_process_memory_fraction") else total
        )
        found = min(free + torch.cuda.memory_reserved(device), mine + CUDA_OVERHEAD)
    else:
        found = 0.7 * psutil.virtual_memory().total
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
            found = min(found, 0.7 * int(text))
    return found if gib is None else min(found, gib * GIB)


def cap(device: torch.device, gib: float) -> None:
    """Keep this process within so much of the GPU's memory: the allocator refuses more, as a smaller card would."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min((gib * GIB - CUDA_OVERHEAD) / total, 1.0), device)


def words(plan: Plan, choice: Choice) -> str:
    """The plan in one line."""
    rows = f"rows of at most {choice.budget:,} tokens{', every layer recomputed' if choice.checkpointing else ''}"
    return f"memory: {rows}: {choice.needed / GIB:.1f} of {choice.memory / GIB:.1f} GiB ({plan.weights / GIB:.1f} of frozen weights)"


OPTIMIZER_STATES = {
    "sgd": 0,
    "adafactor": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "lion_32bit": 1,
    "lion_8bit": 1,
    "paged_lion_32bit": 1,
    "paged_lion_8bit": 1,
}
"""Copies of each trained weight that an optimizer keeps; the others keep at most 2."""


def make(
    config: TransnormerConfig,
    section: LoraSection | None,
    dtype: torch.dtype,
    cuda: bool,
    optimizer: str = "adamw_torch",
    where: str = "recipe",
) -> Plan:
    """The plan of a model of this config with this LoRA: exact for weights, traced for activations. Raises as lora.attach."""
    with torch.device("meta"):
        whole = list(build(config, section, dtype, where).parameters())
    frozen = sum(p.numel() * p.element_size() for p in whole if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in whole if p.requires_grad)
    plain, checkpointed = (fit(config, section, dtype, recompute) for recompute in (False, True))
    return Plan(frozen, trained, OPTIMIZER_STATES.get(optimizer, 2), plain, checkpointed, CUDA_OVERHEAD if cuda else 0.0)


def build(config: TransnormerConfig, section: LoraSection | None, dtype: torch.dtype, where: str = "recipe") -> nn.Module:
    """A model with its adapters on the default device; no weight is read."""
    model: Any = TransnormerForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    model.model.ops = ops("reference")  # the one backend that runs on shapes alone, and the hungriest
    return lora.attach(model, section, where, 0, lambda line: None)


def fit(config: TransnormerConfig, section: LoraSection | None, dtype: torch.dtype, recompute: bool) -> Line:
    """Extrapolate four small traces to the depth of the config, linear in layers and tokens."""
    return fit_cached(config.to_json_string(use_diff=False), section and section.model_dump_json(exclude_unset=True), dtype, recompute)


@lru_cache(maxsize=16)
def fit_cached(config_json: str, section_json: str | None, dtype: torch.dtype, recompute: bool) -> Line:
    """`fit` by values: a process that plans the same again (a notebook, a sweep) need not trace again."""
    config = TransnormerConfig(**json.loads(config_json))
    section = None if section_json is None else LoraSection.model_validate_json(section_json)
    (l1, l2), (t1, t2) = DEPTHS, LENGTHS
    peaks = {(layers, t): trace(shallow(config, layers), section, dtype, t, recompute) for layers in DEPTHS for t in LENGTHS}
    slopes = {layers: (peaks[layers, t2] - peaks[layers, t1]) / (t2 - t1) for layers in DEPTHS}
    fixed = {layers: peaks[layers, t1] - slopes[layers] * t1 for layers in DEPTHS}
    more = config.decoder_layers - l1
    return Line(fixed[l1] + more * (fixed[l2] - fixed[l1]), slopes[l1] + more * (slopes[l2] - slopes[l1]))


def shallow(config: TransnormerConfig, layers: int) -> TransnormerConfig:
    """The same config with so many layers, the first one's LRPE kept."""
    less = copy.deepcopy(config)
    uses = list(config.linear_use_lrpe_list or [])
    less.linear_use_lrpe_list = (uses + uses[-1:] * layers)[:layers]
    less.decoder_layers = layers
    return less


def trace(config: TransnormerConfig, section: LoraSection | None, dtype: torch.dtype, tokens: int, recompute: bool) -> int:
    """Most bytes that live at once in a step of one row of `tokens` tokens, all supervised, beyond the weights."""
    with torch.device("meta"):
        model = build(config, section, dtype).train()
    if recompute:
        enable_checkpointing(model)
    record = {"id": "plan", "input_ids": [1] * tokens, "labels": [1] * tokens}
    with Live(model) as live:
        step(model, [record], Rows(tokens))
    return live.peak
