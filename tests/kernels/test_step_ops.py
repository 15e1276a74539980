"""A layer in the answering forms against the reference form: few rows and many, every kind of layer, adapters, slots that stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.kernels import dispatch, step_ops
from tnl.kernels.dispatch import REFERENCE
from tnl.kernels.reference import Mixer, Rows, simple_rms_norm
from tnl.kernels.row_linear import RowLinear
from tnl.model.layer import LayerWeights, decoder_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, H, G, ADAPTERS, R = 64, 2, 48, 3, 4


class Norm:
    """A SimpleRMSNorm as the kernels know it."""

    eps = 1e-6

    def __call__(self, x: Tensor) -> Tensor:
        return simple_rms_norm(x, self.eps)


@pytest.fixture
def forms() -> dispatch.Answering:
    return dispatch.answering(REFERENCE._replace(backend="triton"))


def layer(kind: str, dtype: torch.dtype, rows: Tensor | None = None) -> LayerWeights:
    """Random weights; kind: plain, lrpe, bias, layernorm or relu."""
    torch.manual_seed(0)
    make = partial(nn.Linear, bias=kind == "bias", device=DEVICE, dtype=dtype)
    norm = (lambda width: nn.LayerNorm(width, device=DEVICE, dtype=dtype)) if kind == "layernorm" else (lambda width: Norm())
    projections: dict[str, Any] = {
        "qkvu_proj": make(D, 4 * D),
        "out_proj": make(D, D),
        "l1": make(D, G),
        "l2": make(D, G),
        "l3": make(G, D),
    }
    if rows is not None:
        for name, linear in list(projections.items()):
            A, B = (torch.randn(ADAPTERS, *shape, device=DEVICE) * 0.2 for shape in ((R, linear.in_features), (linear.out_features, R)))
            projections[name] = RowLinear(linear, A.to(dtype), B.to(dtype), rows)
    norms = {"token_norm": norm(D), "channel_norm": norm(D)}
    theta = torch.rand(H, 1, D // H, device=DEVICE) if kind == "lrpe" else None
    mixer = Mixer(norm(D), "relu" if kind == "relu" else "silu", -torch.rand(H, device=DEVICE), theta)
    return LayerWeights(**projections, **norms, mixer=mixer)


def start(B: int, kind: str, dtype: torch.dtype, T: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    K = D // H * (2 if kind == "lrpe" else 1)
    return torch.randn(B, T, D, device=DEVICE).to(dtype), torch.randn(B, H, K, D // H, device=DEVICE)


@torch.inference_mode()
@pytest.mark.parametrize("most", [0, 32])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, torch.float32) for kind in ("plain", "lrpe", "bias", "layernorm", "relu")] + [("plain", torch.float16)]
)
def test_a_step_is_the_reference(
    forms: dispatch.Answering, kind: str, dtype: torch.dtype, adapted: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_ops, "MOST", most)
    rows = torch.tensor([2, 0, 1, 2], device=DEVICE) if adapted else None
    weights = layer(kind, dtype, rows)
    x, state = start(4, kind, dtype)
    positions = torch.tensor([[3], [0], [70], [1_000_000]], device=DEVICE)
    expected, after = decoder_layer(x, state, weights, Rows(positions), REFERENCE)
    live = torch.tensor([[1.0], [1.0], [0.0], [1.0]], device=DEVICE)
    own = state.clone()
    found, same = decoder_layer(x.clone(), own, weights, Rows(positions, real=live), forms.step)
    on = live[:, 0] != 0
    bound = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found[on], expected[on], **bound)
    torch.testing.assert_close(own[on], after[on], **bound)
    assert same is own and torch.equal(own[~on], state[~on])


@torch.inference_mode()
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["plain", "lrpe", "bias", "relu"])
def test_a_chunk_at_the_end_of_its_row_is_the_reference(forms: dispatch.Answering, kind: str, adapted: bool, pad: int) -> None:
    weights = layer(kind, torch.float32, torch.tensor([1], device=DEVICE) if adapted else None)
    x, state = start(1, kind, torch.float32, 16)
    positions = torch.arange(16, device=DEVICE)[None] + 40 - pad
    begins = torch.where(positions >= 40, pad, 0).int()
    expected, after = decoder_layer(x[:, pad:], state, weights, Rows(positions[:, pad:]), REFERENCE)
    found, new = decoder_layer(x.clone(), state, weights, Rows(positions, begins), forms.read)
    torch.testing.assert_close(found[:, pad:], expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(new, after, atol=2e-4, rtol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize("most", [0, 32])
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: lambda x: one(x)], ids=["matrix", "function"])
def test_the_head(forms: dispatch.Answering, wrap: Callable[[Any], Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_ops, "MOST", most)
    linear = nn.Linear(D, 100, bias=False, device=DEVICE)
    x = torch.randn(3, D, device=DEVICE)
    found = forms.head(x, Norm(), wrap(linear))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, linear(simple_rms_norm(x)), atol=1e-5, rtol=1e-5)
