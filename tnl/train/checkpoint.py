"""What a checkpoint holds and how it comes back: exact key sets, nothing missing, nothing that is not finite.

Adapter (or, without LoRA, every weight) as safetensors, optimizer and schedule as tensors that torch reads with weights_only, and
Trainer's state as JSON. No generator states: the randomness of a step is a function of the seed and the step (tnl/train/step.py).
"""

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tnl.errors import ModelError, NumbersError
from tnl.evaluate.perplexity import causal_lm
from tnl.train.engines import Engine

ADAPTER_WEIGHTS, ADAPTER_CONFIG, FULL_WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
OPTIMIZER, SCHEDULE, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"


def save_weights(model: nn.Module, folder: Path, base: str | None = None, weights: dict[str, Tensor] | None = None) -> None:
    """Write the trained weights into a folder: the adapter in peft's plain format, or a whole model that from_pretrained loads.

    base: what the adapter's config names as its base model. weights: `trained_tensors`, whole and on the CPU, where the model's are
    shared out. Raises NumbersError where a weight is not finite.
    """
    weights = trained_weights(model) if weights is None else weights
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumbersError(folder.name, f"the weight {name} is not finite, so nothing was saved", "Lower train.learning_rate.")
    if isinstance(model, PeftModel):
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        config.base_model_name_or_path = base or config.base_model_name_or_path
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    save_file(weights, folder / FULL_WEIGHTS, metadata={"format": "pt"})
    causal_lm(model).config.save_pretrained(folder)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor on the CPU of all that is saved, in order of the names; a tied weight once."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(model).items()}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same as they stand in the model."""
    if isinstance(model, PeftModel):
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or {}
        shared = set(tied) if causal_lm(model).config.tie_word_embeddings else set()
        found = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    return {name: found[name] for name in sorted(found)}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a (verified) folder into the model. Raises ModelError where names or shapes are not exactly the model's."""
    adapted = isinstance(model, PeftModel)
    path = folder / (ADAPTER_WEIGHTS if adapted else FULL_WEIGHTS)
    if isinstance(model, PeftModel):
        compare_configs(model, folder / ADAPTER_CONFIG)
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(path, f"cannot be read ({error})", "Use another checkpoint.") from None
    there = trained_tensors(model)
    for name in sorted({*there, *loaded}):
        found, needed = shape(loaded.get(name)), shape(there.get(name))
        if found != needed:
            raise ModelError(path, f"is not of this run: {name} (found {found}; needed {needed})", "Use another checkpoint.")
    put_weights(model, loaded)


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put `trained_weights` of such a model into it."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights, strict=False)  # the key sets were compared; only tied names are missing


def compare_configs(model: PeftModel, path: Path) -> None:
    """Refuse an adapter whose rank, scale or targets are not the run's, which shapes alone would not tell."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(path, f"cannot be read ({error})", "Use another checkpoint.") from None
    config = model.peft_config["default"]
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules"):
        found, mine = saved.get(name), getattr(config, name)
        if isinstance(mine, set) and isinstance(found, list):
            found, mine = sorted(found), sorted(mine)
        if found != mine:
            raise ModelError(path, f"is not of this run: {name} (found {found}; needed {mine})", "Use another checkpoint.")


def shape(tensor: Tensor | None) -> str:
    """A tensor's shape, or that there is none."""
    return "nothing" if tensor is None else str(tuple(tensor.shape))


def save_training_state(folder: Path, values: dict[str, Any], scheduler: Any, state: Any) -> None:
    """Write the optimizer's state, schedule and Trainer's state. Raises NumbersError where the optimizer's state is not finite."""
    kept = {name: tensor for name, tensor in tensors_of(values["state"], "optimizer") if tensor.is_floating_point()}
    if bad := first_not_finite(kept):
        raise NumbersError(folder.name, f"{bad} is not finite, so nothing was saved", "Lower train.learning_rate.")
    for name, value in ((OPTIMIZER, values), (SCHEDULE, scheduler.state_dict())):
        # a file of Python's own: its errors have numbers, which those of torch's writer have not
        with (folder / name).open("wb") as file:
            torch.save(value, file)
    state.save_to_json(str(folder / STATE))


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a number that is not finite; a device is waited for once."""
    devices = {tensor.device for tensor in tensors.values()}
    for device in devices:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in here.values()]).tolist()
        if not all(finite):
            return list(here)[finite.index(False)]
    return None


def load_training_state(folder: Path, optimizer: Any, scheduler: Any, engine: Engine) -> None:
    """Put optimizer and schedule back. Raises ModelError where a file is missing, holds anything but tensors, or does not fit."""
    for name, take in ((OPTIMIZER, partial(engine.load_optimizer_state, optimizer)), (SCHEDULE, scheduler.load_state_dict)):
        path = folder / name
        try:
            take(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(path, f"cannot be continued from ({said[:200]})", "Use another checkpoint.") from None


def load_exact(model: nn.Module, folder: Path, engine: Engine) -> None:
    """Give an engine that computes in bfloat16 every digit of a whole model's checkpoint; an adapter's digits it has."""
    if not isinstance(model, PeftModel):
        engine.load_exact(model, load_file(folder / FULL_WEIGHTS))


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, with a name that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}.{index}")


def estimate_bytes(model: nn.Module) -> int:
    """Bytes of one checkpoint: the trained weights, two moments of each for Adam, and 256 KiB for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = sum(p.numel() * p.element_size() for p in (trained if isinstance(model, PeftModel) else model.parameters()))
    return saved + 2 * sum(p.numel() * p.element_size() for p in trained) + 256 * 1024
