"""Triton: one sweep over time that carries the state on chip. Forward and all three gradients are this sweep (README.md).

Per head and block of output columns, with x, y [C, X] and z [C, BLOCK] of one chunk and the state S [X, BLOCK] in float32:

    out = (x y^T * D) z + read * (x S),    S <- carried * S + y^T (write * z)

o = sweep(q, k, v), dq = sweep(do, v, k) with S transposed; backwards in time dk = sweep(v, do, q), dv = sweep(k, q, do).
Kernel variables: p_ pointer, b_ block, o_ offset, m_ mask, i_ program index. A tensor [B, T, H, N] travels as
(pointer, stride of B, of T, of H), its last stride being 1.
"""

# mypy: disable-error-code="no-untyped-def"
# The compiler wants conditions on constants apart from conditions on values: no merged ifs, no ternaries over blocks.
# ruff: noqa: SIM102, SIM108

import triton
import triton.language as tl


@triton.jit
def _load(a, i_b, i_h, first, col, T, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
    """Rows first ... first + C, columns col ... col + BLOCK of one head, zeros outside: [C, BLOCK]."""
    p, s_b, s_t, s_h = a
    o_t = tl.arange(0, C)
    o_n = col + tl.arange(0, BLOCK)
    m = (first + o_t < T)[:, None]
    if N % BLOCK != 0:
        m = m & (o_n < N)[None, :]
    base = p + i_b.to(tl.int64) * s_b + first.to(tl.int64) * s_t + i_h * s_h
    b = tl.load(base + o_t[:, None] * s_t + o_n[None, :], mask=m, other=0.0)
    if SILU:
        f = b.to(tl.float32)
        b = (f * tl.sigmoid(f)).to(b.dtype)
    return b


@triton.jit
def _store(a, b, i_b, i_h, first, col, T, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    p, s_b, s_t, s_h = a
    o_t = tl.arange(0, C)
    o_n = col + tl.arange(0, BLOCK)
    m = (first + o_t < T)[:, None]
    if N % BLOCK != 0:
        m = m & (o_n < N)[None, :]
    base = p + i_b.to(tl.int64) * s_b + first.to(tl.int64) * s_t + i_h * s_h
    tl.store(base + o_t[:, None] * s_t + o_n[None, :], b, mask=m)


@triton.jit
def _silu_grad(raw, i_b, i_h, first, col, T, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    f = _load(raw, i_b, i_h, first, col, T, N, C, BLOCK, False).to(tl.float32)
    s = tl.sigmoid(f)
    return s * (1.0 + f * (1.0 - s))


@triton.jit
def _state_at(i, col, X: tl.constexpr, Z: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets and mask of the [XP, BLOCK] part of state i; TRANSPOSED: it lies in memory as [Z, X]."""
    o_x = tl.arange(0, XP)[:, None]
    o_z = col + tl.arange(0, BLOCK)[None, :]
    o = o_z * X + o_x if TRANSPOSED else o_x * Z + o_z
    return i.to(tl.int64) * (X * Z) + o, (o_x < X) & (o_z < Z)


@triton.jit
def _expm1(x):
    """e^x - 1 of a scalar x <= 0, with its relative precision near 0, where layers hardly decay."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1.0)


@triton.jit
def _entering_state(
    edge, local, start, g, i_b, i_h, i_s, col, T, B, H, segments, span,
    X: tl.constexpr, Z: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that enters segment i_s: what the segments before it (REVERSE: after it) left, and the edge of the row."""
    b_s = tl.zeros([XP, BLOCK], tl.float32)
    if REVERSE:
        here = tl.minimum((i_s + 1) * span, T)  # first token behind the segment
    else:
        here = i_s * span
    if local is not None:
        if REVERSE:
            begin, end = i_s + 1, segments
        else:
            begin, end = 0, i_s
        for s in range(begin, end):
            edge_of_s = s * span if REVERSE else (s + 1) * span
            passes = True
            if start is not None:
                if REVERSE:
                    passes = tl.load(start + i_b * T + edge_of_s) < here
                else:
                    passes = tl.load(start + i_b * T + here - 1) < edge_of_s
            if passes:
                o, m = _state_at((s * B + i_b) * H + i_h, col, X, Z, XP, BLOCK, TRANSPOSED)
                steps = edge_of_s - here if REVERSE else here - edge_of_s
                b_s += tl.load(local + o, mask=m, other=0.0) * tl.exp(g * steps)
    if edge is not None:
        passes = True
        if start is not None:
            if REVERSE:
                passes = tl.load(start + i_b * T + T - 1) < here
            else:
                passes = (here == 0) | (tl.load(start + i_b * T + tl.maximum(here - 1, 0)) < 0)
        if passes:
            o, m = _state_at(i_b * H + i_h, col, X, Z, XP, BLOCK, TRANSPOSED)
            steps = T - here if REVERSE else here
            b_s += tl.load(edge + o, mask=m, other=0.0) * tl.exp(g * steps)
    return b_s


@triton.jit
def _sweep(
    x, y, z, out, raw, edge, local, restart, edge_out, d_restart, start, log_decay, i_b, i_h, i_s, i_z, T, B, H, segments, span,
    X: tl.constexpr, Z: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr, SILU_X: tl.constexpr, SILU_Y: tl.constexpr, SILU_Z: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Segment i_s of one head and row, output columns i_z * BLOCK ...; `span` is the tokens of a segment, a multiple of C."""
    g = tl.load(log_decay + i_h).to(tl.float32)
    col = i_z * BLOCK
    b_s = _entering_state(edge, local, start, g, i_b, i_h, i_s, col, T, B, H, segments, span, X, Z, XP, BLOCK, TRANSPOSED, REVERSE)
    if d_restart is not None:
        b_dr = tl.zeros([XP, BLOCK], tl.float32)

    o_i = tl.arange(0, C)
    b_steps = o_i[None, :] - o_i[:, None] if REVERSE else o_i[:, None] - o_i[None, :]
    b_decay = tl.where(b_steps >= 0, tl.exp(g * tl.maximum(b_steps, 0)), 0.0)
    n_chunks = tl.cdiv(tl.minimum(span, T - i_s * span), C)
    first = i_s * span
    if REVERSE:
        first += (n_chunks - 1) * C
    if start is not None:  # fetched a chunk ahead: these small loads are not pipelined by the compiler
        b_start_next = tl.load(start + i_b * T + first + o_i, mask=first + o_i < T, other=2147483647).to(tl.int32)
        at_last_next = tl.load(start + i_b * T + tl.minimum(first + C, T) - 1).to(tl.int32)

    for _ in range(n_chunks):
        b_x = _load(x, i_b, i_h, first, 0, T, X, C, XP, SILU_X)
        b_y = _load(y, i_b, i_h, first, 0, T, X, C, XP, SILU_Y)
        b_z = _load(z, i_b, i_h, first, col, T, Z, C, BLOCK, SILU_Z)
        size = tl.minimum(C, T - first)
        b_enter = tl.exp(g * (o_i + 1))  # from the state before the chunk to token i
        b_leave = tl.exp(g * tl.maximum(size - 1 - o_i, 0))  # from token i to the chunk's last
        b_a = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION) * b_decay
        carried = _expm1(g * size)
        if start is not None:
            b_start = b_start_next - first
            at_last = at_last_next - first
            following = first - C if REVERSE else first + C
            m_next = (following + o_i >= 0) & (following + o_i < T)
            b_start_next = tl.load(start + i_b * T + following + o_i, mask=m_next, other=2147483647).to(tl.int32)
            o_last = tl.maximum(tl.minimum(following + C, T) - 1, 0)
            at_last_next = tl.load(start + i_b * T + o_last).to(tl.int32)
            if REVERSE:
                b_a = tl.where(b_start[None, :] <= o_i[:, None], b_a, 0.0)
            else:
                b_a = tl.where(b_start[:, None] <= o_i[None, :], b_a, 0.0)
            b_enter = tl.where(b_start < 0, b_enter, 0.0)
            b_leave = tl.where(at_last <= o_i, b_leave, 0.0)
            carried = tl.where(at_last < 0, carried, -1.0)
        if REVERSE:
            b_read, b_write = b_leave, b_enter
        else:
            b_read, b_write = b_enter, b_leave
        b_o = tl.dot(b_x, b_s.to(b_x.dtype), input_precision=PRECISION) * b_read[:, None]
        b_o = tl.dot(b_a.to(b_z.dtype), b_z, b_o, input_precision=PRECISION)
        if d_restart is not None:
            if at_last >= 0:  # a sequence begins in this chunk
                b_w = tl.where((b_start >= 0) & (o_i < size), tl.exp(g * tl.maximum(o_i - b_start + 1, 0)), 0.0)
                b_dr = tl.dot(tl.trans(b_y), (b_z * b_w[:, None]).to(b_z.dtype), b_dr, input_precision=PRECISION)
                b_dr += b_s * tl.exp(g * (size - at_last))
        b_s += b_s * carried
        b_s = tl.dot(tl.trans(b_y), (b_z * b_write[:, None]).to(b_z.dtype), b_s, input_precision=PRECISION)
        if restart is not None:
            if at_last >= 0:
                o, m = _state_at(i_h, col, X, Z, XP, BLOCK, TRANSPOSED)
                b_r = tl.load(restart + o, mask=m, other=0.0).to(tl.float32)
                b_w = tl.where((b_start >= 0) & (o_i < size), tl.exp(g * tl.maximum(o_i - b_start + 1, 0)), 0.0)
                b_o += tl.dot(b_x, b_r.to(b_x.dtype), input_precision=PRECISION) * b_w[:, None]
                b_s += b_r * tl.exp(g * (size - at_last))
        if raw is not None:
            b_o *= _silu_grad(raw, i_b, i_h, first, col, T, Z, C, BLOCK)
        _store(out, b_o.to(b_z.dtype), i_b, i_h, first, col, T, Z, C, BLOCK)
        if REVERSE:
            first -= C
        else:
            first += C

    if edge_out is not None:
        if i_s == (0 if REVERSE else segments - 1):
            o, m = _state_at(i_b * H + i_h, col, X, Z, XP, BLOCK, TRANSPOSED)
            tl.store(edge_out + o, b_s, mask=m)
    if d_restart is not None:
        o, m = _state_at((i_s * B + i_b) * H + i_h, col, X, Z, XP, BLOCK, TRANSPOSED)
        tl.store(d_restart + o, b_dr, mask=m)


@triton.jit(do_not_specialize=["T", "B", "H", "segments", "span"])
def forward_kernel(
    q, k, v, o, initial, local, restart, final, start, log_decay, T, B, H, segments, span,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of V, H, segments x B."""
    i_b, i_s = tl.program_id(2) % B, tl.program_id(2) // B
    _sweep(
        q, k, v, o, None, initial, local, restart, final, None, start, log_decay,
        i_b, tl.program_id(1), i_s, tl.program_id(0), T, B, H, segments, span,
        K, V, KP, BLOCK, C, False, False, SILU, SILU, False, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "H", "segments", "span"])
def backward_kernel(
    q, k, v, do, dq, dk, dv,
    initial, local, restart, d_final, d_local, d_initial, d_restart, start, log_decay, T, B, H, segments, span,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The three sweeps of the backward pass side by side. Grid: blocks of K for dq, of K for dk, of V for dv; H; segments x B."""
    NK: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    raw_q = q if SILU else None
    raw_k = k if SILU else None
    i_z, i_h = tl.program_id(0), tl.program_id(1)
    i_b, i_s = tl.program_id(2) % B, tl.program_id(2) // B
    if i_z < NK:
        _sweep(
            do, v, k, dq, raw_q, initial, local, restart, None, None, start, log_decay,
            i_b, i_h, i_s, i_z, T, B, H, segments, span,
            V, K, VP, BLOCK_K, C, True, False, False, False, SILU, PRECISION,
        )  # fmt: skip
    elif i_z < 2 * NK:
        _sweep(
            v, do, q, dk, raw_k, d_final, d_local, None, None, None, start, log_decay,
            i_b, i_h, i_s, i_z - NK, T, B, H, segments, span,
            V, K, VP, BLOCK_K, C, True, True, False, False, SILU, PRECISION,
        )  # fmt: skip
    else:
        _sweep(
            k, q, do, dv, None, d_final, d_local, None, d_initial, d_restart, start, log_decay,
            i_b, i_h, i_s, i_z - 2 * NK, T, B, H, segments, span,
            K, V, KP, BLOCK_V, C, False, True, SILU, SILU, False, PRECISION,
        )  # fmt: skip


@triton.jit
def _local_state(
    y, z, local, restart, start, log_decay, i_b, i_h, i_s, i_z, T, B, H, span,
    X: tl.constexpr, Z: tl.constexpr, XP: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What segment i_s alone adds to the state at its end (REVERSE: to the state's gradient before its first token)."""
    g = tl.load(log_decay + i_h).to(tl.float32)
    col = i_z * BLOCK
    t0 = i_s * span
    t1 = tl.minimum(t0 + span, T)
    begin, end = t0, t1
    # a token this far from the segment's edge counts for less than 2^-43 of what a token at the edge does
    reach = tl.minimum(30.0 / tl.maximum(-g, 1e-9), 1e9).to(tl.int32) + C
    if REVERSE:
        end = tl.minimum(end, begin + reach)
        if start is not None:  # as far as the sequence that runs at t0 goes
            own = 0
            for n in range(tl.cdiv(end - t0, 1024)):
                o_t = t0 + n * 1024 + tl.arange(0, 1024)
                own += tl.sum((tl.load(start + i_b * T + o_t, mask=o_t < end, other=2147483647) < t0).to(tl.int32), 0)
            end = t0 + own
    else:
        at_end = 0
        if start is not None:
            at_end = tl.load(start + i_b * T + t1 - 1).to(tl.int32)
        begin = tl.maximum(begin, t0 + (tl.maximum(tl.maximum(end - reach, at_end), t0) - t0) // C * C)
    b_s = tl.zeros([XP, BLOCK], tl.float32)
    o_i = tl.arange(0, C)
    for n in range(tl.cdiv(end - begin, C)):
        first = begin + n * C
        b_y = _load(y, i_b, i_h, first, 0, T, X, C, XP, SILU)
        b_z = _load(z, i_b, i_h, first, col, T, Z, C, BLOCK, False)
        o_t = first + o_i
        b_steps = o_t - t0 + 1 if REVERSE else t1 - 1 - o_t
        b_w = tl.exp(g * tl.maximum(b_steps, 0))
        if start is not None:
            if REVERSE:
                b_w = tl.where(o_t < end, b_w, 0.0)
            else:
                b_w = tl.where(o_t >= at_end, b_w, 0.0)
        b_s = tl.dot(tl.trans(b_y), (b_z * b_w[:, None]).to(b_z.dtype), b_s, input_precision=PRECISION)
    if restart is not None:
        if at_end >= t0:
            o, m = _state_at(i_h, col, X, Z, XP, BLOCK, False)
            b_s += tl.load(restart + o, mask=m, other=0.0).to(tl.float32) * tl.exp(g * (t1 - at_end))
    o, m = _state_at((i_s * B + i_b) * H + i_h, col, X, Z, XP, BLOCK, False)
    tl.store(local + o, b_s, mask=m)


@triton.jit(do_not_specialize=["T", "B", "H", "segments", "span"])
def local_states_kernel(
    q, k, v, do, local, d_local, restart, start, log_decay, T, B, H, segments, span,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Local states of every segment, and their gradients where d_local is given. Grid: blocks of V (twice), H, segments x B."""
    NV: tl.constexpr = (V + BLOCK - 1) // BLOCK
    i_z, i_h = tl.program_id(0), tl.program_id(1)
    i_b, i_s = tl.program_id(2) % B, tl.program_id(2) // B
    if i_z < NV:
        if i_s < segments - 1:
            _local_state(
                k, v, local, restart, start, log_decay, i_b, i_h, i_s, i_z, T, B, H, span,
                K, V, KP, BLOCK, C, False, SILU, PRECISION,
            )  # fmt: skip
    elif d_local is not None:
        if i_s > 0:
            _local_state(
                q, do, d_local, None, start, log_decay, i_b, i_h, i_s, i_z - NV, T, B, H, span,
                K, V, KP, BLOCK, C, True, SILU, PRECISION,
            )  # fmt: skip
