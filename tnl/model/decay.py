"""How fast each head of each layer forgets."""

import math

import torch
from torch import Tensor


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes for `heads` heads (arXiv:2108.12409, sec. 3); interleaved where heads is no power of two."""
    if heads & (heads - 1) == 0:
        ratio = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
        return [ratio ** (h + 1) for h in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return slopes(power) + slopes(2 * power)[0::2][: heads - power]


def log_decay(heads: int, layer: int, layers: int) -> Tensor:
    """[H] float32, negative: logarithm of what one token multiplies a head's state by (arXiv:2307.14995, eq. 4).

    Deeper layers forget less: the slope is scaled by 1 - layer / (layers - 1) + 1e-5, so the last layer hardly decays.
    """
    factor = 1 + 1e-5 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
    return -torch.tensor(slopes(heads), dtype=torch.float64).mul(factor).float()
