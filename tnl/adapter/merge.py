"""`tnl merge`: base and adapter as one model that needs no peft."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from tnl import hub, paths
from tnl.adapter.load import adapter_folder, base_folder, base_of, load_adapter
from tnl.adapter.metadata import describe, read_adapter_metadata, template_of, write_metadata
from tnl.errors import ModelError, NumbersError
from tnl.model.convert import HEAD, as_dtype, headers, weight_files
from tnl.model.load import load_model, load_tokenizer
from tnl.storage import require_space, staged, write_json

SHARD = 4 << 30
"""Bytes of one file of weights."""
PROBE = 64
"""Tokens that adapter and merged model are compared on."""
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of logits, as a share of the largest logit, beyond which the merged model is not written."""
LOST = 0.25
"""Share of what the adapter changes that rounding may take before a person is told."""


@dataclass(frozen=True)
class Report:
    """How far the merged model is from base and adapter, on a probe."""

    difference: float
    """Largest difference of two logits."""
    largest: float
    """The largest logit."""
    share: float
    """The difference as a share of what the adapter changes, both as root mean squares; infinite where it changes nothing."""
    same: float
    """Share of the probe's tokens after which both find the same next token most probable."""
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        share = "the adapter changes none" if math.isinf(self.share) else f"{self.share:.2%} of what the adapter changes"
        return (
            f"largest difference of logits between adapter and merged model: {self.difference:.2g} (the largest logit is "
            f"{self.largest:.3g}; {share}; most probable next token equal at {self.same:.0%} of {PROBE} positions; {dtype})"
        )


def run(run: str | Path, out: str | Path, dtype: str | None = None, base: str | None = None, source: hub.Hub | None = None) -> None:
    """Merge the adapter of a run (or an adapter's own folder, or owner/name) into its base and write the model to `out`.

    dtype: of the merged weights; None or auto is the base's own. base: where the base model is now; None: where the adapter says.
    source: the hub of an owner/name; None is huggingface.
    `out` must not exist, or be empty; it is there whole or not at all.
    Raises ModelError, NumbersError (not finite, or the merged model answers otherwise), StorageError.
    """
    target = free_folder(out)
    source = source or "huggingface"
    adapter = adapter_folder(hub.resolve(str(run), source))
    weights = base_folder(adapter, base, source)
    metadata = read_adapter_metadata(adapter)
    template = template_of(metadata, adapter)
    chosen = stored_dtype(weights) if dtype in (None, "auto") else as_dtype(dtype or "")
    tokenizer = load_tokenizer(weights)
    size = sum(math.prod(shape) * chosen.itemsize for file in weight_files(weights) for shape, _ in headers(file).values())
    require_space(target, size, "Free some space, or name a folder on another disk.")
    model = load_adapter(load_model(weights, dtype=chosen, device="cpu"), adapter)
    probe = torch.randint(3, len(tokenizer), (1, PROBE), generator=torch.Generator().manual_seed(0))
    before = logits_of(model, probe)
    with model.disable_adapter():
        bare = logits_of(model, probe)
    merged = merge(model)
    del model
    if target.is_dir():
        target.rmdir()
    with staged(target, {"kind": "merged model"}) as folder:
        save_model(merged, folder)
        tokenizer.save_pretrained(folder)
        save_generation(merged, metadata.generation, folder)
        del merged
        # what counts is what a reader of the folder gets
        report = compare(before, logits_of(load_model(folder, dtype=chosen, device="cpu"), probe), bare, chosen)
        described = describe(folder, str(folder), template=template, system=metadata.system, generation=metadata.generation)
        assert described.base is not None
        write_metadata(folder, replace(described, base=replace(described.base, path=".", name=target.name)))
    print(f"merged: {paths.shown(target)}")
    print(report)
    if LOST < report.share < math.inf and chosen != torch.float32:
        print("much of so small a change is lost to rounding: --dtype float32 keeps it, or leave the adapter beside its base")
    print(f"Talk to it: tnl chat {paths.quoted(target)}")


def free_folder(out: str | Path) -> Path:
    """The folder to write, which must not exist or be empty. Raises ModelError."""
    try:
        target = paths.absolute(str(out))
    except KeyError as error:
        raise ModelError(str(out), f"${error.args[0]} is not set", "Set it, or write the path out") from None
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ModelError(target, "is in the way (needed: a folder that does not exist)", "Name another one")
    if target.is_dir():
        found = sorted(entry.name for entry in target.iterdir())
        if found:
            raise ModelError(target, f"is not empty (found {', '.join(found[:3])})", "Name a folder that does not exist")
    return target


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a model folder's embedding."""
    found = [dtype for file in weight_files(folder) for name, (_, dtype) in headers(file).items() if name.endswith("embed_tokens.weight")]
    return found[0]


@torch.no_grad()
def merge(model: PeftModel) -> nn.Module:
    """The base with every adapted weight changed for good, one tensor at a time, each computed in float32.

    Raises ModelError for a quantised base, NumbersError where a merged weight is not finite.
    """
    untie(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            merge_layer(name.removeprefix("base_model.model."), module)
    merged: Any = model.unload()  # type: ignore[operator]
    head, embedding = merged.lm_head, merged.model.embed_tokens
    if merged.config.tie_word_embeddings and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
    else:
        merged.config.tie_word_embeddings = False
    merged.requires_grad_(False)
    return merged.eval()


def untie(model: nn.Module) -> None:
    """Give the head a weight of its own where it shares one that an adapter changes: the adapter changes one of the two."""
    if type(base_of(model).model.embed_tokens) is nn.Embedding and type(base_of(model).lm_head) is nn.Linear:
        return
    embeddings = [id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in embeddings:
            module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)


def merge_layer(name: str, module: Any) -> None:
    """Put one layer's adapter into its weights. Raises ModelError, NumbersError."""
    weights = module.get_base_layer()
    if not weights.weight.is_floating_point():
        raise ModelError(name, "is quantised, and merging into it would change the answers", "Merge into the 16-bit base")
    kept = {key: parameter.dtype for key, parameter in weights.named_parameters()}
    weights.float()
    try:
        module.merge(safe_merge=False)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(name, f"peft cannot merge it: {str(error).splitlines()[0]}", "Use the adapter unmerged") from None
    for key, parameter in weights.named_parameters():
        parameter.data = parameter.data.to(kept[key])
        if not bool(parameter.isfinite().all()):
            raise NumbersError(f"{name}.{key}", "is not finite once merged, so nothing was written", "Use an earlier checkpoint")


def save_model(model: Any, folder: Path) -> None:
    """Write config.json and safetensors in shards with an index, under the published names."""
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names})


def save_generation(model: Any, settings: dict[str, Any], folder: Path) -> None:
    """The base's generation settings, with those of the adapter's recipe in their place, for plain transformers."""
    config = model.generation_config
    # transformers refuses to save what greedy decoding would not look at
    idle = ("temperature", "top_k", "top_p") if settings.get("do_sample") is False else ()
    for name in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        if name in settings:
            setattr(config, name, None if name in idle else settings[name])
    config.save_pretrained(folder)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [1, T, V] float32 of the probe."""
    return model(input_ids=ids, use_cache=False).logits.float()


def compare(before: Tensor, after: Tensor, bare: Tensor, dtype: torch.dtype) -> Report:
    """The report on logits with the adapter, merged, and of the base alone.

    Raises NumbersError where the first two are further apart than rounding explains.
    """
    effect = float((before - bare).square().mean().sqrt())
    report = Report(
        difference=float((before - after).abs().max()),
        largest=float(before.abs().max()),
        share=float((before - after).square().mean().sqrt()) / effect if effect else math.inf,
        same=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        dtype=dtype,
    )
    if not report.difference <= BOUNDS.get(dtype, 1e-4) * max(report.largest, 1.0):
        raise NumbersError("", f"the merged model answers otherwise: {report}", "Merge with --dtype float32")
    return report
