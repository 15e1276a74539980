import pytest
import torch
import torch.nn.functional as F

from tnl.kernels.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("rows", (1, 7, 64, 65))
@pytest.mark.parametrize("frozen", (False, True))
def test_sum_and_gradients_equal_the_whole(rows: int, frozen: bool) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 12, dtype=torch.float64, requires_grad=not frozen)
    targets = torch.randint(0, 50, (rows,))
    wanted = [x] if frozen else [x, weight]
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    actual = linear_cross_entropy(x, weight, targets, chunk=7)
    assert torch.allclose(actual, expected)
    for a, b in zip(torch.autograd.grad(actual * 3, wanted), torch.autograd.grad(expected * 3, wanted)):
        assert torch.allclose(a, b)


def test_half_precision_accumulates_in_float32() -> None:
    x, weight = torch.randn(300, 16).bfloat16(), torch.randn(90, 16).bfloat16()
    targets = torch.randint(0, 90, (300,))
    loss = linear_cross_entropy(x, weight, targets, chunk=32)
    assert loss.dtype == torch.float32
    assert abs(loss - F.cross_entropy((x.float() @ weight.float().T), targets, reduction="sum")) < 1
