"""Triton: SimpleRMSNorm, x rsqrt(mean(x^2) + eps), alone and times a gate; forward and backward in one pass over the rows each.

With r = rsqrt(mean(x^2) + eps) and y = r x: dx = r (dy - y mean(dy y)). Nothing but the inputs is kept for the backward pass.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 16384  # columns of a row, which one program holds


@triton.jit
def norm_kernel(x, u, y, s_x, s_u, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """y = norm(x), times u where there is one. Grid: rows."""
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m = o_d < D
    b_x = tl.load(x + i * s_x + o_d, mask=m, other=0.0).to(tl.float32)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)
    if u is not None:
        b_y *= tl.load(u + i * s_u + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(y + i * D + o_d, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def norm_backward_kernel(dy, x, u, dx, du, s_dy, s_x, s_u, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """dx, and du where there is a gate. Grid: rows."""
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m = o_d < D
    b_x = tl.load(x + i * s_x + o_d, mask=m, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + i * s_dy + o_d, mask=m, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)
    b_y = b_x * r
    if u is not None:
        tl.store(du + i * D + o_d, (b_dy * b_y).to(du.dtype.element_ty), mask=m)
        b_dy *= tl.load(u + i * s_u + o_d, mask=m, other=0.0).to(tl.float32)
    b_dx = r * (b_dy - b_y * (tl.sum(b_dy * b_y, 0) / D))
    tl.store(dx + i * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m)


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`reference.simple_rms_norm` over the last dim of x [..., D]. Raises ValueError for what the kernel cannot take."""
    check(x, x)
    return torch.ops.tnl.simple_rms_norm(x, eps)


def norm_gate(o: Tensor, u: Tensor, eps: float = 1e-6) -> Tensor:
    """u * norm(o), [..., D], in float32 and rounded once; u may be a view into a wider projection. Raises ValueError as above."""
    check(o, u)
    return torch.ops.tnl.norm_gate(o, u, eps)


def check(x: Tensor, u: Tensor) -> None:
    """Raise ValueError for arguments the kernels cannot take."""
    if x.shape != u.shape or x.device != u.device or x.dtype != u.dtype:
        raise ValueError(f"o is {tuple(x.shape)} {x.dtype} on {x.device}, u {tuple(u.shape)} {u.dtype} on {u.device}; they must agree")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the Triton kernels take bfloat16, float16 and float32 (the reference form takes any)")
    if x.dim() == 0 or x.numel() == 0 or x.shape[-1] > WIDEST:
        raise ValueError(f"x has shape {tuple(x.shape)}; no dim may be 0, and the last goes to {WIDEST}")


def _rows(x: Tensor) -> Tensor:
    """[..., D] to [rows, D] with neighbours side by side; a copy only where the strides allow no view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _options(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


def forward(x: Tensor, u: Tensor | None, eps: float) -> Tensor:
    """norm(x), times u where there is one, without checks and gradients."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = _rows(x)
    u = None if u is None else _rows(u)
    norm_kernel[(x.shape[0],)](x, u, y, x.stride(0), 0 if u is None else u.stride(0), eps, **_options(x.shape[1]))
    return y


def backward(dy: Tensor, x: Tensor, u: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, and of u where there is one."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    du = None if u is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy, x = _rows(dy), _rows(x)
    u = None if u is None else _rows(u)
    norm_backward_kernel[(x.shape[0],)](
        dy, x, u, dx, du, dy.stride(0), x.stride(0), 0 if u is None else u.stride(0), eps, **_options(x.shape[1])
    )
    return dx, du


@torch.library.custom_op("tnl::simple_rms_norm", mutates_args=())
def _norm(x: Tensor, eps: float) -> Tensor:
    return forward(x, None, eps)


@torch.library.custom_op("tnl::simple_rms_norm_backward", mutates_args=())
def _norm_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return backward(dy, x, None, eps)[0]


@torch.library.custom_op("tnl::norm_gate", mutates_args=())
def _gate(o: Tensor, u: Tensor, eps: float) -> Tensor:
    return forward(o, u, eps)


@torch.library.custom_op("tnl::norm_gate_backward", mutates_args=())
def _gate_backward(dy: Tensor, o: Tensor, u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return backward(dy, o, u, eps)  # type: ignore[return-value]


@_norm.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_gate.register_fake
def _(o: Tensor, u: Tensor, eps: float) -> Tensor:
    return o.new_empty(o.shape)


@_gate_backward.register_fake
def _(dy: Tensor, o: Tensor, u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), u.new_empty(u.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.tnl.simple_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


def _gate_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    do, du = torch.ops.tnl.norm_gate_backward(dy, *ctx.saved_tensors, ctx.eps)
    return do, du, None


_norm.register_autograd(_norm_gradient, setup_context=_save)
_gate.register_autograd(_gate_gradients, setup_context=_save)
