"""Cross entropies and their gradient in place, in both forms, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from tnl.kernels import reference

pytest.importorskip("triton")

from tnl.kernels import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 1e-6), (torch.float16, 1e-3), pytest.param(torch.bfloat16, 8e-3, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("form", [reference.cross_entropy_, cross_entropy.cross_entropy_])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (7, 4096), (3, 9000)])
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_losses_and_gradient(form: object, rows: int, vocabulary: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(rows)
    logits = (torch.randn(rows, vocabulary, device=DEVICE) * 8).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[rows // 2 + 1 :: 3] = reference.IGNORED
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    (grad,) = torch.autograd.grad(expected, exact)
    found = form(logits, targets)  # type: ignore[operator]
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float((logits.double() - grad).norm() / grad.norm()) < bound
    assert not logits[targets == reference.IGNORED].any()


def test_numbers_that_are_not_finite_stay_so() -> None:
    logits = torch.zeros(2, 10, device=DEVICE)
    logits[1, 3] = float("nan")
    for form in (reference.cross_entropy_, cross_entropy.cross_entropy_):
        assert form(logits.clone(), torch.tensor([1, 2], device=DEVICE)).isnan()
