"""The only door to the kernels: picks a backend once, says which, never falls back in silence."""

import logging
from typing import NamedTuple, Protocol

from torch import Tensor

from tnl.kernels import reference

log = logging.getLogger(__name__)
BACKENDS = ("auto", "reference")


class AttentionNormGate(Protocol):
    """Signature of `reference.attention_norm_gate`."""

    def __call__(
        self,
        qkvu: Tensor,
        *,
        norm: reference.Projection,
        activation: str,
        rotary: tuple[Tensor, Tensor] | None,
        log_decay: Tensor,
        segment_start: Tensor | None,
        real: Tensor | None,
        lengths: Tensor | None,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


class NormProject(Protocol):
    def __call__(self, x: Tensor, norm: reference.Projection, qkvu_proj: reference.Projection) -> Tensor: ...


class ProjectResidual(Protocol):
    def __call__(self, x: Tensor, projection: reference.Projection, residual: Tensor, /) -> Tensor: ...


class NormGlu(Protocol):
    def __call__(self, x: Tensor, norm: reference.Projection, l1: reference.Projection, l2: reference.Projection) -> Tensor: ...


class Ops(NamedTuple):
    """The five operations of a layer, in one backend's form."""

    backend: str
    norm_qkvu: NormProject
    attention_norm_gate: AttentionNormGate
    out_residual: ProjectResidual
    norm_glu: NormGlu
    l3_residual: ProjectResidual


REFERENCE = Ops(
    "reference",
    reference.norm_qkvu,
    reference.attention_norm_gate,
    reference.out_residual,
    reference.norm_glu,
    reference.l3_residual,
)


def ops(backend: str = "auto") -> Ops:
    """The layer's operations for `backend`; `auto` takes the fastest that runs here. Raises ValueError for a name that is none."""
    if backend not in BACKENDS:
        raise ValueError(f'no backend is called "{backend}" (there are {", ".join(BACKENDS)})')
    log.info("backend: %s (asked for %s)", REFERENCE.backend, backend)
    return REFERENCE
