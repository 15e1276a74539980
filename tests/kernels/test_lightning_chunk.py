"""The Triton kernels against the reference in float64: outputs, final state and every gradient, over buffers full of NaN.

Without a card they run in Triton's interpreter, in float32 and float16 (its bfloat16 is wrong) at small shapes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.kernels import lightning_chunk as lc
from tnl.kernels import reference
from tnl.kernels.lightning_chunk import Plan, lightning_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
BOUND = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
SMALL = Plan(16, 16, 4, 2, 1)
SLOPES = torch.tensor([-0.8, -0.06, -1e-7])  # first, middle, last layers


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, so that an element that nothing writes shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    empty = torch.empty

    def full_of_nan(*size: Any, **options: Any) -> Tensor:
        x = empty(*size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", full_of_nan)


def use(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(lc, "plan", lambda *a, **k: plan)


def starts(B: int, T: int) -> Tensor:
    """Restarts in every row, several in a chunk; the last row came in."""
    start = torch.zeros(B, T, dtype=torch.int32)
    start[-1] = -1
    for b in range(B):
        for cut in (2 + b, 3 + b, 17, T // 2, T - 1):
            if cut < T:
                start[b, cut:] = torch.maximum(start[b, cut:], torch.tensor(cut, dtype=torch.int32))
    return start.to(DEVICE)


def check(
    T: int,
    dtype: torch.dtype = torch.float32,
    B: int = 2,
    H: int = 1,
    K: int = 16,
    V: int = 16,
    *,
    packed: bool = False,
    states: bool = False,
    silu: bool = False,
    decay: float = -0.06,
) -> None:
    """Compare with the reference on fresh inputs; two runs must be bit-identical."""
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V)}
    x = {n: torch.randn(s, device=DEVICE).to(dtype) for n, s in shapes.items()}
    if states:
        x |= {"initial_state": torch.randn(B, H, K, V, device=DEVICE), "restart_state": torch.randn(H, K, V, device=DEVICE)}
    g = torch.full((H,), decay, device=DEVICE)
    start = starts(B, T) if packed else None
    outer = [torch.randn(B, T, H, V, device=DEVICE).to(dtype), torch.randn(B, H, K, V, device=DEVICE)]

    def run(wide: bool) -> list[Tensor]:
        leaves = {n: (t.double() if wide else t.clone()).requires_grad_() for n, t in x.items()}
        q, k, v, *rest = leaves.values()
        extra = dict(zip(("initial_state", "restart_state"), rest), segment_start=start)
        if wide:
            q, k = (torch.nn.functional.silu(y) if silu else y for y in (q, k))
            o, final = reference.chunk_lightning_attention(q, k, v, g.double(), **extra)
        else:
            o, final = lightning_attention(q, k, v, g, **extra, silu=silu)
        seeds = [y.double() if wide else y for y in outer]
        return [o, final, *torch.autograd.grad([o, final], list(leaves.values()), seeds, materialize_grads=True)]

    for name, got, again, want in zip(("o", "final", *x), run(False), run(False), run(True)):
        assert torch.equal(got, again), name
        assert got.dtype == (dtype if name in "oqkv" else torch.float32), name
        norm = want.norm().item()
        error = (got.double() - want).norm().item() / norm if norm else got.norm().item()
        assert error < BOUND[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127])
def test_lengths(T: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SMALL._replace(chunk=32))
    check(T, packed=packed, states=packed)


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_segments_of_a_row(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SMALL._replace(segments=segments))
    for states, packed in ((False, False), (True, False), (True, True)):
        check(40, B=1, states=states, packed=packed)


def test_a_sequence_that_enters_a_long_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends in it, 1,287 tokens on: only these send a gradient back to the state between the segments."""
    use(monkeypatch, SMALL._replace(segments=2, chunk=256))
    check(2600, B=1, H=1, packed=True, states=True, decay=-1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
def test_dtypes(dtype: torch.dtype, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SMALL)
    check(40, dtype, H=2, states=True, packed=True, silu=silu)


@pytest.mark.parametrize("decay", SLOPES.tolist())
def test_decays(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with segments: what lies too far behind is skipped there."""
    use(monkeypatch, SMALL._replace(segments=2))
    check(200, B=1, decay=decay, states=True)


@pytest.mark.parametrize(("K", "V"), [(16, 48), (24, 20), (80, 16), (16, 17), (64, 32)])
def test_dims(K: int, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V differ, are no powers of two, take several blocks."""
    use(monkeypatch, SMALL._replace(segments=2))
    check(37, B=1, K=K, V=V, states=True, packed=True, silu=True)


def test_default_plan() -> None:
    check(70, B=1, H=2, K=32, V=32, packed=True, states=True)


def test_views_into_a_fused_projection() -> None:
    fused = torch.randn(2, 40, 4, 2, 16, device=DEVICE, requires_grad=True)
    g = -torch.rand(2, device=DEVICE)
    q, k, v, _ = fused.unbind(2)
    o, _ = lightning_attention(q, k, v, g)
    want, _ = reference.chunk_lightning_attention(q.double(), k.double(), v.double(), g.double())
    assert (o.double() - want).norm() < 1e-5 * want.norm()
    seed = torch.randn_like(want)
    got, expected = (torch.autograd.grad(y, fused, s, retain_graph=True)[0] for y, s in ((o, seed.float()), (want, seed)))
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("which", ["o", "final"])
def test_one_output_alone_has_gradients(which: str) -> None:
    q, k, v = (torch.randn(1, 20, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    initial = torch.randn(1, 1, 16, 16, device=DEVICE, requires_grad=True)
    restart = torch.randn(1, 16, 16, device=DEVICE, requires_grad=True)  # nothing restarts: its gradient is zero
    g = torch.tensor([-0.1], device=DEVICE)
    leaves = [k, v, initial, restart]
    results = []
    for form in (lightning_attention, reference.chunk_lightning_attention):
        o, final = form(q, k, v, g, initial_state=initial, restart_state=restart)
        results.append(torch.autograd.grad((o if which == "o" else final).square().sum(), leaves, materialize_grads=True))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_fake_tensors_and_registration() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16, device=DEVICE) for _ in range(3))
    start = starts(1, 20)
    initial, restart = torch.randn(1, 2, 16, 16, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE)
    g = torch.tensor([-0.1, -0.2], device=DEVICE)
    args = (q.requires_grad_(), k, v, g, start, initial, restart.requires_grad_(), True)
    torch.library.opcheck(
        torch.ops.tnl.lightning_attention, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    back = [x.detach() if isinstance(x, torch.Tensor) else x for x in (v, initial, *args)]
    for arguments in (back, [back[0], None, *back[2:6], None, None, None, False]):
        torch.library.opcheck(torch.ops.tnl.lightning_attention_backward, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def valid() -> dict[str, Any]:
    q, k, v = (torch.zeros(1, 8, 2, 16, device=DEVICE) for _ in range(3))
    return {"q": q, "k": k, "v": v, "log_decay": torch.zeros(2, device=DEVICE)}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"q": torch.zeros(1, 8, 2, 16, dtype=torch.float64, device=DEVICE)}, "one floating dtype"),
        ({n: torch.zeros(1, 8, 2, 16, dtype=torch.float64, device=DEVICE) for n in "qkv"}, "q is torch.float64"),
        ({"k": torch.zeros(1, 8, 2, 17, device=DEVICE)}, "k has shape"),
        ({"v": torch.zeros(1, 8, 16, 2, device=DEVICE).mT}, r"v has strides .* Call .contiguous"),
        ({"v": torch.zeros(1, 8, 2, 300, device=DEVICE)}, "go to 256"),
        ({n: torch.zeros(1, 0, 2, 16, device=DEVICE) for n in "qkv"}, "no dim may be 0"),
        ({"k": torch.zeros(1, 8, 2, 16, device="meta")}, "k is on meta"),
        ({"log_decay": torch.zeros(2, device=DEVICE, requires_grad=True)}, "decay is a constant"),
        ({"segment_start": torch.zeros(1, 8, device=DEVICE)}, "int32 or int64"),
        ({"segment_start": torch.zeros(1, 7, device=DEVICE, dtype=torch.int32)}, "segment_start has shape"),
        ({"initial_state": torch.zeros(1, 2, 16, 16, device=DEVICE, dtype=torch.float16)}, "states are float32"),
        ({"restart_state": torch.zeros(1, 2, 16, 16, device=DEVICE)}, "restart_state has shape"),
    ],
)
def test_bad_input_is_refused_before_a_launch(wrong: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lc, "forward", lambda *a, **k: pytest.fail("launched"))
    with pytest.raises(ValueError, match=complaint):
        lightning_attention(**valid() | wrong)


@pytest.mark.parametrize("start", [[0, 0, 2, 1], [0, 2, 2, 3], [-2, -2, 2, 2], [0, 0, 1, 1], [-1, 0, 0, 0]])
def test_debug_checks_the_values_of_segment_start(start: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lc, "debug", True)
    x = {n: t[:, :4] if n in "qkv" else t for n, t in valid().items()}
    with pytest.raises(ValueError, match=r"segment_start\[0, \d\] is"):
        lightning_attention(**x, segment_start=torch.tensor([start], device=DEVICE))


def test_debug_lets_good_values_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lc, "debug", True)
    lc.check_segment_start(torch.tensor([[-1, -1, 2, 2, 4], [0, 1, 2, 2, 2]]))
