"""What MODEL_OR_RUN means: a run, an adapter, a model or a merged one, made ready to talk. Chat, generate and the server ask here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch

from tnl import hub, paths
from tnl.adapter.gate import CONFIG
from tnl.adapter.load import base_folder, base_of, load_adapter
from tnl.adapter.merge import merge
from tnl.adapter.metadata import METADATA, Metadata, read_adapter_metadata, read_json, template_of, tokenizer_hash
from tnl.data.template import TEMPLATES, Template
from tnl.errors import ModelError, RecipeError
from tnl.generate.conversation import Conversation
from tnl.generate.sampling import Settings
from tnl.model.load import load_model, load_tokenizer
from tnl.model.tokenization_baichuan import VOCAB_FILE, BaiChuanTokenizer
from tnl.recipe.sections import GenerationSection
from tnl.run_dir import RunDir, check_checkpoint, checkpoints

MODEL, WHOLE = "config.json", "model"
"""What a model's folder holds, and where a run that trained every weight keeps its result."""


class Options(TypedDict, total=False):
    """The options that chat and generate share; None or absent: what the adapter or model says."""

    system: str | None
    template: str | None
    temperature: float | None
    top_p: float | None
    max_new_tokens: int | None
    seed: int | None
    base: str | None
    hub: hub.Hub | None
    """Where owner/name is fetched from, of the base too where nothing else names its hub; None: huggingface."""
    device: str
    dtype: str


@dataclass
class Talker:
    """A model with all that is needed to ask it as it was taught."""

    model: Any
    tokenizer: BaiChuanTokenizer
    template: Template
    system: str | None
    settings: Settings
    name: str
    """For people: "output/huanhuan on TransNormerLLM-385M"."""
    seed: int | None = None
    notices: list[str] = field(default_factory=list)
    """What a person should know before the first answer, one line each."""
    adapter: Path | None = None
    """The folder of the adapter in the model; None: it has none."""

    def conversation(self) -> Conversation:
        """A new conversation; any number can share the model."""
        return Conversation(self.model, self.tokenizer, self.template, self.system, self.settings, self.seed)

    def merged(self) -> Any:
        """The model alone, its adapter merged in, as an engine takes it; changes it for good."""
        return self.model if base_of(self.model) is self.model else merge(self.model)


def resolve(word: str, options: Options | None = None) -> Talker:
    """Load what the word names: a run's folder, an adapter's, a model's (merged or not), demo, or a repository.

    Raises ModelError where it is none of these or its parts do not belong together, RecipeError for an option that cannot apply.
    """
    options = options or {}
    source = options.get("hub") or "huggingface"
    folder = hub.resolve(word, source)
    notices: list[str] = []
    adapter, whole = find(folder, notices)
    if adapter is None and options.get("base") is not None:
        raise RecipeError("--base", f"{word} is a model, not an adapter, and needs no base", "Leave --base out")
    weights = whole if adapter is None else base_folder(adapter, options.get("base"), source)
    taught = adapter or weights
    metadata = read_adapter_metadata(taught)
    template = choose_template(metadata, taught, options.get("template"), notices)
    tokenizer = load_own_tokenizer(weights, metadata, taught)
    model: Any = load_model(weights, dtype=options.get("dtype", "auto"), device=options.get("device", "auto"))
    if options.get("dtype", "auto") == "auto" and (model.device.type, model.dtype) == ("cpu", torch.bfloat16):
        notices.append("in float32 the weights do not fit this machine's memory: bfloat16 is used")
    if adapter is not None:
        model = load_adapter(model, adapter)
    settings = choose_settings(metadata, weights).changed(
        **{name: options.get(name) for name in ("temperature", "top_p", "max_new_tokens")}
    )
    system = metadata.system if options.get("system") is None else options["system"]
    name = word if adapter is None else f"{word} on {metadata.base.name if metadata.base else weights.name}"
    return Talker(model, tokenizer, template, system or None, settings, name, options.get("seed"), notices, adapter)


def find(folder: Path, notices: list[str]) -> tuple[Path | None, Path]:
    """The adapter that a folder is or holds, or None, and the folder of what was taught: the adapter's, or a whole model's.

    Of a run that is not finished, its newest checkpoint. Raises ModelError where the folder is none of these.
    """
    if (folder / MODEL).is_file():
        if (folder / CONFIG).is_file():
            notices.append(f"{folder.name} holds a model and an adapter: the model alone is used")
        return None, folder
    run = RunDir(folder)
    if (folder / WHOLE / MODEL).is_file() and not (run.adapter / CONFIG).is_file():
        return None, folder / WHOLE
    for place in (folder, run.adapter):
        if (place / CONFIG).is_file():
            return place, place
    for step, checkpoint in checkpoints(run):
        adapted = (checkpoint / CONFIG).is_file()
        if adapted or (checkpoint / MODEL).is_file():
            notices.append(f"the run is not finished: this is its checkpoint of step {step}")
            if not adapted:  # an adapter's seal is held against its files when it is loaded
                check_checkpoint(checkpoint, step)
            return checkpoint if adapted else None, checkpoint
    if run.metadata.is_file():
        raise ModelError(folder, "the run has saved nothing to talk to yet", f"Continue it: tnl resume {paths.quoted(folder)}")
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    runs = [str(entry) for entry in sorted(folder.iterdir()) if RunDir(entry).metadata.is_file()]
    todo = f"Did you mean {runs[0]}?" if runs else "A model has config.json, an adapter adapter_config.json"
    raise ModelError(folder, f"is no model, adapter or run (found {found})", todo)


def choose_template(metadata: Metadata, folder: Path, wanted: str | None, notices: list[str]) -> Template:
    """The template it was taught with; another is refused, and without a record chatml is taken. Raises ModelError, RecipeError."""
    taught = template_of(metadata, folder)
    if wanted is not None and wanted not in TEMPLATES:
        raise RecipeError("--template", f'no template is called "{wanted}"', f"There are {', '.join(TEMPLATES)}")
    if taught is None:
        if wanted is None:
            notices.append(f"no template is recorded in {folder.name}: chatml is used (--template takes another)")
        return TEMPLATES[wanted or "chatml"]
    if wanted not in (None, taught.name):
        what = f'it was taught with the template "{taught.name}", not "{wanted}"'
        raise ModelError(folder / METADATA, what, "Leave --template out")
    return taught


def load_own_tokenizer(weights: Path, metadata: Metadata, taught: Path) -> BaiChuanTokenizer:
    """The tokenizer of the base; refused where it is not the one that the adapter was trained with. Raises ModelError."""
    folder = weights
    if not (weights / VOCAB_FILE).is_file() and metadata.base is not None and weights == taught:
        folder = base_folder(taught)
    tokenizer = load_tokenizer(folder)
    if metadata.base is not None and metadata.base.tokenizer and tokenizer_hash(folder) != metadata.base.tokenizer:
        what = f"is not the tokenizer that {taught.name} was trained with"
        raise ModelError(folder / VOCAB_FILE, what, f"Copy {VOCAB_FILE} of {metadata.base.name} there")
    return tokenizer


def choose_settings(metadata: Metadata, weights: Path) -> Settings:
    """How answers are drawn: as the adapter says, else as the model's generation_config.json does, else as a recipe's defaults."""
    if metadata.generation:
        return Settings.of(metadata.generation)
    file = weights / "generation_config.json"
    if file.is_file():
        # what transformers takes where such a file is silent
        return Settings.of({"do_sample": False, "top_k": 50, "max_new_tokens": 512, **read_json(file)})
    return Settings.of(GenerationSection.model_validate({}).model_dump())
