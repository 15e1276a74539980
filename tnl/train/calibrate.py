"""How long a step takes here, from a few seconds with one and with two layers of the model's width."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tnl import host
from tnl.evaluate.perplexity import causal_lm
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.recipe.sections import LoraSection
from tnl.train import plan, recomputation
from tnl.train.recomputation import Level
from tnl.train.step import Rows, forward_backward

CPU_WORK = 3e10
"""Operations that one timing may take on a CPU: its rows are shortened to that."""
ROUNDS = 3
"""Timings of each, after one that fills caches; the shortest counts."""
MEMORY_SHARE = 0.25
"""Of a CPU's free memory, what two layers may take."""


@dataclass(frozen=True)
class Speed:
    """Seconds a token of the whole model."""

    backward: float
    """Forward and backward."""
    forward: float
    """Forward alone, without gradients."""

    def seconds(self, tokens: int, segment_length: int | None = None, every: int = 1) -> float:
        """Of a row; one that is longer than a segment is read forward once more, and again where only every so many states are kept."""
        streamed = segment_length is not None and tokens > segment_length
        return tokens * (self.backward + (self.forward * (2 - 1 / every) if streamed else 0.0))


def measure(
    config: TransnormerConfig,
    section: LoraSection | None,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    tokens: int,
    level: Level,
) -> Speed | None:
    """Time rows of `tokens` tokens, fewer on a CPU. None where not even two layers have room."""
    times: dict[int, tuple[float, float]] = {}
    if device.type == "cpu":
        tokens = max(min(tokens, int(CPU_WORK / (6 * parameters(config, 2)))), 16)
        if parameters(config, 2) * 8 > MEMORY_SHARE * host.available():
            return None
    try:
        for layers in (1, 2):
            model = plan.shallow_model(config, layers, section and plan.everywhere(section), dtype, str(device), backend)
            fill(model)
            recomputation.use(model, level)
            times[layers] = timed(model, tokens, device)
    except torch.OutOfMemoryError:
        return None
    more = config.decoder_layers - 1
    whole = [one + more * max(two - one, 0.0) for one, two in zip(times[1], times[2])]
    return Speed(whole[0] / tokens, whole[1] / tokens)


def timed(model: nn.Module, tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a row forward and backward, and forward alone."""
    ids = torch.randint(config_of(model).vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    record = {"id": "calibration", "input_ids": ids, "labels": ids}
    x = torch.tensor([ids], device=device)

    def both() -> None:
        forward_backward(model, Rows(tokens), [record], tokens)
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        causal_lm(model).model(x, use_cache=True)

    return shortest(both, device), shortest(forward, device)


def shortest(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the quickest of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights: zeros would be computed faster than a model's, and their norms not at all."""
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(std=0.02)


def config_of(model: nn.Module) -> TransnormerConfig:
    config: TransnormerConfig = causal_lm(model).config
    return config


def parameters(config: TransnormerConfig, layers: int) -> int:
    """Weights of so many layers and of the embedding."""
    D, E, G = config.decoder_embed_dim, config.hidden_dim, config.glu_dim
    return config.vocab_size * D + layers * (5 * D * E + 3 * D * G)
