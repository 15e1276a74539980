"""The three reference forms are one function: outputs, final states and every gradient agree in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tnl.kernels import reference

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "parallel": reference.parallel_lightning_attention,
    "chunk": reference.chunk_lightning_attention,
    "chunk of 7": lambda *a, **k: reference.chunk_lightning_attention(*a, **k, chunk_size=7),
}


def random_inputs(T: int, B: int = 2, H: int = 3, K: int = 6, V: int = 5) -> dict[str, Tensor]:
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "initial_state": (B, H, K, V), "restart_state": (H, K, V)}
    x = {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}
    x["log_decay"] = (-torch.rand(H, dtype=torch.float64)).requires_grad_()
    return x


def starts(T: int) -> Tensor:
    """Two rows: one begins in this call and restarts at 3 and 4, one came in and restarts at T // 2."""
    rows = torch.zeros(2, T, dtype=torch.int32)
    rows[0, 3:], rows[0, 4:] = 3, 4
    rows[1] = -1
    rows[1, T // 2 :] = T // 2
    return rows.clamp(max=T - 1) if T < 4 else rows


def with_grads(form: Callable[..., tuple[Tensor, Tensor]], x: dict[str, Tensor], start: Tensor | None, states: bool) -> list[Tensor]:
    """o, the final state, and the gradients of all inputs."""
    names = [n for n in x if states or not n.endswith("state")]
    extra = {n: x[n] for n in names if n.endswith("state")}
    o, final = form(x["q"], x["k"], x["v"], x["log_decay"], segment_start=start, **extra)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    d_final = torch.randn(final.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype)
    grads = torch.autograd.grad([o, final], [x[n] for n in names], [do, d_final], allow_unused=True, materialize_grads=True)
    return [o, final, *grads]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [5, 7, 8, 63, 64, 65, 130])
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree(form: str, T: int, packed: bool, states: bool) -> None:
    x, start = random_inputs(T), starts(T) if packed else None
    expected = with_grads(reference.recurrent_lightning_attention, x, start, states)
    for actual, wanted in zip(with_grads(FORMS[form], x, start, states), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [reference.recurrent_lightning_attention, *FORMS.values()])
def test_one_token(form: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = random_inputs(1)
    o, state = form(x["q"], x["k"], x["v"], x["log_decay"], initial_state=x["initial_state"])
    wanted = x["log_decay"].exp()[:, None, None] * x["initial_state"] + x["k"][:, 0, :, :, None] * x["v"][:, 0, :, None]
    torch.testing.assert_close(state, wanted)
    torch.testing.assert_close(o[:, 0], torch.einsum("bhk,bhkv->bhv", x["q"][:, 0], wanted))


@pytest.mark.parametrize("states", [False, True])
def test_packed_row_is_its_sequences(states: bool) -> None:
    x, cuts = random_inputs(50, B=1), [0, 1, 17, 40, 50]
    start = torch.zeros(1, 50, dtype=torch.int64)
    for cut in cuts[:-1]:
        start[:, cut:] = cut
    restart = x["restart_state"] if states else None
    q, k, v, g = (x[n] for n in ("q", "k", "v", "log_decay"))
    packed, final = reference.chunk_lightning_attention(q, k, v, g, segment_start=start, restart_state=restart, chunk_size=16)
    initial = None if restart is None else restart[None]
    rows = [[y[:, a:b] for y in (q, k, v)] for a, b in itertools.pairwise(cuts)]
    alone = [reference.recurrent_lightning_attention(*row, g, initial_state=initial) for row in rows]
    torch.testing.assert_close(packed, torch.cat([o for o, _ in alone], 1))
    torch.testing.assert_close(final, alone[-1][1])


@pytest.mark.parametrize("packed", [False, True])
def test_two_calls_are_one(packed: bool) -> None:
    """The second call's segment_start says -1 for the sequence that came in."""
    x, start = random_inputs(60), starts(60) if packed else None
    q, k, v, g = (x[n] for n in ("q", "k", "v", "log_decay"))
    whole, final = reference.chunk_lightning_attention(q, k, v, g, segment_start=start, initial_state=x["initial_state"])
    cut, parts, state = 23, [], x["initial_state"]
    for a, b in ((0, cut), (cut, 60)):
        part = None if start is None else (start[:, a:b] - a).clamp(min=-1)
        o, state = reference.chunk_lightning_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], g, segment_start=part, initial_state=state, chunk_size=8
        )
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("packed", [False, True])
def test_padded_final_state_is_the_state_after_the_real_tokens(packed: bool) -> None:
    x, lengths, start = random_inputs(20), torch.tensor([3, 20]), starts(20) if packed else None
    q, k, v, g = (x[n] for n in ("q", "k", "v", "log_decay"))
    actual = reference.padded_final_state(k, v, g, lengths, start, x["initial_state"])
    for b, n in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        part = None if start is None else start[row, :n]
        real = [y[row, :n] for y in (q, k, v)]
        _, wanted = reference.recurrent_lightning_attention(*real, g, segment_start=part, initial_state=x["initial_state"][row])
        torch.testing.assert_close(actual[row], wanted)


def test_no_exponent_overflows() -> None:
    """Strong decays over long chunks: growing exponents would give inf x 0."""
    x = {n: t.detach() for n, t in random_inputs(300).items()}
    g = torch.full((3,), -20.0, dtype=torch.float64)
    o, state = reference.parallel_lightning_attention(x["q"], x["k"], x["v"], g)
    assert o.isfinite().all() and state.isfinite().all()
    torch.testing.assert_close(o, reference.recurrent_lightning_attention(x["q"], x["k"], x["v"], g)[0])


def test_wrong_shapes_are_named() -> None:
    x = {n: t.detach() for n, t in random_inputs(4).items()}
    for name, wrong in (("k", x["k"][:, :3]), ("initial_state", x["initial_state"][:1]), ("log_decay", x["log_decay"][:2])):
        y = x | {name: wrong}
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            reference.chunk_lightning_attention(y["q"], y["k"], y["v"], y["log_decay"], initial_state=y["initial_state"])
    with pytest.raises(ValueError, match="one floating dtype"):
        reference.chunk_lightning_attention(x["q"], x["k"].float(), x["v"], x["log_decay"])


@pytest.mark.parametrize("position", (0, 300, 1_000_000))
def test_angles_are_exact_at_a_million_tokens(position: int) -> None:
    theta = torch.rand(2, 1, 4)
    cos, sin = reference.Rotary(theta, torch.tensor([[0, position]])).angles(torch.float32, slice(1, None))
    exact = position * theta[:, 0].double()
    assert torch.allclose(cos[0, 0].double(), exact.cos(), atol=1e-6) and torch.allclose(sin[0, 0].double(), exact.sin(), atol=1e-6)
