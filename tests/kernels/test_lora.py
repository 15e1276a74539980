"""LoRA's parts as PEFT keeps them, and the dropout masks that are a function of token, module and column."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tnl.kernels.lora import Draw, hindrance, keep_mask, lora_of, project, token_keys

P = 0.1


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.line = nn.Linear(24, 12, bias=bias)


def adapted(bias: bool = False, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Net(bias), LoraConfig(target_modules=["line"], r=4, lora_alpha=6, **options))  # type: ignore[arg-type]
    module = model.base_model.model.line
    if not options.get("use_dora"):
        nn.init.normal_(module.lora_B["default"].weight)
    return module


def test_a_mask_drops_its_share_in_every_row_and_column() -> None:
    kept = keep_mask(keys(2048), 3, 1024, P).float()
    assert abs(kept.mean() - 0.9) < 1e-3
    for dim in (0, 1):
        rates = kept.mean(dim)
        expected = (0.09 / kept.shape[dim]) ** 0.5
        assert abs(rates.std() / expected - 1) < 0.1 and rates.min() > 0.9 - 6 * expected


@pytest.mark.parametrize("other", ["row", "column", "module", "step"])
def test_masks_of_neighbours_are_independent(other: str) -> None:
    record = token_keys(1234567, torch.arange(2048))
    one = keep_mask(record, 3, 1024, P)
    two = {
        "row": one.roll(1, 0),
        "column": one.roll(1, 1),
        "module": keep_mask(record, 4, 1024, P),
        "step": keep_mask(token_keys(1234568, torch.arange(2048)), 3, 1024, P),
    }[other]
    dropped = (~one & ~two).float().mean().item()
    assert abs(dropped - P * P) < 4 * (P * P / one.numel()) ** 0.5 + 1e-5


def test_no_four_cells_of_a_rectangle_hang_together() -> None:
    """The masks come from row xor column: a weak mixing would show here."""
    dropped = (~keep_mask(keys(512), 0, 512, 0.5)).float() * 2 - 1
    product = dropped[:-1, :-1] * dropped[1:, :-1] * dropped[:-1, 1:] * dropped[1:, 1:]
    assert abs(product.mean()) < 4 / product.numel() ** 0.5


def test_a_token_has_the_same_mask_wherever_it_stands() -> None:
    packed = torch.cat([token_keys(5, torch.arange(10)), token_keys(9, torch.arange(7))])
    assert torch.equal(keep_mask(packed, 1, 64, P)[10:], keep_mask(token_keys(9, torch.arange(7)), 1, 64, P))
    assert token_keys(5, torch.arange(3)).dtype == torch.int32


def test_without_a_draw_the_modules_own_forward_runs() -> None:
    module, x = adapted(lora_dropout=0.5).train(), torch.randn(2, 3, 24)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    assert torch.equal(project(module, x, None, 0), expected)


def test_with_a_draw_the_mask_is_its_own() -> None:
    module, x, draw = adapted(lora_dropout=0.5).train(), torch.randn(2, 3, 24), Draw(keys(2, 3), 2)
    kept = keep_mask(draw.keys, draw.module(1), 24, 0.5)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    expected = module.base_layer(x) + 1.5 * (x * kept * 2) @ a.T @ b.T
    assert (project(module, x, draw, 1) - expected).abs().max() < 1e-5
    assert torch.equal(project(module.eval(), x, draw, 1), module(x))


def test_gradients_with_a_held_mask_are_those_of_finite_differences() -> None:
    module, draw = adapted(lora_dropout=0.3).double().train(), Draw(keys(1, 3), 0)
    factors = module.lora_A["default"].weight, module.lora_B["default"].weight
    x = torch.randn(1, 3, 24, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        module.lora_A["default"]._parameters["weight"], module.lora_B["default"]._parameters["weight"] = a, b
        return project(module, x, draw, 0)

    assert torch.autograd.gradcheck(run, (x, *factors))


def test_parts_of_a_module() -> None:
    module = adapted(lora_dropout=P)
    lora = lora_of(module.train())
    assert lora is not None and lora.scale == 1.5 and lora.dropout == P and lora.a is module.lora_A["default"].weight
    assert (off := lora_of(module.eval())) is not None and off.dropout == 0
    module.enable_adapters(False)
    assert (plain := lora_of(module)) is not None and plain.a is None
    frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
    assert (plain := lora_of(frozen)) is not None and plain.weight is frozen.weight
    assert lora_of(frozen.requires_grad_(True)) is None


def test_rslora_scales() -> None:
    assert (lora := lora_of(adapted(use_rslora=True))) is not None and lora.scale == 3.0


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (adapted(use_dora=True), "DoraLinear"),
        (adapted(lora_bias=True), "lora_bias"),
        (adapted(bias=True), "a bias"),
        (nn.LayerNorm(3), "LayerNorm is no LoRA"),
    ],
)
def test_what_peft_must_compute_itself(module: nn.Module, why: str) -> None:
    assert lora_of(module) is None
    assert why in hindrance(module)
