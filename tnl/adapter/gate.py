"""What an adapter's folder must be before a byte of it reaches a model: settings from an allow-list, exactly the tensors they imply."""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tnl.adapter.metadata import read_json
from tnl.errors import ModelError
from tnl.storage import MANIFEST, digest, manifest_of

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
USED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "bias",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)
"""Keys that are handed to peft, each checked below."""
ABOUT = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "ensure_weight_tying",
    "qalora_group_size",
)
"""Keys that say where an adapter comes from, and decide nothing here."""
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "megatron_core": ("megatron.core", None),
    "fan_in_fan_out": (False,),
    "runtime_config": ({"ephemeral_gpu_offload": False}, None, {}),
}
NAME = re.compile(r"[\w.]{1,200}")
DTYPES = {"F32": 4, "BF16": 2, "F16": 2}
LARGEST = {"r": 16384, "lora_alpha": 1_000_000}
LARGEST_VALUE = 1e6
"""No trained adapter comes near it; larger ones overflow in float16 and bfloat16 products."""
HEADER_LIMIT = 4 << 20


def read_lora_config(folder: Path) -> LoraConfig:
    """The settings of the adapter in `folder`; nothing in them names code, runs a pattern or allocates. Raises ModelError."""
    file = folder / CONFIG
    values = read_json(file)
    if "peft_type" not in values:
        raise ModelError(file, "peft_type is missing (needed: LORA)", "Is it an adapter's folder?")
    for key, value in values.items():
        if key in FIXED:
            if value not in FIXED[key]:
                raise ModelError(
                    f"{file}:{key}", f"is {shown(value)} (needed: {shown(FIXED[key][0])})", "Only LoRA adapters of this form load"
                )
        elif key not in USED and key not in ABOUT and value not in (None, False, {}, []):
            raise ModelError(f"{file}:{key}", f"is {shown(value)}, which cannot be used here", "Export the adapter without it")
    check_numbers(file, values)
    check_names(folder, values)
    known = inspect.signature(LoraConfig).parameters
    used = {key: values[key] for key in USED if values.get(key) is not None}
    unknown = [key for key in used if key not in known]
    if unknown:
        raise ModelError(f"{file}:{unknown[0]}", "is not known to the installed peft", "Install a later peft")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**used, task_type="CAUSAL_LM", inference_mode=True)
    except (ValueError, TypeError) as error:
        raise ModelError(file, f"peft refuses it: {str(error).splitlines()[0]}", "Copy the file anew") from None


def check_numbers(file: Path, values: dict[str, Any]) -> None:
    """Hold the numbers against their ranges."""

    def whole(key: str, value: Any, most: int) -> None:
        number = isinstance(value, int) or (key == "lora_alpha" and isinstance(value, float) and math.isfinite(value))
        if not number or isinstance(value, bool) or not 0 < value <= most:
            raise ModelError(f"{file}:{key}", f"is {shown(value)} (needed: a number from 1 to {most:,})", "Do not trust the file")

    for key, most in LARGEST.items():
        whole(key, values.get(key, 8), most)
    for key, of in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = values.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{file}:{key}", f"is {shown(patterns)} (needed: an object)", "Copy the file anew")
        for name, value in patterns.items():
            # peft runs these as patterns on every module's name
            if not NAME.fullmatch(name.removeprefix("^").removesuffix("$")):
                raise ModelError(f"{file}:{key}", f"{shown(name)} is not the name of a module", "Patterns from a file are not run")
            whole(of, value, LARGEST[of])
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(values.get(key, False), bool):
            raise ModelError(f"{file}:{key}", f"is {shown(values[key])} (needed: true or false)", "Copy the file anew")
    dropout = values.get("lora_dropout", 0)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ModelError(f"{file}:lora_dropout", f"is {shown(dropout)} (needed: a number from 0 to below 1)", "Copy the file anew")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ModelError(f"{file}:bias", f"is {shown(values['bias'])} (needed: none, all or lora_only)", "Copy the file anew")


def check_names(folder: Path, values: dict[str, Any]) -> None:
    """Module names must be names: a pattern of somebody else's can run for ever."""
    file = folder / CONFIG
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        found = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in read_header(folder / WEIGHTS) if ".lora_" in name})
        todo = f"If you trust it, write the list of names instead: {json.dumps(found[:10])}"
        raise ModelError(f"{file}:target_modules", f"is a pattern, {shown(targets)}; patterns from a file are not run", todo)
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        names = values.get(key) or []
        if key == "target_modules" and names == "all-linear":
            continue
        if isinstance(names, str) and key == "layers_pattern":
            names = [names]
        if not isinstance(names, list) or not all(isinstance(name, str) and NAME.fullmatch(name) for name in names) or len(names) > 10_000:
            raise ModelError(f"{file}:{key}", f"is {shown(names)} (needed: a list of module names)", "Copy the file anew")
    if not targets and not values.get("modules_to_save") and not values.get("trainable_token_indices"):
        raise ModelError(f"{file}:target_modules", "is missing (needed: a list of module names)", "Copy the file anew")
    for key in ("layers_to_transform", "trainable_token_indices"):
        numbers = values.get(key)
        lists = list(numbers.values()) if isinstance(numbers, dict) and key == "trainable_token_indices" else [numbers]
        flat = [x for one in lists for x in (one if isinstance(one, list) else [one])]
        if numbers is not None and not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 24 for x in flat):
            raise ModelError(f"{file}:{key}", f"is {shown(numbers)} (needed: numbers from 0)", "Copy the file anew")


def expected_tensors(model: nn.Module, config: LoraConfig, file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that a file must hold for these settings on this model: asked of peft, on a twin without memory."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):
        twin = type(base)(base.config)
    linear = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    every = [name for name, _ in twin.named_modules()]
    for key, candidates in (("target_modules", linear), ("modules_to_save", every)):
        wanted = getattr(config, key) or []
        for word in [] if isinstance(wanted, str) else wanted:
            if not any(name == word or name.endswith(f".{word}") for name in candidates):
                own = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ModelError(f"{file}:{key}", f'this model has no module "{word}" (it has {own})', "It is an adapter of another model")
    for key in ("rank_pattern", "alpha_pattern"):
        for word in getattr(config, key):
            if not any(get_pattern_key([word], name) == word for name in linear):
                raise ModelError(f"{file}:{key}", f'this model has no module "{word}"', "It is an adapter of another model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(twin, config)
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ModelError(file, f"it does not fit this model: {str(error).splitlines()[0]}", "It is an adapter of another model") from None
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of a safetensors file, held against the file's size; no tensor is read. Raises ModelError."""
    todo = "Copy the file anew"
    if not file.is_file():
        if (file.parent / PICKLED).is_file():
            raise ModelError(file.parent / PICKLED, "is pickled, and pickles of adapters are not read", f"Get the adapter as {WEIGHTS}")
        raise ModelError(file, "there is no such file", "Copy the adapter's folder whole")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise ModelError(file, f"it is cut short, or no safetensors file ({size:,} bytes, header of {length:,})", todo)
        head = stream.read(length)
    try:
        entries = json.loads(head)
        entries.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            width = DTYPES.get(entry["dtype"])
            if width is None:
                raise ModelError(file, f"{name[:100]} is {entry['dtype']} (F32, BF16 or F16 is needed)", "Export the adapter anew")
            if start != end or stop - start != math.prod(shape) * width or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError
            found[name], end = (entry["dtype"], shape), stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(file, "its header is damaged", todo) from None
    if size != 8 + length + end:
        raise ModelError(file, f"it has {size:,} bytes, its header needs {8 + length + end:,}", todo)
    return found


def check_header(file: Path, found: dict[str, tuple[str, tuple[int, ...]]], expected: dict[str, tuple[int, ...]]) -> None:
    """Exactly the expected names and shapes, or a ModelError with counts and the first of each kind."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = []
    foreign = [name for name in unexpected if "lora_" not in name]
    if foreign:
        problems.append(f"it holds {len(foreign)} weights that are the base model's ({', '.join(name[:100] for name in foreign[:3])})")
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing ({', '.join(missing[:3])})")
    if len(unexpected) > len(foreign):
        strange = [name[:100] for name in unexpected if name not in foreign]
        problems.append(f"{len(strange)} tensors are unexpected ({', '.join(strange[:3])})")
    wrong = [name for name in expected if name in found and found[name][1] != expected[name]]
    if wrong:
        name = wrong[0]
        shapes = f"{name} is {list(found[name][1])}, model and {CONFIG} need {list(expected[name])}"
        problems.append(f"{len(wrong)} of {len(expected)} tensors have another shape ({shapes})")
    if problems:
        raise ModelError(file, "; ".join(problems), "It belongs to another base model or another adapter_config.json")


def read_tensors(file: Path, names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors, all finite and of sensible size. Raises ModelError."""
    tensors = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in names:
                tensors[name] = opened.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(file, f"it cannot be read as safetensors ({error})", "Copy the file anew") from None
    for name, tensor in tensors.items():
        largest = float(tensor.float().abs().max()) if tensor.numel() else 0.0
        if not largest <= LARGEST_VALUE:
            what = f"{name} holds a value of {largest:g}" if math.isfinite(largest) else f"{name} is not finite"
            raise ModelError(file, what, "The training went wrong: use an earlier checkpoint")
    return tensors


def check_seal(folder: Path, names: tuple[str, ...]) -> None:
    """Where a run has sealed the folder, the files that are read must be as it wrote them. Raises ModelError."""
    if not (folder / MANIFEST).is_file():
        return
    listed = manifest_of(folder)["files"]
    for name in names:
        path = folder / name
        if name not in listed:
            if path.is_file():
                raise ModelError(path, "is not in the manifest: it was added later", "Remove it, or use another adapter")
            continue
        if not path.is_file():
            raise ModelError(path, "is missing, though the manifest lists it", "Copy the folder whole")
        if digest(path) != listed[name]["sha256"]:
            raise ModelError(path, "is damaged (its SHA-256 is not that of the manifest)", "Copy the folder anew")


def shown(value: Any) -> str:
    """A value from a file, short."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
