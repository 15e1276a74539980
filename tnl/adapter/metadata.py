"""What an adapter, or a merged model, says about itself: the base it belongs to, and how it was taught to be asked (tnl.json)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tnl import hub, paths
from tnl.data.template import TEMPLATES, Template
from tnl.errors import ModelError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.convert import HEAD, read_config, tensors, weight_files
from tnl.model.tokenization_baichuan import VOCAB_FILE
from tnl.storage import digest, write_json

METADATA = "tnl.json"
FORMAT = 1
JSON_LIMIT = 1 << 20
"""Bytes that a file of settings may have."""
SIZES = (
    "vocab_size",
    "decoder_embed_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "hidden_dim",
    "glu_dim",
    "linear_act_fun",
    "norm_type",
    "linear_use_lrpe_list",
    "bias",
    "no_scale_embedding",
    "tie_word_embeddings",
)
"""Keys of a config that decide what the model computes."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on."""

    path: str
    """demo, a repository (owner/name), or a folder relative to the one that tnl.json lies in."""
    name: str
    """For people."""
    config: dict[str, Any]
    weights: str
    """`weights_hash` of its folder."""
    tokenizer: str
    """SHA-256 of tokenizer.model."""
    hub: str = "huggingface"
    revision: str | None = None


@dataclass(frozen=True)
class Metadata:
    """tnl.json; an adapter of another tool has none, and every field is empty."""

    base: Base | None = None
    template: str | None = None
    template_hash: str | None = None
    system: str | None = None
    """The system prompt it was taught with."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Settings by the names of a recipe's generation section."""


def describe(
    folder: Path,
    base: str,
    *,
    hub_name: str = "huggingface",
    revision: str | None = None,
    template: Template | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Metadata:
    """The metadata of an adapter in `folder` that was trained on `base` (a folder, demo, or owner/name). Raises ModelError."""
    where = hub.resolve(base, hub_name, revision)  # type: ignore[arg-type]
    described = Base(
        path=base if base == "demo" or not paths.looks_like_path(base) else relative(where, folder),
        name=where.name if base != "demo" and paths.looks_like_path(base) else base,
        config=config_values(read_config(where)),
        weights=weights_hash(where),
        tokenizer=tokenizer_hash(where),
        hub=hub_name,
        revision=revision,
    )
    name, digest_ = (None, None) if template is None else (template.name, template.hash)
    return Metadata(described, name, digest_, system, dict(generation or {}))


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write tnl.json. Raises StorageError."""
    write_json(folder / METADATA, {"format": FORMAT, **asdict(metadata), "tnl_version": version("tnl")})


def read_adapter_metadata(folder: Path) -> Metadata:
    """Read tnl.json; empty where there is none. Raises ModelError where it is damaged or of a later format."""
    file = folder / METADATA
    if not file.is_file():
        return Metadata()
    values = read_json(file)
    if values.get("format") != FORMAT:
        raise ModelError(file, f"format is {values.get('format')!r} (needed: {FORMAT})", "Use the tnl that wrote it, or a later one")
    try:
        base = values.get("base")
        known = {name: values[name] for name in ("template", "template_hash", "system", "generation")}
        metadata = Metadata(None if base is None else Base(**base), **known)
        sound = all(isinstance(x, str | None) for x in (metadata.template, metadata.template_hash, metadata.system))
        sound &= isinstance(metadata.generation, dict)
        if metadata.base is not None:
            texts = (metadata.base.path, metadata.base.name, metadata.base.weights, metadata.base.tokenizer, metadata.base.hub)
            sound &= all(isinstance(x, str) for x in texts) and isinstance(metadata.base.config, dict)
            sound &= isinstance(metadata.base.revision, str | None)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise ModelError(file, "it does not hold what tnl writes there", "Copy the file anew; without it, give --base and --template")
    return metadata


def read_json(file: Path) -> dict[str, Any]:
    """A small file that holds one JSON object. Raises ModelError."""
    todo = "Copy the file anew"
    if not file.is_file():
        raise ModelError(file, *paths.missing(file))
    size = file.stat().st_size
    if size > JSON_LIMIT:
        raise ModelError(file, f"it has {size:,} bytes (at most {JSON_LIMIT:,} are sensible)", "Do not trust the file")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(file, f"it is not valid JSON ({str(error)[:100] or type(error).__name__})", todo) from None
    except OSError as error:
        raise ModelError(file, f"it cannot be read ({error.strerror})", "Mend its permissions") from None
    if not isinstance(values, dict):
        raise ModelError(file, f"it holds a {type(values).__name__} (an object is needed)", todo)
    return values


def template_of(metadata: Metadata, folder: Path) -> Template | None:
    """The template an adapter was taught with. Raises ModelError where this version has another, or none, of that name."""
    if metadata.template is None:
        return None
    template = TEMPLATES.get(metadata.template)
    file = folder / METADATA
    if template is None:
        raise ModelError(file, f'no template is called "{metadata.template[:60]}" (there are {", ".join(TEMPLATES)})', "Use a later tnl")
    if template.hash != metadata.template_hash:
        found = f"{str(metadata.template_hash)[:12]} there, {template.hash[:12]} here"
        what = f'the template "{template.name}" it was taught with is not this version\'s (hash {found})'
        raise ModelError(file, what, "Use the tnl that trained it, or train again")
    return template


def config_values(config: TransnormerConfig) -> dict[str, Any]:
    """What of a config decides the computation."""
    return {name: getattr(config, name) for name in SIZES}


def weights_hash(folder: Path) -> str:
    """One SHA-256 over samples of every tensor, as float32: the same whether the folder holds pickles or safetensors, shards or one
    file, float32 or bfloat16 of the same values. Reads about 16 KB a tensor."""
    tied = read_config(folder).tie_word_embeddings
    found: dict[str, bytes] = {}
    for file in weight_files(folder):
        for name, tensor in tensors(file):
            if (name == HEAD and tied) or name.endswith("lrpe.theta"):
                continue
            flat = tensor.flatten()
            if flat.numel() > 4096:
                starts = [(flat.numel() - 256) * i // 15 for i in range(16)]
                flat = torch.cat([flat[start : start + 256] for start in starts])
            found[name] = f"{name}{list(tensor.shape)}".encode() + flat.float().numpy().tobytes()
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(found[name])
    return total.hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.model; empty where it has none."""
    file = folder / VOCAB_FILE
    return digest(file) if file.is_file() else ""


def relative(folder: Path, start: Path) -> str:
    """The way from one folder to another, with /; absolute on another drive of Windows."""
    try:
        # Path.relative_to cannot go up before Python 3.12
        return Path(os.path.relpath(folder, start)).as_posix()
    except ValueError:
        return folder.as_posix()


def differences(trained: Mapping[str, Any], loaded: Mapping[str, Any]) -> list[str]:
    """What of two configs differs, as "decoder_layers 24, here 16"."""
    return [f"{name} {trained[name]}, here {loaded.get(name)}" for name in trained if trained[name] != loaded.get(name)]
