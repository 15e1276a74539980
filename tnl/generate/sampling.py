"""From logits to the next token: pure functions on [B, V], every row with its own history and its own generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tnl.errors import NumbersError


@dataclass(frozen=True)
class Settings:
    """How an answer is drawn, by the names of transformers.GenerationConfig; presence and frequency penalty as the OpenAI API has them."""

    max_new_tokens: int = 512
    """Tokens an answer may have."""
    do_sample: bool = True
    """False always takes the most probable token."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is the same as do_sample: false."""
    top_k: int = 0
    """Draw from this many of the most probable tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this share."""
    min_p: float = 0.0
    """Leave out tokens less probable than this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided (where negative, multiplied) by it."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that stand in the answer."""
    frequency_penalty: float = 0.0
    """Taken from them once for each time they do."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From a recipe's generation section or a generation_config.json; other keys and nulls are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    def changed(self, **values: Any) -> Settings:
        """With those values that are not None; a temperature says whether to draw at all."""
        given = {name: value for name, value in values.items() if value is not None}
        if "temperature" in given:
            given["do_sample"] = given["temperature"] > 0
        return replace(self, **given)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return not self.do_sample or self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether it matters what has stood before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass
class History:
    """Which tokens each row has seen: what penalties look at."""

    seen: Tensor  # [B, V] bool: in prompt or answer
    counts: Tensor  # [B, V] int32: times in the answer

    @classmethod
    def start(cls, prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device | str) -> History:
        """One row a prompt, nothing answered yet."""
        seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            seen[row, torch.tensor(sorted(set(ids)), dtype=torch.long)] = True
        return cls(seen.to(device), torch.zeros(len(prompts), vocabulary, dtype=torch.int32, device=device))

    def add(self, ids: Tensor) -> None:
        """Count each row's next token [B], in place."""
        self.seen.scatter_(1, ids[:, None], True)
        self.counts.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None], dtype=torch.int32))


def seeded(seed: int | None) -> torch.Generator:
    """A generator of a request's own, on the CPU whatever the device; None: from the system's randomness."""
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def sample(logits: Tensor, settings: Settings, history: History | None, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, [B] int64.

    logits: [B, V], of any float dtype. history: needed where the settings penalise. generators: one a row; greedy takes none.
    Raises NumbersError where a row holds NaN or infinity.
    """
    logits = logits.float()
    check_finite(logits)
    if settings.penalises:
        if history is None:
            raise ValueError("penalties need a history")
        logits = penalise(logits, settings, history)
    if settings.greedy:
        return logits.argmax(-1)
    return draw(warp(logits, settings).softmax(-1), generators)


def finite_rows(logits: Tensor) -> Tensor:
    """[B] bool: rows of [B, V] without NaN or infinity, so that an engine can end the others alone."""
    return logits.isfinite().all(-1)


def check_finite(logits: Tensor) -> None:
    """Raise NumbersError naming the rows that are not finite: argmax would call them token 0, multinomial fail for all rows."""
    fine = finite_rows(logits)
    if not bool(fine.all()):
        rows = (~fine).nonzero().flatten().tolist()
        what = "the model's logits are not finite" + (f" (rows {rows})" if len(fine) > 1 else "")
        raise NumbersError("", what, "Use dtype float32, or an adapter from before the loss went wrong")


def penalise(logits: Tensor, settings: Settings, history: History) -> Tensor:
    """Logits [B, V] after the three penalties."""
    factor = settings.repetition_penalty
    if factor != 1:
        logits = torch.where(history.seen, torch.where(logits < 0, logits * factor, logits / factor), logits)
    if settings.presence_penalty or settings.frequency_penalty:
        logits = logits - settings.presence_penalty * (history.counts > 0) - settings.frequency_penalty * history.counts
    return logits


def warp(logits: Tensor, settings: Settings) -> Tensor:
    """Logits [B, V] with temperature, top_k, top_p and min_p applied in that order; what is left out is -inf."""
    if settings.temperature != 1:
        logits = logits / settings.temperature
    V = logits.shape[-1]
    if 0 < settings.top_k < V:
        smallest = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if settings.top_p < 1:
        ordered, index = logits.sort(dim=-1)
        # the most probable token always stays
        out = ordered.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(1, index, out), -torch.inf)
    if settings.min_p > 0:
        probable = logits.softmax(-1)
        logits = logits.masked_fill(probable < settings.min_p * probable.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row of [B, V] by one uniform number from each row's generator: no row's draw depends on its neighbours or the device."""
    uniform = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    # float64, but for Apple's MPS, which has none
    exact = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.to(exact).cumsum(-1)
    # a point strictly below the sum falls into a token whose probability is not 0
    point = uniform.to(probabilities.device, exact) * cumulative[:, -1]
    found = torch.searchsorted(cumulative, point[:, None], right=True).flatten()
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found, last)
