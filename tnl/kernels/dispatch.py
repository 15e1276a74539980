"""The only door to the kernels: picks a backend once, says which, never falls back in silence."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tnl.kernels import reference
from tnl.kernels.deferred import Deferred
from tnl.kernels.lora import Draw

log = logging.getLogger(__name__)
BACKENDS = ("auto", "triton", "reference")
HALF_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


class AttentionNormGate(Protocol):
    def __call__(self, qkvu: Tensor, state: Any, mixer: reference.Mixer, rows: reference.Rows, /) -> tuple[Any, Any]: ...


class NormProject(Protocol):
    def __call__(
        self, x: Tensor, norm: reference.Projection, qkvu_proj: reference.Projection, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]: ...


class ProjectResidual(Protocol):
    def __call__(self, x: Any, projection: reference.Projection, residual: Tensor, draw: Draw | None = None, /) -> Tensor: ...


class NormGlu(Protocol):
    def __call__(
        self, x: Tensor, norm: reference.Projection, l1: reference.Projection, l2: reference.Projection, draw: Draw | None = None
    ) -> tuple[Any, Tensor]: ...


class Ops(NamedTuple):
    """The five operations of a layer and the loss, in one backend's form; what one operation hands the next is theirs alone."""

    backend: str
    norm_qkvu: NormProject
    attention_norm_gate: AttentionNormGate
    out_residual: ProjectResidual
    norm_glu: NormGlu
    l3_residual: ProjectResidual
    cross_entropy_: Callable[[Tensor, Tensor], Tensor] = reference.cross_entropy_
    """logits, targets -> loss; logits become the gradient."""


REFERENCE = Ops(
    "reference",
    reference.norm_qkvu,
    reference.attention_norm_gate,
    reference.out_residual,
    reference.norm_glu,
    reference.l3_residual,
)


def ops(backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 128) -> Ops:
    """The layer's operations for a model on `device`.

    auto: Triton on a GPU that runs it, else the reference forms; the log says which and why. head_dim: the largest key dim (twice
    the head's where LRPE is on). Raises ValueError for a backend that is none, or that cannot run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f'no backend is called "{backend}" (there are {", ".join(BACKENDS)})')
    place = torch.device(device)
    if backend == "reference" or (backend == "auto" and place.type != "cuda"):
        log.info("kernels: reference")
        return REFERENCE
    if hindrance := why_not_triton(place, dtype, head_dim):
        if backend == "triton":
            raise ValueError(f"backend triton cannot run here: {hindrance}. Take auto or reference")
        log.warning("kernels: reference, for Triton's cannot run here: %s", hindrance)
        return REFERENCE
    # triton is there on Linux alone, and importing its kernels takes a second
    from tnl.kernels import cross_entropy, triton_ops

    log.info("kernels: triton")
    return Ops(
        "triton",
        triton_ops.norm_qkvu,
        triton_ops.attention_norm_gate,
        triton_ops.out_residual,
        triton_ops.norm_glu,
        triton_ops.l3_residual,
        cross_entropy.cross_entropy_,
    )


class Answering(NamedTuple):
    """The Triton forms while a model answers (`step_ops`): without gradients, states and residual overwritten, no read by the host."""

    step: Ops
    """One token of many slots; `Rows.real` is False where a slot is to stay as it is."""
    read: Ops
    """The next chunk of one prompt, at the end of its row."""
    head: Callable[[Tensor, reference.Projection, reference.Projection], Tensor]
    """hidden [B, D], norm, head -> logits [B, vocabulary] float32."""
    draw: Callable[..., Tensor]
    """`draw.draw_`."""
    fold: Callable[[Deferred, Tensor, Tensor], None]
    """`deferred.fold_`."""


def answering(chosen: Ops) -> Answering:
    """The answering forms that belong to a model's operations, which are the Triton ones."""
    # see ops
    from tnl.kernels import draw, step_ops
    from tnl.kernels.lightning_step_gate import lightning_fold

    step = Ops(
        chosen.backend,
        step_ops.norm_qkvu,
        step_ops.attention_norm_gate,
        step_ops.out_residual,
        step_ops.norm_glu,
        step_ops.add_projection,
    )
    read = step._replace(norm_qkvu=step_ops.read_norm_qkvu, attention_norm_gate=step_ops.read_attention, norm_glu=step_ops.read_norm_glu)
    return Answering(step, read, step_ops.head, draw.draw_, lightning_fold)


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What keeps the Triton kernels from running, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"they need a GPU (the model is on {device.type})"
    if dtype not in HALF_AND_SINGLE:
        return f"they take bfloat16, float16 and float32 (the model is {str(dtype).removeprefix('torch.')})"
    if head_dim > 256:
        return f"they take key dims up to 256 (the model's is {head_dim})"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return ""


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU."""
    # see ops
    import triton

    return bool(triton.knobs.runtime.interpret)
