"""Attach LoRA by peft: every field of LoraConfig by its own name, every name held against the model, adapters in float32."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tnl.errors import ModelError, RecipeError
from tnl.recipe.sections import LoraSection
from tnl.train.places import Where, at
from tnl.train.step import seed_all, seed_of
from tnl.train.targets import Adaptable, adaptable, match_patterns, resolve, shortest, unknown

REFUSED = {
    "auto_mapping": "it names code to import",
    "megatron_config": "it names code to import",
    "alora_invocation_tokens": "its adapter depends on where a phrase stands, which neither training nor chat here looks for",
    "arrow_config": "it routes between finished adapters; here one is made",
    "corda_config": "it needs the activations of the base before training, and changes the base",
    "eva_config": "it needs the activations of the base before training",
    "lora_ga_config": "it needs gradients of the base before training, and changes the base",
    "kasa_config": "it changes the base, so that the saved adapter would not fit the published one",
    "loftq_config": "it changes the base, so that the saved adapter would not fit the published one",
    "layer_replication": "peft knows the layers of other architectures only",
    "monteclora_config": "it adds a loss of its own",
    "use_qalora": "it needs a GPTQ base",
    "fan_in_fan_out": "this model's layers are stored the other way round",
    "target_parameters": "this model has modules for all its weights: name them in target_modules",
    "use_bdlora": "such an adapter cannot be loaded by tnl chat",
    "velora_config": "such an adapter cannot be loaded by tnl chat",
    "runtime_config": "it is about loading, not training",
    "inference_mode": "an adapter in inference mode is not trained",
}
"""Fields of LoraConfig that would do nothing here, or harm: field -> why."""

INITS = (True, False, "gaussian", "orthogonal")
METADATA = ("peft_type", "peft_version", "base_model_name_or_path", "revision", "megatron_core", "qalora_group_size")


@dataclass(frozen=True)
class TableRow:
    """One line of the table of trainable modules."""

    name: str
    layers: int
    parameters: int


def attach(model: nn.Module, section: LoraSection | None, where: Where, seed: int, say: Callable[[str], None]) -> nn.Module:
    """Return the model ready to train: a PeftModel with float32 adapters, or, with section None, every weight of it.

    where: the recipe's file, or its `where`, for errors. seed: where the adapters' first weights start. say: takes lines for the person.
    Works on a model of the meta device too. Raises RecipeError for a field that cannot act, ModelError for a name that fits no module.
    """
    if section is None:
        for p in model.parameters():
            p.requires_grad_(p.dtype == model.dtype)  # one dtype, as what shares weights out needs
        angles = "" if all(p.requires_grad for p in model.parameters()) else ", except the angles of positions, which stay in float32"
        say(f"lora: null: every weight is trained{angles}")
        return model
    config = make_config(model, section, where, say)
    seed_all(seed_of(seed, -1))
    try:
        # peft warns of what targets.resolve has made sure of, and asks transformers by a name that is going out of use
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(at(where, "lora"), f"peft refuses it: {first_line(error)}", "Change that field, or leave it out.") from error
    return peft_model


def make_config(model: nn.Module, section: LoraSection, where: Where, say: Callable[[str], None]) -> LoraConfig:
    """The LoraConfig, its names resolved to lists. Raises as attach."""
    fields = section.arguments()
    check_fields(fields, where)
    found = adaptable(model)
    targets, notices = resolve(fields.pop("target_modules") or "all-linear", found, at(where, "lora.target_modules"))
    for line in notices:
        say(line)
    if excluded := fields.get("exclude_modules"):
        gone, _ = resolve(excluded, found, at(where, "lora.exclude_modules"))
        targets = [name for name in targets if name not in set(gone)]
        del fields["exclude_modules"]  # what is left is listed: nothing remains to exclude
    targets = within_layers(targets, fields.pop("layers_to_transform", None), fields.pop("layers_pattern", None), where)
    if not targets:
        raise ModelError(at(where, "lora.target_modules"), "no module is left to adapt", "Exclude less.")
    for name in ("rank_pattern", "alpha_pattern"):
        if fields.get(name):
            fields[name] = resolve_pattern_keys(fields[name], targets, at(where, f"lora.{name}"))
    check_saved(fields.get("modules_to_save"), model, found, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            config = LoraConfig(**fields, target_modules=shortest(targets, found), task_type="CAUSAL_LM")
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(at(where, "lora"), f"peft refuses it: {first_line(error)}", "Change that field, or leave it out.") from error
    return config


def check_fields(fields: dict[str, Any], where: Where) -> None:
    """Refuse what cannot act, and drop what only describes a finished adapter."""
    for name in METADATA:
        fields.pop(name, None)
    task = fields.pop("task_type", None)
    if task not in (None, "CAUSAL_LM"):
        raise RecipeError(at(where, "lora.task_type"), f'"{task}" is another kind of model (needed: CAUSAL_LM)', "Leave it out.")
    for name, why in REFUSED.items():
        if fields.pop(name, None):
            raise RecipeError(at(where, f"lora.{name}"), f"cannot be used here: {why}", "Leave it out.")
    init = fields.get("init_lora_weights", True)
    if init not in INITS:
        why = "other ways change the base or need data beforehand, so that the saved adapter would not fit the published base"
        raise RecipeError(
            at(where, "lora.init_lora_weights"), f'"{init}" cannot be used here: {why}', "Take true, false, gaussian or orthogonal."
        )


def within_layers(targets: list[str], layers: int | list[int] | None, pattern: str | list[str] | None, where: Where) -> list[str]:
    """The targets that lie in the layers asked for; pattern names the module list that is counted (layers)."""
    if layers is None:
        if pattern:
            raise RecipeError(at(where, "lora.layers_pattern"), "needs layers_to_transform beside it", "Give both, or neither.")
        return targets
    wanted = {layers} if isinstance(layers, int) else set(layers)
    lists = [pattern] if isinstance(pattern, str) else pattern or [r"\w+"]
    if not all(re.fullmatch(r"\w+|\\w\+", word) for word in lists):
        raise RecipeError(at(where, "lora.layers_pattern"), "is not the name of a list of layers (in this model: layers)", "Leave it out.")
    indices = {name: re.search(rf"(?:^|\.)(?:{'|'.join(lists)})\.(\d+)(?:\.|$)", name) for name in targets}
    there = {int(match.group(1)) for match in indices.values() if match}
    missing = sorted(wanted - there)
    if missing:
        count = max(there, default=-1) + 1
        what = f"there is no layer {missing[0]} (this model's are 0 to {count - 1})" if there else "no target lies in a numbered layer"
        raise ModelError(at(where, "lora.layers_to_transform"), what, "Name layers that exist.")
    return [name for name, match in indices.items() if match and int(match.group(1)) in wanted]


def resolve_pattern_keys(patterns: dict[str, Any], targets: list[str], where: str) -> dict[str, Any]:
    """Full module name -> value, for a mapping whose keys are names or regular expressions as peft reads them; the first match counts."""
    for key, value in patterns.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(where, f'the value of "{key}" is {value!r} (needed: a positive integer)', "Mend it.")
    whole = [
        rf"(?:.*\.)?(?:{key.removeprefix('^').removesuffix('$')})" if not key.startswith("^") else key[1:].removesuffix("$")
        for key in patterns
    ]
    resolved: dict[str, Any] = {}
    for key, names in zip(patterns, match_patterns(whole, targets, where)):
        if not names:
            raise ModelError(where, f'"{key}" matches no adapted module', "Name one of lora.target_modules.")
        for name in names:
            resolved.setdefault(name, patterns[key])
    return resolved


def check_saved(wanted: list[str] | None, model: nn.Module, found: Adaptable, where: Where) -> None:
    """Every name in modules_to_save must be a module's."""
    everything = [name for name, _ in model.named_modules()]
    for word in wanted or []:
        if not any(name == word or name.endswith(f".{word}") for name in everything):
            raise unknown(word, found, at(where, "lora.modules_to_save"))


def table(model: nn.Module) -> list[TableRow]:
    """What is trained: one row a name, with how many layers bear it and how many parameters it has."""
    rows: dict[str, tuple[set[str], int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = module_of(name)
            layers, count = rows.setdefault(owner.rpartition(".")[2], (set(), 0))
            layers.add(owner)
            rows[owner.rpartition(".")[2]] = (layers, count + parameter.numel())
    return [TableRow(name, len(layers), count) for name, (layers, count) in rows.items()]


def module_of(parameter: str) -> str:
    """Full name of the base's module that a (trainable) parameter belongs to, whatever peft has wrapped around it."""
    name = parameter.removeprefix("base_model.model.")
    name = re.split(r"\.(?:lora_\w+|modules_to_save|original_module|token_adapter|base_layer)(?:\.|$)", name)[0]
    return name.removesuffix(".weight").removesuffix(".bias").removesuffix(".theta")


def adapter_matrices(model: nn.Module) -> list[str]:
    """Names of the parameters of which each must get a gradient: the matrices that LoRA added."""
    return [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the optimizer changes, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is trained, rather than every weight."""
    return isinstance(model, PeftModel)


def first_line(error: BaseException) -> str:
    """An exception's first line, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; a tied weight counts once."""
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)
