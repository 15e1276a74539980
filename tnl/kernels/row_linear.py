"""A frozen projection with a low-rank update that each row chooses for itself: several adapters in one batch."""

from dataclasses import dataclass

from torch import Tensor

from tnl.kernels.reference import Projection


@dataclass(frozen=True)
class RowLinear:
    """y = W x + B[row] A[row] x, each row of x [B, T, in] (or [B, in]) with matrices of its own. The step forms read its fields."""

    project: Projection
    A: Tensor  # [adapters, R, in]; R a power of two
    B: Tensor  # [adapters, out, R]
    rows: Tensor  # [B] of any number type: each row's adapter

    def __call__(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return y + self.delta(x).view_as(y).to(y.dtype)

    def delta(self, x: Tensor) -> Tensor:
        """B[row] A[row] x alone, in the matrices' dtype: [B, T, out], T 1 where x has none."""
        wide = x if x.dim() == 3 else x[:, None]
        rows = self.rows.long()
        a, b = self.A.index_select(0, rows), self.B.index_select(0, rows)
        return (wide.to(a.dtype) @ a.transpose(1, 2)) @ b.transpose(1, 2)
