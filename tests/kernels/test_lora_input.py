"""A projection's input, what LoRA takes from it, and every gradient, against float64; where no card is, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from tnl.kernels.lora import keep_mask
from tnl.kernels.reference import simple_rms_norm

pytest.importorskip("triton")
from tnl.kernels.lora_input import Source, Thin, input_gradients, make_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
EPS = 1e-5


@pytest.fixture(autouse=True)
def empty_is_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kernel writes shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def keys(T: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (T,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def close(got: Tensor | None, want: Tensor, dtype: torch.dtype) -> bool:
    return got is not None and bool((got.double() - want).norm() <= BOUND[dtype] * want.norm())


def check(T: int, D: int, ranks: tuple[int, int], p: float, kind: str, dtype: torch.dtype) -> None:
    """make_input and input_gradients, twice, against autograd in float64; ranks: 0 for a projection without adapter."""
    wide = rand(T, 3 * D, dtype=dtype)
    x, u = wide[:, :D], None if kind == "norm" else wide[:, 2 * D :]
    source = Source(x, u, None if kind == "product" else EPS)
    thin = (
        Thin(rand(ranks[0], D, seed=2), p, 7) if ranks[0] else None,
        Thin(rand(ranks[1], D, seed=3), p / 2, 9) if ranks[1] else None,
    )
    g = [rand(T, r, seed=4 + r) if r else None for r in ranks]
    dz, residual = rand(T, D, dtype=dtype, seed=5), rand(T, D, dtype=dtype, seed=6) if kind == "norm" else None

    leaves = [y.double().requires_grad_() for y in (x, u) if y is not None]
    z = leaves[0] if kind == "product" else simple_rms_norm(leaves[0], EPS)
    z = z if u is None else z * leaves[1]
    factors = [t and t.a.double().requires_grad_() for t in thin]
    h = [None if t is None else (z * keep_mask(keys(T), t.module, D, t.dropout)) @ a.T for t, a in zip(thin, factors)]  # type: ignore[union-attr]
    loss = (z * dz).sum() + sum((y * of).sum() for y, of in zip(h, g) if y is not None)
    if residual is not None:
        loss = loss + (leaves[0] * residual).sum()
    wanted = torch.autograd.grad(loss, leaves + [a for a in factors if a is not None])

    def run() -> list[Tensor | None]:
        made, rstd, hidden = make_input(source, thin, keys(T))
        dx, du, da = input_gradients(source, rstd, thin, keys(T), hidden, g, dz, residual)
        nothing, none, alone = input_gradients(source, rstd, thin, keys(T), hidden, g, None, None)
        assert nothing is None and none is None and all(a is None or torch.equal(a, b) for a, b in zip(da, alone))  # type: ignore[arg-type]
        return [made, *hidden, dx, du, *da]

    found = run()
    for got, want in zip((y for y in found if y is not None), [z, *(y for y in h if y is not None), *wanted], strict=True):
        assert close(got, want.detach(), dtype)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, run()))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["norm", "norm_gate", "product"])
@pytest.mark.parametrize(("T", "D", "R"), [(1, 24, 1), (37, 300, 8), (20, 130, 16)])
def test_one_adapter(T: int, D: int, R: int, kind: str, p: float, dtype: torch.dtype) -> None:
    check(T, D, (R, 0), p, kind, dtype)


@pytest.mark.parametrize("ranks", [(8, 8), (3, 20), (0, 5), (64, 200)])
def test_two_adapters_read_one_input(ranks: tuple[int, int]) -> None:
    check(37, 90, ranks, 0.5, "norm", torch.float32)


@pytest.mark.parametrize("R", [64, 200, 256])
def test_large_ranks(R: int) -> None:
    check(21, 90, (R, 0), 0.5, "norm_gate", torch.float16)


@pytest.mark.parametrize("kind", ["norm", "norm_gate", "product"])
def test_without_adapters(kind: str) -> None:
    check(5, 40, (0, 0), 0.0, kind, torch.float32)


def test_long_rows_are_summed_in_pieces() -> None:
    check(300, 20, (4, 4), 0.5, "norm", torch.float32)


def test_a_gated_input_may_leave_the_range_of_float16_before_its_norm() -> None:
    x, u = 300 * rand(3, 40, dtype=torch.float16), 300 * rand(3, 40, dtype=torch.float16, seed=1)
    z, _, _ = make_input(Source(x, u, EPS), (None, None), None)
    assert close(z, simple_rms_norm(x.double(), EPS) * u.double(), torch.float16)
