"""From the files of a published folder to a model: every check of a checkpoint stands here, before a tensor reaches the model."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from tnl import hub, paths
from tnl.errors import ModelError
from tnl.model.configuration_transnormer import TransnormerConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Keywords of transformers' from_pretrained that change nothing here: no remote code, no pickle, no second cache.
IGNORED = {
    "trust_remote_code",
    "low_cpu_mem_usage",
    "use_safetensors",
    "weights_only",
    "attn_implementation",
    "code_revision",
    "adapter_kwargs",
    "offload_state_dict",
    "disable_mmap",
}


HUB_KEYWORDS = {
    "local_files_only": "Set HF_HUB_OFFLINE=1, or give the folder",
    "cache_dir": "Set HF_HOME, or give the folder that tnl download REPO --out FOLDER fills",
    "token": "Set HF_TOKEN, or run hf auth login",
    "use_auth_token": "Set HF_TOKEN, or run hf auth login",
    "force_download": "Files are held against their checksums; give an empty folder to tnl download REPO --out FOLDER",
    "proxies": "Set HTTPS_PROXY",
}
"""Keywords about a download: true of every folder that is here, refused for a repository, with what to do instead."""


def from_pretrained(cls: Any, path: str | Path, **kwargs: Any) -> Any:
    """What TransnormerForCausalLM.from_pretrained does; its docstring says what."""
    kwargs = {key: value for key, value in kwargs.items() if key not in IGNORED and not key.startswith("_")}
    dtype, config = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", "auto"), kwargs.pop("config", None)
    mapped = kwargs.pop("mapped", False)
    device_map, backend, max_memory = kwargs.pop("device_map", None), kwargs.pop("backend", "auto"), kwargs.pop("max_memory", None)
    asked = {key: kwargs.pop(key, None) for key in HUB_KEYWORDS}
    if (refused := next((key for key, value in asked.items() if value), None)) and not is_here(path):
        raise ModelError(str(path), f"{refused} cannot be taken for a repository", HUB_KEYWORDS[refused])
    if max_memory is not None and not isinstance(device_map, str):
        raise ModelError(str(path), "max_memory is for a device_map that is worked out", 'Add device_map="auto"')
    folder = hub.resolve(str(path), kwargs.pop("hub", "huggingface"), kwargs.pop("revision", None))
    if kwargs.pop("quantization_config", None) is not None:
        raise ModelError(folder, "a quantised base is not supported", "Leave quantization_config out")
    if not isinstance(config, TransnormerConfig):
        config = read_config(folder if config is None else Path(config))
    for key, value in kwargs.items():
        if not hasattr(config, key):
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {key!r}")
        setattr(config, key, value)
    with torch.device("meta"):
        model = cls(config)
    spreading = spreads(device_map) or max_memory is not None
    device = torch.device("cpu") if spreading else pick_device(device_map)
    fill(model, folder, None if dtype in ("auto", None) else as_dtype(dtype), device, mapped)
    generation = folder / "generation_config.json"
    model.generation_config = (
        GenerationConfig.from_pretrained(folder) if generation.is_file() else GenerationConfig.from_model_config(config)
    )
    model.name_or_path = config.name_or_path = str(path)
    model.model.pick_kernels(backend)
    model.eval()
    return spread(model, device_map, max_memory) if spreading else model


def is_here(path: str | Path) -> bool:
    """Whether a model's name means a folder of this machine, or the demo base."""
    return str(path) == "demo" or paths.looks_like_path(str(path))


def read_config(folder: Path) -> TransnormerConfig:
    """The folder's config.json; a missing model_type is mended, another model's is refused."""
    file = folder / "config.json" if folder.is_dir() else folder
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(folder, "this is an adapter, not a model", "Give the model it was trained on as model.path")
        raise ModelError(file, "there is no such file", "A model folder needs config.json, the weights and tokenizer.model")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(file, f"it is not valid JSON ({error})", "Copy the file anew from where the model was published") from None
    if not isinstance(values, dict):
        raise ModelError(file, f"it holds a {type(values).__name__} (an object is needed)", "Copy the file anew")
    if values.setdefault("model_type", "transnormer") != "transnormer":
        raise ModelError(file, f'model_type is "{values["model_type"]}" (transnormer is needed)', "Give a TransNormerLLM folder")
    try:
        return TransnormerConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ModelError(file, str(error).replace("\n", " "), "Copy the file anew from where the model was published") from None


def fill(model: Any, folder: Path, dtype: torch.dtype | None, device: torch.device, mapped: bool = False) -> None:
    """Give a model made on the meta device the folder's tensors, on `device` and in `dtype` (None: the checkpoint's own).

    mapped: what needs no conversion stays in the file, from which it is read when it is used.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = bool(model.config.tie_word_embeddings)
    files = weight_files(folder)
    check_keys(folder, {file: headers(file) for file in files}, expected, optional={HEAD} if tied else set())
    finite: dict[str, Tensor] = {}
    head = None
    for file in files:
        for name, tensor in tensors(file):
            target = torch.float32 if name.endswith("lrpe.theta") else dtype or tensor.dtype
            value = tensor.to(device, target, copy=not mapped)
            # a sum is finite where its terms are, and forty times faster on a CPU than isfinite; that of float16 would overflow
            finite[f"{file.name}: {name}"] = value.sum(dtype=torch.float32 if target == torch.float16 else target).isfinite()
            if name == HEAD and tied:
                head = value
                continue
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(value))
    if not torch.stack([flag.cpu() for flag in finite.values()]).all():
        bad = [name for name, flag in finite.items() if not flag]
        raise ModelError(folder, f"{len(bad)} tensors are not finite ({'; '.join(bad[:5])})", "Copy the weights anew")
    # a tied model may bring its head along, as long as it is the embedding
    if head is not None and not torch.equal(model.get_parameter(EMBEDDING), head):
        raise ModelError(folder, f"{HEAD} differs from {EMBEDDING}, though the config ties them", "Set tie_word_embeddings: false")
    for layer in model.model.layers:
        layer.token_mixer.reset_decay(device)
    model.tie_weights()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before pickled, the index before a single file."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return [folder / name for name in shard_names(index)]
        if (folder / single).is_file():
            return [folder / single]
    if (folder / "trainer_state.json").is_file():
        raise ModelError(folder, "this is a training checkpoint, not a model", "Give the model it was trained on")
    raise ModelError(folder, "there are no weights (model.safetensors or pytorch_model.bin, or their index)", "Download the folder whole")


def shard_names(index: Path) -> list[str]:
    """The shards an index names, each a plain file beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(index, "it has no weight_map of tensor names to files", "Copy the file anew") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(index, f"{name!r} is not the name of a file beside it", "Copy the file anew")
        if not (index.parent / name).is_file():
            raise ModelError(index, f"the shard {name} is missing", "Download the folder whole")
    if not names:
        raise ModelError(index, "it names no shard", "Copy the file anew")
    return names


def check_keys(
    folder: Path,
    found: dict[Path, dict[str, tuple[tuple[int, ...], torch.dtype]]],
    expected: dict[str, tuple[int, ...]],
    optional: set[str],
) -> None:
    """Hold names, shapes and dtypes against the config's; the first five of each kind are named."""
    seen: dict[str, Path] = {}
    problems = []
    for file, tensors_ in found.items():
        for name, (shape, dtype) in tensors_.items():
            if name in seen:
                problems.append(f"{name} stands in {seen[name].name} and {file.name}")
            seen[name] = file
            if name in expected and shape != expected[name]:
                problems.append(f"{file.name}: {name} has shape {list(shape)}, the config needs {list(expected[name])}")
            if dtype not in DTYPES:
                problems.append(f"{file.name}: {name} is {str(dtype).removeprefix('torch.')} (float32, bfloat16 or float16 is needed)")
    missing = sorted(set(expected) - set(seen) - optional)
    unexpected = sorted(set(seen) - set(expected))
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing ({', '.join(missing[:5])})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected ({', '.join(unexpected[:5])})")
    index = next(iter(folder.glob("*.index.json")), None) if len(found) > 1 else None
    if index is not None:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        lost = [name for name, file_name in listed.items() if name in seen and seen[name].name != file_name]
        problems += [f"{index.name} looks for {name} in the wrong shard" for name in lost[:1]]
    if problems:
        raise ModelError(folder, "; ".join(problems[:5]), "The weights do not belong to this config.json: download the folder whole")


def headers(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name to shape and dtype of every tensor in a file, no tensor read."""
    if file.suffix == ".safetensors":
        with open_safetensors(file) as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(s.get_shape()), SAFETENSORS_DTYPES.get(s.get_dtype(), torch.int8)) for name, s in slices.items()}
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_pickled(file).items()}


def tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file in turn; host memory holds one file at most."""
    if file.suffix == ".safetensors":
        with open_safetensors(file) as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                yield name, f.get_tensor(name)
    else:
        yield from load_pickled(file).items()


SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(file, f"it cannot be read as safetensors ({error})", "Download the file anew") from None


def load_pickled(file: Path) -> dict[str, Tensor]:
    """A pickled state dict: tensors alone, nothing executed, mapped and not read; bombs are refused by their headers."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError):
        raise ModelError(file, f"it is no PyTorch archive, or cut short ({file.stat().st_size} bytes)", "Download the file anew") from None
    if packed:
        raise ModelError(file, f"it is in compressed storage ({packed[0]})", "PyTorch never writes that: do not trust the file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = (
            f"it holds {name.group(1)}, which is no tensor; nothing was executed" if name else f"it cannot be read ({type(error).__name__})"
        )
        raise ModelError(file, found, "Do not trust the file: get the weights as safetensors") from None
    if not isinstance(state, dict):
        raise ModelError(file, f"it holds a {type(state).__name__} (names to tensors are needed)", "Download the file anew")
    for name, tensor in state.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise ModelError(file, f"{name!r} is a {type(tensor).__name__}, which is no tensor", "Get the weights as safetensors")
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
            raise ModelError(file, f"{name} claims more elements than it stores", "Do not trust the file: get the weights as safetensors")
    return state


def spreads(device_map: Any) -> bool:
    """Whether a device_map asks for more than one device."""
    if device_map == "auto":
        return torch.cuda.device_count() > 1
    if isinstance(device_map, dict):
        return len(set(device_map.values())) > 1
    return device_map in ("balanced", "balanced_low_0", "sequential")


def pick_device(device_map: Any) -> torch.device:
    """Where to load to: the one device that a device_map names, or the CPU."""
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(next(iter(device_map.values())) if isinstance(device_map, dict) else device_map)


def spread(model: Any, device_map: Any, max_memory: dict[Any, Any] | None = None) -> Any:
    """Layers over several devices, by accelerate; max_memory: device -> bytes, or words such as 10GiB. Raises ModelError: too little."""
    # accelerate costs a second to import and only a spread model needs it
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        blocks = list(model._no_split_modules)
        memory = get_balanced_memory(model, max_memory, no_split_module_classes=blocks)
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
        if "disk" in device_map.values():
            left = sum(place == "disk" for place in device_map.values())
            raise ModelError(model.name_or_path, f"max_memory has no room for {left} of its modules", "Allow more, or name more devices")
    return dispatch_model(model, device_map=device_map)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch.bfloat16 from itself or from "bfloat16"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (*DTYPES, torch.float64):
        raise ModelError("", f"{dtype} is no dtype for a model (float32, bfloat16, float16)", "Take one of them, or auto")
    return found
