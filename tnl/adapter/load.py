"""Put a finished adapter on a model. All is checked first: a refused adapter leaves the model as it was, bit for bit."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from tnl import hub, paths
from tnl.adapter.gate import CONFIG, WEIGHTS, check_header, check_seal, expected_tensors, read_header, read_lora_config, read_tensors
from tnl.adapter.metadata import METADATA, Base, config_values, differences, read_adapter_metadata, read_json, weights_hash
from tnl.errors import ModelError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> PeftModel:
    """The model with the adapter of a local folder on it, in eval mode; adapters are float32.

    model: a TransnormerForCausalLM, changed in place, or a PeftModel that gets one more adapter under `name`.
    Raises ModelError, before the model is touched, for whatever is not exactly an adapter of this model.
    """
    folder = adapter_folder(folder)
    if not NAME.fullmatch(name):
        raise ModelError(folder, f"{name[:80]!r} cannot be an adapter's name", "Use 1 to 64 letters, digits, - and _")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ModelError(folder, f'the model has an adapter called "{name}" already', "Give it another name")
    # peft gives the matrices random values before ours: the caller's generator must not notice
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, tensors = read_adapter(model, folder)
        return attach(model, config, tensors, name).eval()


def attach(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], name: str) -> PeftModel:
    """Put checked tensors on the model; if that fails (no memory is left), the model is as it was."""
    adapted = model if isinstance(model, PeftModel) else None
    try:
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type,assignment]
        else:
            adapted.add_adapter(name, config)
        set_peft_model_state_dict(adapted, dict(tensors), adapter_name=name)
        landed = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        lost = [key for key, tensor in tensors.items() if key not in landed or not same(landed[key], tensor)]
        if lost or len(landed) != len(tensors):
            raise AssertionError(f"{len(lost)} of {len(tensors)} tensors did not arrive in the model ({lost[:3]})")
    except BaseException:
        with contextlib.suppress(Exception):
            if adapted is model:
                adapted.delete_adapter(name)
            elif adapted is not None:
                adapted.unload()
        raise
    assert adapted is not None
    return adapted


def read_adapter(model: nn.Module, folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and tensors of an adapter that is exactly one of this model; the model is only looked at. Raises ModelError."""
    check_seal(folder, (CONFIG, METADATA))
    metadata = read_adapter_metadata(folder)
    if metadata.base is not None:
        check_base(model, metadata.base, folder)
    config = read_lora_config(folder)
    expected = expected_tensors(model, config, folder / CONFIG)
    check_header(folder / WEIGHTS, read_header(folder / WEIGHTS), expected)
    check_seal(folder, (WEIGHTS,))
    return config, read_tensors(folder / WEIGHTS, expected)


def check_base(model: nn.Module, base: Base, folder: Path) -> None:
    """Refuse a model that is not the one that the adapter was trained on. Raises ModelError."""
    inner: Any = base_of(model)
    loaded = str(inner.name_or_path or "this model")
    found = differences(base.config, config_values(inner.config))
    where, todo = folder / METADATA, f"Load it on {base.name}, or give that with --base"
    if found:
        raise ModelError(where, f"the adapter was trained on {base.name} ({'; '.join(found[:3])}), not on {loaded}", todo)
    if inner.name_or_path and (own := hub.DEMO if loaded == "demo" else Path(loaded)).is_dir() and weights_hash(own) != base.weights:
        raise ModelError(where, f"the adapter was trained on {base.name}; {loaded} has the same sizes but other weights", todo)


def adapter_folder(folder: str | Path) -> Path:
    """The absolute folder of an adapter; a run's folder stands for its adapter. Raises ModelError, naming the nearest sibling."""
    path = paths.existing(folder, ModelError)
    if not path.is_dir():
        raise ModelError(path, "is a file (needed: the adapter's folder)", f"Name {path.parent}")
    if not (path / CONFIG).is_file() and (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    if not (path / CONFIG).is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise ModelError(path, f"holds no {CONFIG} (found {found})", "Name the folder of an adapter, or of a finished run")
    return path


def base_folder(folder: Path, override: str | None = None, source: hub.Hub = "huggingface") -> Path:
    """Where the base of the adapter in `folder` is: the override, or what its files name. Raises ModelError.

    source: the hub that is asked for owner/name, unless the files say which.
    """
    if override is not None:
        return hub.resolve(override, source)
    base = read_adapter_metadata(folder).base
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    word = config.get("base_model_name_or_path")
    if base is not None and (base.path == "demo" or not paths.looks_like_path(base.path)):
        return hub.resolve(base.path, base.hub, base.revision)  # type: ignore[arg-type]
    if base is not None:
        # beside the adapter, as it was when it was written; else where the recipe said
        for candidate in (folder / base.path, Path(str(word)) if word else folder / base.path):
            if (candidate / "config.json").is_file():
                return candidate.resolve()
        what = f"the base model, {base.name}, is no longer at {base.path} from here"
        raise ModelError(folder / METADATA, what, "Give its folder with --base FOLDER")
    if not isinstance(word, str) or not word.strip():
        raise ModelError(f"{folder / CONFIG}:base_model_name_or_path", "is missing", "Give the base model with --base FOLDER")
    if word != "demo" and paths.looks_like_path(word):
        for candidate in (paths.absolute(word), folder / word):
            if (candidate / "config.json").is_file():
                return candidate.resolve()
        what = f"names no model that is here ({word[:100]})"
        raise ModelError(f"{folder / CONFIG}:base_model_name_or_path", what, "Give the base model with --base FOLDER")
    return hub.resolve(word, source)


def base_of(model: nn.Module) -> Any:
    """The TransnormerForCausalLM inside a PeftModel, adapters in its modules; or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def same(landed: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor of a file stands in the model."""
    return torch.equal(landed.cpu(), tensor.to(landed.dtype))
