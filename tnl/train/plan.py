"""What a run needs of memory, and the largest rows that fit.

Steps of two and of three layers are run at a few row lengths, and the bytes that live at once are counted; memory is linear in layers
and, between those lengths, in tokens, which gives the rest. On a GPU that is done with its own kernels, else on PyTorch's meta device,
which computes nothing but makes every tensor's shape. So the plan knows whatever the layer's code does.
"""

import contextlib
import copy
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tnl import host
from tnl.errors import MemoryBudgetError
from tnl.evaluate.perplexity import causal_lm
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection, TrainSection
from tnl.train import lora, recomputation
from tnl.train.places import Where
from tnl.train.recomputation import LEVELS, Level
from tnl.train.step import Rows, forward_backward

GIB = 1024**3
CONTEXT = 0.75 * GIB
"""What a CUDA process holds beside PyTorch's own memory: context, kernels. Measured on an H100."""
OVERHEAD = 1.1 * GIB
"""CONTEXT, and what the allocator holds of a 7B's weights beyond their bytes."""
FRAGMENTS = 1.08
"""How much more than its tensors a row makes the allocator hold: chosen from readings of the 7B on an H100, 400 to 8,000 tokens, with
nothing and with layers computed again."""
HEAP: dict[Level, float] = {"none": 0.9, "glu": 1.9, "layer": 6.0, "host": 6.0}
"""How much of a row's bytes the C library keeps on a CPU after they were freed, 1 GiB at most: chosen from readings of the demo base with
rows of 4,096 tokens (larger models' tensors go straight back to the system). They scatter: GLUs computed again took 1.3 GiB on one
machine and 1.9 on another, so the larger is planned."""
LATER = 64 * 1024**2
"""What the program takes on a CPU behind the plan, beside tensors: Trainer, autograd's threads. Read on the demo base: 45 to 60 MiB."""
CPU_SHARE = 0.7
"""Of the memory that is available: the rest is left to other programs."""
LADDER = [2**n * base // 4 for n in range(6, 19) for base in (4, 6)]
"""Row budgets that are chosen from: 64, 96, 128, 192 ... so that a little more or less free memory gives the same rows, and bits."""
CPU_ROW = 4096
"""Longer rows are no faster on a CPU, nor on a GPU beyond GPU_ROW."""
GPU_ROW = 16384
LENGTHS = (128, 1024, 1280)
"""Row lengths that are traced; up to 1,024 tokens the logits grow with the row."""
LONGER = (2048, 4096)
"""And these where gradients leave at once: beside them the rest of a short row does not show."""


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
class Curve:
    """Peak bytes of a row against its tokens: straight between the points, and on beyond the last two."""

    points: tuple[tuple[int, float], ...]

    def at(self, tokens: int) -> float:
        pairs = list(pairwise(self.points))
        (t1, y1), (t2, y2) = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
        return max(y1 + (y2 - y1) / (t2 - t1) * (tokens - t1), 0.0)

    @property
    def per_token(self) -> float:
        """Bytes that one more token of a long row takes."""
        (t1, y1), (t2, y2) = self.points[-2:]
        return (y2 - y1) / (t2 - t1)


@dataclass(frozen=True)
class Plan:
    """Bytes that a run needs."""

    weights: int
    """Frozen weights, in the dtype they are loaded in."""
    trained: int
    """Trained weights."""
    states: float
    """What the optimizer keeps of each trained weight, in copies of it: 2 for Adam."""
    curve: Callable[[Level], Curve]
    """Activations, logits, temporaries and gradients of a row, where so much is computed again. Traced when asked for."""
    overhead: float
    """What the process holds before a weight is loaded: on a CPU the program itself, on a GPU what CUDA takes."""
    on_cpu: bool = False
    layer: int = 0
    """Of weights and trained weights, those of the largest layer,"""
    outside: int = 0
    """and those outside the layers."""
    beside: int = 0
    """What is whole for a while of that which is shared out over processes."""
    host: bool = True
    """Whether what enters recomputed layers may wait in host memory."""

    def levels(self, checkpointing: bool, segments: bool = False) -> tuple[Level, ...]:
        """What may be computed again, the fastest first; segments: of rows that are streamed, what enters a layer stays on the device."""
        all_of_them = LEVELS[:-1] if self.on_cpu or segments or not self.host else LEVELS
        return all_of_them[-1:] if checkpointing else all_of_them

    def total(self, tokens: int, level: Level) -> float:
        """Bytes at the highest point of a step whose longest row has so many tokens: in its backward pass, or in the update."""
        row = self.curve(level).at(tokens)
        tensors = self.trained * (1 + self.states) + max(row + self.beside, 2 * self.trained)
        kept = min(HEAP[level] * tensors, GIB) if self.on_cpu else (FRAGMENTS - 1) * row
        return self.weights + self.overhead + tensors + kept

    def row_budget(self, memory: float, level: Level, most: int) -> int | None:
        """The longest row on the ladder that fits into `memory` bytes, at most `most`; None where not even the shortest does."""
        fitting = [tokens for tokens in LADDER if tokens <= most and self.total(tokens, level) <= memory]
        return fitting[-1] if fitting else None


@dataclass(frozen=True)
class Choice:
    """How long rows may be, or, with budget None, that nothing fits."""

    budget: int | None
    level: Level
    """What is computed again."""
    needed: float
    """Bytes at the highest point of a step."""
    memory: float
    """Bytes there are."""
    otherwise: float = 0.0
    """Bytes that the same rows would need with nothing computed again."""


def choose(plan: Plan, memory: float, longest: int, checkpointing: bool, most: int) -> Choice:
    """Take the fastest level at which a record of `longest` tokens fits, though nobody asked for it, and the longest rows that fit then."""
    levels = plan.levels(checkpointing)
    for level in levels:
        budget = plan.row_budget(memory, level, most)
        if budget is not None and plan.total(longest, level) <= memory:
            return chosen(plan, budget, level, max(budget, longest), memory)
    return Choice(None, levels[-1], plan.total(longest, levels[-1]), memory)


def chosen(plan: Plan, budget: int, level: Level, tokens: int, memory: float, extra: float = 0.0) -> Choice:
    """The choice of a level; tokens: of the longest row, or segment; extra: bytes beside it."""
    return Choice(budget, level, plan.total(tokens, level) + extra, memory, plan.total(tokens, "none") + extra)


def require(plan: Plan, choice: Choice, longest: int) -> int:
    """The row budget of a choice. Raises MemoryBudgetError with the line that would fit."""
    if choice.budget is not None:
        return choice.budget
    there = (
        f"{choice.needed / GIB:.1f} GiB with records of {longest} tokens, recomputing every layer (there are {choice.memory / GIB:.1f} GiB)"
    )
    what = f"training needs {there}"
    fits = plan.row_budget(choice.memory, choice.level, longest)
    if fits is None:
        least = plan.total(LADDER[0], choice.level) / GIB
        raise MemoryBudgetError("", what, f"The shortest rows need {least:.1f} GiB: take a smaller base model, or a larger card.")
    raise MemoryBudgetError("", what, f"This would fit: data.max_length={fits}.")


def here(device: torch.device, gib: float | None = None) -> float:
    """Bytes that this process may hold: of the GPU what is free (and what it was given of it), of a CPU's memory what it holds already and
    70% of what is available; at most `gib`.
    """
    if device.type == "cuda":
        index = device.index or 0
        free, total = torch.cuda.mem_get_info(index)
        # torch 2.11 cannot say what it was told
        told = getattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)
        found = min(free + torch.cuda.memory_reserved(index), total * told(index) + CONTEXT)
    else:
        found = host.resident() + CPU_SHARE * host.available()
    return found if gib is None else min(found, gib * GIB)


def roomy(config: TransnormerConfig, dtype: torch.dtype, device: torch.device) -> torch.device:
    """The device, if the whole model fits beside what this process has there already; else the CPU."""
    if device.type != "cuda":
        return device
    with torch.device("meta"):
        weights = sum(p.numel() for p in TransnormerForCausalLM(config).parameters()) * dtype.itemsize
    room = here(device) - torch.cuda.memory_allocated(device)
    return device if weights + OVERHEAD <= room else torch.device("cpu")


def cap(device: torch.device, gib: float) -> None:
    """Keep this process within so much of the GPU's memory: the allocator refuses more, as a smaller card would."""
    if device.type == "cuda":
        index = device.index or 0
        total = torch.cuda.mem_get_info(index)[1]
        torch.cuda.set_per_process_memory_fraction(min((gib * GIB - CONTEXT) / total, 1.0), index)


def longest_row(device: torch.device, longest: int, section: TrainSection) -> int:
    """Tokens beyond which a longer row is of no use: it holds a whole step, or the machine is busy as it is."""
    busy = GPU_ROW if device.type == "cuda" else CPU_ROW
    step_tokens = longest * section.per_device_train_batch_size * section.gradient_accumulation_steps
    return min(busy, next((tokens for tokens in LADDER if tokens >= step_tokens), busy))


def words(plan: Plan, choice: Choice) -> str:
    """The plan in one line."""
    rows = f"rows of at most {choice.budget:,} tokens{AGAIN[choice.level]}"
    instead = "" if choice.level == "none" else f" instead of {choice.otherwise / GIB:.1f}"
    room = f"{choice.needed / GIB:.1f} of {choice.memory / GIB:.1f} GiB{instead}"
    return f"memory: {rows}: {room} ({plan.weights / GIB:.1f} of frozen weights)"


AGAIN: dict[Level, str] = {
    "none": "",
    "glu": ", the layers' GLUs computed again",
    "layer": ", every layer recomputed",
    "host": ", every layer recomputed from host memory",
}


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
    device: torch.device,
    optimizer: str = "adamw_torch",
    where: Where = "recipe",
    backend: str = "auto",
    parts: bool = False,
) -> Plan:
    """The plan of a model of this config with this LoRA on this device: exact for weights, traced for activations.

    parts: gradients leave as soon as they are made, to be shared out (sharded.py, which adds what stays).
    A GPU that is not there is planned for by shapes alone. Raises as lora.attach.
    """
    with torch.device("meta"):
        model = build(config, section, dtype, "reference", where)
    whole = list(model.parameters())
    layer = max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in causal_lm(model).model.layers)
    frozen = sum(p.numel() * p.element_size() for p in whole if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in whole if p.requires_grad)
    overhead = OVERHEAD if device.type == "cuda" else host.resident() + LATER
    traces = partial(fit, config, section, dtype, device, backend, parts)
    outside = frozen + trained - config.decoder_layers * layer
    return Plan(frozen, trained, OPTIMIZER_STATES.get(optimizer, 2), traces, overhead, device.type != "cuda", layer, outside)


def build(config: TransnormerConfig, section: LoraSection | None, dtype: torch.dtype, backend: str, where: Where = "recipe") -> nn.Module:
    """A model with its adapters on the default device; no weight is read."""
    model: Any = TransnormerForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    model.model.pick_kernels(backend)
    return lora.attach(model, section, where, 0, lambda line: None)


def fit(
    config: TransnormerConfig,
    section: LoraSection | None,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    parts: bool,
    level: Level,
) -> Curve:
    """Extrapolate traces of two and three layers to the depth of the config."""
    settings = None if section is None else everywhere(section).model_dump_json(exclude_unset=True)
    trace_on = partial(traced, config.to_json_string(use_diff=False), settings, dtype, parts)
    if device.type == "cuda" and torch.cuda.is_available():
        with contextlib.suppress(torch.OutOfMemoryError):  # then by shapes, which need no memory
            return trace_on(level, str(device), backend)
    return trace_on("layer" if level == "host" else level, "meta", "reference")  # shapes alone have no host memory to go to


@lru_cache(maxsize=16)
def traced(config_json: str, section_json: str | None, dtype: torch.dtype, parts: bool, level: Level, device: str, backend: str) -> Curve:
    """`curve` by values: a process that plans the same again (a notebook, a sweep) need not trace again."""
    config = TransnormerConfig(**json.loads(config_json))
    if level in ("layer", "host") and any(config.linear_use_lrpe_list or []):
        # the peak is that of one layer, and what enters the others: it shows when the first to be computed again is the widest
        config.linear_use_lrpe_list = [1] * config.decoder_layers
    section = None if section_json is None else LoraSection.model_validate_json(section_json)
    lengths = (*LENGTHS, *LONGER) if parts else LENGTHS
    peaks: dict[int, list[int]] = {}
    for layers in (2, 3):  # the gradient of what enters the first is not computed
        model = shallow_model(config, layers, section, dtype, device, backend)
        recomputation.use(model, level)
        for p in (one for one in model.parameters() if parts and one.requires_grad):
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        peaks[layers] = [trace(model, tokens) for tokens in lengths]
        del model
    more = config.decoder_layers - 2
    return Curve(tuple((t, two + more * (three - two)) for t, two, three in zip(lengths, peaks[2], peaks[3])))


def everywhere(section: LoraSection) -> LoraSection:
    """The section without what names single layers, which a shallow model may not have: never less memory."""
    wanted = section.target_modules
    named = isinstance(wanted, list) and not any("." in word for word in wanted)
    changes: dict[str, Any] = {"target_modules": wanted if named else "all-linear"}
    kept = {name: value for name, value in section.arguments().items() if name not in LAYERWISE}
    changes["r"] = max([section.r, *(section.arguments().get("rank_pattern") or {}).values()])
    return LoraSection(**{**kept, **changes})


LAYERWISE = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")


def shallow_model(
    config: TransnormerConfig, layers: int, section: LoraSection | None, dtype: torch.dtype, device: str, backend: str
) -> nn.Module:
    """A model of so many layers in training mode; on a GPU its weights are zeros, which take the same memory."""
    with torch.device("meta"):
        model = build(shallow(config, layers), section, dtype, "reference").train()
    if device != "meta":
        model = model.to_empty(device=device)
        causal_lm(model).model.pick_kernels(backend)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.zero_()
    return model


def shallow(config: TransnormerConfig, layers: int) -> TransnormerConfig:
    """The same config with so many layers, the first one's LRPE kept."""
    less = copy.deepcopy(config)
    uses = list(config.linear_use_lrpe_list or [])
    less.linear_use_lrpe_list = (uses + uses[-1:] * layers)[:layers]
    less.decoder_layers = layers
    return less


def trace(model: nn.Module, tokens: int) -> int:
    """Most bytes that live at once in a step of one row of `tokens` tokens, all supervised, beyond the weights."""
    record = {"id": "plan", "input_ids": [1] * tokens, "labels": [1] * tokens}
    device = next(model.parameters()).device
    rows = Rows(tokens)
    try:
        if device.type != "cuda":
            with Live(model) as live:
                forward_backward(model, rows, [record], tokens)
            return live.peak
        forward_backward(model, rows, [record], tokens)  # a kernel's first call may take memory of its own
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward_backward(model, rows, [record], tokens)
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        model.zero_grad(set_to_none=True)
