"""Which modules an adapter goes on: names, patterns and LLaMA's names become an explicit list of this model's modules."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tnl.errors import ModelError
from tnl.paths import nearest

LLAMA_NAMES = {
    "q_proj": "qkvu_proj",
    "k_proj": "qkvu_proj",
    "v_proj": "qkvu_proj",
    "o_proj": "out_proj",
    "gate_proj": "l1",
    "up_proj": "l2",
    "down_proj": "l3",
}
PLAIN_NAME = re.compile(r"[\w.]+")
SECONDS_FOR_A_PATTERN = 5.0
# A pattern can run for ever inside C, where no alarm reaches it: it runs in a process of its own, without site packages.
MATCHER = """
import json, re, sys
job = json.load(sys.stdin)
try:
    found = [[name for name in job["names"] if re.fullmatch(pattern, name)] for pattern in job["patterns"]]
except (re.error, RecursionError, OverflowError) as error:
    found = str(error)
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True)
class Adaptable:
    """The modules that LoRA can go on, full name -> module, and the name of the output head among them."""

    modules: dict[str, nn.Module]
    head: str | None

    @property
    def counts(self) -> Counter[str]:
        """Last component of the name -> how many modules bear it."""
        return Counter(name.rpartition(".")[2] for name in self.modules)

    def named(self, word: str) -> list[str]:
        """Full names of the modules that a word of a list means, by peft's rule: the name itself or its end."""
        return [name for name in self.modules if name == word or name.endswith(f".{word}")]

    def shown(self) -> str:
        """The model's own names with their counts, for an error."""
        return ", ".join(f"{name} x{count}" for name, count in self.counts.items())


def adaptable(model: nn.Module) -> Adaptable:
    """Find every linear layer and embedding of a model that has no adapter yet."""
    head = getattr(model, "lm_head", None)
    modules = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    return Adaptable(modules, next((name for name, module in modules.items() if module is head), None))


def resolve(wanted: str | Sequence[str], found: Adaptable, where: str) -> tuple[list[str], list[str]]:
    """Full names of the wanted modules, and lines that say what was translated.

    wanted: names, in a list or between commas (each must match at least one module), a regular expression over full names, or
    all-linear (all but the head).
    Raises ModelError with the model's own names.
    """
    if wanted == "all-linear":
        return [name for name, module in found.modules.items() if isinstance(module, nn.Linear) and name != found.head], []
    if isinstance(wanted, str) and "," in wanted and all(PLAIN_NAME.fullmatch(word.strip()) for word in wanted.split(",")):
        wanted = [word.strip() for word in wanted.split(",")]  # as command lines of other tools take them
    if isinstance(wanted, str) and not PLAIN_NAME.fullmatch(wanted):
        names = match_patterns([wanted], list(found.modules), where)[0]
        if not names:
            raise ModelError(
                where, f'the pattern "{wanted}" matches no module (this model has {found.shown()})', "Mend it, or take all-linear."
            )
        return names, []
    words = [wanted] if isinstance(wanted, str) else list(wanted)
    translated = {word: LLAMA_NAMES[word] for word in words if word in LLAMA_NAMES and not found.named(word)}
    full: dict[str, None] = {}
    for word in words:
        names = found.named(translated.get(word, word))
        if not names:
            raise unknown(word, found, where)
        full.update(dict.fromkeys(names))
    return list(full), said(translated)


def unknown(word: str, found: Adaptable, where: str) -> ModelError:
    """The error for a name that no module bears."""
    near = nearest(word, list(found.counts))
    todo = f"Did you mean {near}? all-linear takes every linear layer." if near else "Name one of them, or all-linear."
    return ModelError(where, f'no module is called "{word}" (this model has {found.shown()})', todo)


def said(translated: dict[str, str]) -> list[str]:
    """One line for all names that were LLaMA's."""
    if not translated:
        return []
    pairs = ", ".join(f"{old} -> {new}" for old, new in translated.items())
    return [f"lora.target_modules: names of LLaMA, taken as this model's own: {pairs} (q, k, v and the gate u are one layer here)"]


def shortest(names: Iterable[str], found: Adaptable) -> list[str]:
    """The shortest list that means exactly these modules: an end of the name where all that bear it are meant, else full names."""
    names = set(names)
    listed: dict[str, None] = {}
    for name in found.modules:
        if name in names:
            last = name.rpartition(".")[2]
            listed[last if names.issuperset(found.named(last)) else name] = None
    return sorted(listed)


def match_patterns(patterns: Sequence[str], names: Sequence[str], where: str) -> list[list[str]]:
    """For each regular expression the names that it matches whole. Raises ModelError for one that is none, or does not end."""
    job = json.dumps({"patterns": list(patterns), "names": list(names)})
    command = [sys.executable, "-I", "-S", "-c", MATCHER]
    try:
        done = subprocess.run(
            command, input=job, capture_output=True, text=True, encoding="utf-8", timeout=SECONDS_FOR_A_PATTERN, check=True
        )
    except subprocess.TimeoutExpired:
        shown = ", ".join(f'"{pattern}"' for pattern in patterns)
        raise ModelError(
            where, f"matching {shown} took more than {SECONDS_FOR_A_PATTERN:g} s", "Write a simpler pattern, or a list."
        ) from None
    found = json.loads(done.stdout)
    if isinstance(found, str):
        raise ModelError(where, f"not a regular expression: {found}", "Mend it, or write a list of names.")
    return found
