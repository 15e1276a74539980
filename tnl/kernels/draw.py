"""Triton: the next token of every slot from its logits, on the device: penalties, temperature, top_k, top_p, min_p, one uniform number.

What is drawn is what `generate.sampling` draws from the same number, but for ties at a cut (all of them stay) and for the last bits
of sums. A row is read a few times from the L2, by one program; nothing is sorted: a cut is found by bisection over the float's bits.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

LIVE, ADAPTER, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, UNIFORM = range(10)
"""Columns of the control table, float32. Temperature 0 is greedy; a slot that is not live draws nothing."""
COLUMNS = 10
PROMPT = 1 << 30
"""Bit of the history that says: stands in the prompt. The other bits count how often the answer has it."""
NOT_FINITE = -1


@triton.jit
def _logits(p_l, p_h, first, V: tl.constexpr, BLOCK: tl.constexpr, repetition, presence, frequency, temperature):
    """A block of logits after penalties and temperature, as float32; -inf behind the end."""
    o = first + tl.arange(0, BLOCK)
    m = o < V
    z = tl.load(p_l + o, mask=m, other=-float("inf")).to(tl.float32)
    if p_h is not None:
        seen = tl.load(p_h + o, mask=m, other=0)
        count = (seen & 0x3FFFFFFF).to(tl.float32)
        z = tl.where(seen != 0, tl.where(z < 0, z * repetition, z / repetition), z)
        z -= tl.where(count > 0, presence, 0.0) + frequency * count
    return z / temperature


@triton.jit
def _key(z):
    """int64 in the order of the floats."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _weight(
    p_l, p_h, low, high, best, V: tl.constexpr, BLOCK: tl.constexpr, repetition, presence, frequency, temperature, COUNT: tl.constexpr
):
    """Of the tokens with low <= key < high: how many, or the sum of e^(z - best)."""
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, V, BLOCK):
        z = _logits(p_l, p_h, first, V, BLOCK, repetition, presence, frequency, temperature)
        key = _key(z)
        inside = (key >= low) & (key < high) & (first + tl.arange(0, BLOCK) < V)
        if COUNT:
            total += tl.sum(inside.to(tl.int32), 0).to(tl.float64)
        else:
            total += tl.sum(tl.where(inside, tl.exp(z - best), 0.0).to(tl.float64), 0)
    return total


@triton.jit
def draw_kernel(
    logits, control, slots, history, ids, seen, out, s_l, s_c, s_h, ADVANCE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: rows. ADVANCE: a row's slot has read one more token."""
    i = tl.program_id(0)
    slot = i.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + i).to(tl.int64)
    c = control + slot * s_c
    if tl.load(c) != 0:
        warmth = tl.load(c + 2)
        top_k, top_p, min_p = tl.load(c + 3), tl.load(c + 4), tl.load(c + 5)
        repetition, presence, frequency = tl.load(c + 6), tl.load(c + 7), tl.load(c + 8)
        temperature = tl.where(warmth > 0, warmth, 1.0)
        p_l = logits + i.to(tl.int64) * s_l
        p_h = None if history is None else history + slot * s_h
        best = tl.full([], -float("inf"), tl.float32)
        token = tl.full([], 0, tl.int32)
        wrong = tl.full([], 0, tl.int32)
        for first in range(0, V, BLOCK):
            o = first + tl.arange(0, BLOCK)
            raw = tl.load(p_l + o, mask=o < V, other=0.0).to(tl.float32)
            wrong += tl.sum((tl.abs(raw) < float("inf")).to(tl.int32) ^ 1, 0)
            z = _logits(p_l, p_h, first, V, BLOCK, repetition, presence, frequency, temperature)
            top = tl.max(z, 0)
            if top > best:
                best = top
                token = first + tl.argmax(z, 0).to(tl.int32)
        if (warmth > 0) & (wrong == 0):
            highest = _key(best)
            least = tl.full([], -0x7F800001, tl.int64)  # the key of -inf
            if (top_k > 0) & (top_k < V):
                high = highest
                while least < high:
                    middle = least + (high - least + 1) // 2
                    n = _weight(p_l, p_h, middle, highest + 1, best, V, BLOCK, repetition, presence, frequency, temperature, True)
                    if n >= top_k:
                        least = middle
                    else:
                        high = middle - 1
            total = _weight(p_l, p_h, least, highest + 1, best, V, BLOCK, repetition, presence, frequency, temperature, False)
            if top_p < 1:
                lowest = least
                high = highest
                while least < high:
                    middle = least + (high - least + 1) // 2
                    out_of_it = _weight(p_l, p_h, lowest, middle, best, V, BLOCK, repetition, presence, frequency, temperature, False)
                    if out_of_it <= (1.0 - top_p.to(tl.float64)) * total:
                        least = middle
                    else:
                        high = middle - 1
            if min_p > 0:
                total = tl.full([], 0.0, tl.float64)
            if (top_p < 1) | (min_p > 0):
                total = tl.full([], 0.0, tl.float64)
                for first in range(0, V, BLOCK):
                    e = _kept(p_l, p_h, first, least, best, min_p, V, BLOCK, repetition, presence, frequency, temperature)
                    total += tl.sum(e.to(tl.float64), 0)
            point = tl.load(c + 9).to(tl.float64) * total
            before = tl.full([], 0.0, tl.float64)
            found = tl.full([], 0, tl.int32)
            for first in range(0, V, BLOCK):
                e = _kept(p_l, p_h, first, least, best, min_p, V, BLOCK, repetition, presence, frequency, temperature)
                mass = tl.sum(e.to(tl.float64), 0)
                if (found == 0) & (mass > 0):
                    o = tl.arange(0, BLOCK)
                    inside = before + tl.cumsum(e.to(tl.float64), 0)
                    # the last that may be drawn, where rounding has left the point behind all of them
                    last = tl.max(tl.where(e > 0, o, 0), 0)
                    token = first + tl.minimum(tl.sum((inside <= point).to(tl.int32), 0), last)
                    if before + mass > point:
                        found = tl.full([], 1, tl.int32)
                    before += mass
        if wrong != 0:
            token = tl.full([], 0, tl.int32)
        tl.store(out + i, tl.where(wrong != 0, -1, token))
        tl.store(ids + slot, token.to(tl.int64))
        if ADVANCE:
            tl.store(seen + slot, tl.load(seen + slot) + 1)
        if history is not None:
            p_t = history + slot * s_h + token
            tl.store(p_t, tl.load(p_t) + 1)


@triton.jit
def _kept(
    p_l, p_h, first, least, best, min_p, V: tl.constexpr, BLOCK: tl.constexpr, repetition, presence, frequency, temperature
):  # fmt: skip
    """e^(z - best) of the tokens that are left, 0 of the others."""
    z = _logits(p_l, p_h, first, V, BLOCK, repetition, presence, frequency, temperature)
    e = tl.exp(z - best)
    return tl.where((_key(z) >= least) & (e >= min_p) & (first + tl.arange(0, BLOCK) < V), e, 0.0)


def draw_(
    logits: Tensor,  # [B, V], of any float dtype up to float32; rows may be one row expanded
    control: Tensor,  # [slots, COLUMNS] float32
    ids: Tensor,  # [slots] int64: the drawn token is written here
    seen: Tensor,  # [slots] int64: tokens that each slot has read
    *,
    slots: Tensor | None = None,  # [B]: each row's slot; None: row i is slot i
    history: Tensor | None = None,  # [slots, V] int32: PROMPT and counts; the drawn token is counted
    advance: bool = False,  # a decoding step: each live slot has read one token
) -> Tensor:
    """The next token of every live row, [B] int32; NOT_FINITE where logits are NaN or infinite. Reads nothing back to the host.

    Raises ValueError for what the kernel cannot take.
    """
    B, V = logits.shape
    if logits.stride(1) != 1 or logits.dtype == torch.float64 or control.dtype != torch.float32 or control.stride(1) != 1:
        raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}, control {control.dtype}; float32 rows are needed")
    if ids.stride(0) != 1 or ids.dtype != torch.int64 or seen.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype}, seen {seen.dtype}; both are int64")
    out = torch.zeros(B, dtype=torch.int32, device=logits.device)
    s_h = 0 if history is None else history.stride(0)
    block = min(4096, triton.next_power_of_2(V))
    draw_kernel[(B,)](
        logits, control, slots, history, ids, seen, out, logits.stride(0), control.stride(0), s_h, advance, V, block, num_warps=8
    )
    return out
