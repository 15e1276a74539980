import pytest
import torch

from tnl.model.decay import log_decay, slopes


def test_slopes_of_the_7b_are_powers_of_a_quarter() -> None:
    assert slopes(32) == pytest.approx([2 ** (-(h + 1) / 4) for h in range(32)])


@pytest.mark.parametrize("heads", (1, 3, 6, 12, 40))
def test_other_head_counts_borrow_every_second_slope_of_the_next_power(heads: int) -> None:
    power = 2 ** (heads.bit_length() - 1)
    assert slopes(heads)[:power] == slopes(power)
    assert slopes(heads)[power:] == slopes(2 * power)[0 : 2 * (heads - power) : 2]
    assert len(slopes(heads)) == heads


def test_depth_slows_forgetting() -> None:
    first, last, only = log_decay(32, 0, 30), log_decay(32, 29, 30), log_decay(4, 0, 1)
    assert first.dtype == torch.float32 and (first < 0).all()
    assert torch.allclose(first, -torch.tensor(slopes(32)) * (1 + 1e-5))
    assert torch.allclose(last, -torch.tensor(slopes(32)) * 1e-5, rtol=1e-6)
    assert torch.allclose(only, -torch.tensor(slopes(4)) * (1 + 1e-5))
