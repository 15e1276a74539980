"""What LoRA adds to a frozen linear layer: y = x W^T + s drop(x) A^T B^T (arXiv:2106.09685, sec. 4.1), with dropout by counter.

PEFT owns the modules and parameters; `lora_of` reads them. A dropout mask is no random stream but a function of the token's key,
the module and the column: batches, packed rows, segments and recomputation see the same mask, and nothing need be stored.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GOLDEN = 0x9E3779B1
"""2^32 over the golden ratio, odd: neighbours land far apart."""


class Draw(NamedTuple):
    """Where the dropout masks of one layer come from."""

    keys: Tensor  # [B, T] int32: one a token (`token_keys`)
    layer: int

    def module(self, slot: int) -> int:
        """Number of the layer's module: qkvu_proj 0, out_proj 1, l1 2, l2 3, l3 4."""
        return self.layer * 8 + slot


class Lora(NamedTuple):
    """A frozen linear layer and the adapter on it (a and b None: none)."""

    weight: Tensor  # [N, D]
    a: Tensor | None = None  # [R, D]
    b: Tensor | None = None  # [N, R]
    scale: float = 1.0
    dropout: float = 0.0


def lora_of(module: Any) -> Lora | None:
    """The parts of a module, or None where `hindrance` names why its own forward is needed."""
    if type(module) is nn.Linear:
        return None if module.bias is not None or module.weight.requires_grad else Lora(module.weight)
    if hindrance(module):
        return None
    weight = module.base_layer.weight
    if module.disable_adapters or module.merged:
        return Lora(weight)
    (name,) = module.active_adapters
    p = module.lora_dropout[name].p if module.training and isinstance(module.lora_dropout[name], nn.Dropout) else 0.0
    return Lora(weight, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], p)


def hindrance(module: Any) -> str:
    """Why an adapted module must run PEFT's own forward: the option that does it, or an empty string."""
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "lora_A"):
        return f"{type(module).__name__} is no LoRA on a linear layer"
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A:
        return f"{len(names)} active adapters"
    if names[0] in module.lora_variant:
        return f"{type(module.lora_variant[names[0]]).__name__.removesuffix('Variant')} (use_dora and its like)"
    if base.bias is not None or base.weight.requires_grad:
        return "a bias, or base weights that are trained"
    if module.lora_A[names[0]].bias is not None or module.lora_B[names[0]].bias is not None:
        return "lora_bias"
    return "a rank above 256" if module.r[names[0]] > 256 else ""


def project(module: Any, x: Tensor, draw: Draw | None, slot: int) -> Tensor:
    """The reference form: module(x), x [..., D], its dropout mask from `draw` where there is one."""
    lora = None if draw is None else lora_of(module)
    if draw is None or lora is None or lora.a is None or lora.b is None or not lora.dropout:
        return module(x)
    dropped = x.to(lora.a.dtype) * keep_mask(draw.keys, draw.module(slot), x.shape[-1], lora.dropout)
    return (module.base_layer(x) + (dropped @ lora.a.T @ lora.b.T) * (lora.scale / (1 - lora.dropout))).to(x.dtype)


def keep_mask(keys: Tensor, module: int, columns: int, p: float) -> Tensor:
    """[*keys, columns] bool: False where dropout of rate p takes an element; the definition of what the kernels compute."""
    row = _mix(keys + signed(module * GOLDEN))[..., None]
    column = _mix(torch.arange(1, columns + 1, dtype=torch.int32, device=keys.device))
    z = (row ^ column).mul_(0x7FEB352D)
    z ^= _shift(z, 15)
    z *= signed(0x846CA68B)
    return _shift(z, 1) >= threshold(p)


def token_keys(record: int, positions: Tensor) -> Tensor:
    """int32 keys of a record's tokens: record is any number of 32 bits, positions [T] count from its first token."""
    return _mix(positions.to(torch.int32) * signed(GOLDEN) + signed(record))


def threshold(p: float) -> int:
    """Numbers of 31 bits below it are dropped."""
    return round(p * 2**31)


def signed(x: int) -> int:
    """The low 32 bits of x, read as a signed number."""
    return (x + 2**31) % 2**32 - 2**31


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32, whose own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers whose every output bit depends on every input bit ("lowbias32")."""
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * signed(0x846CA68B)
    return x ^ _shift(x, 16)
