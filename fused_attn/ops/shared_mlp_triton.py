"""Triton kernels of the small network: [N, C]-sized, so what counts is launches, and reading W once per block of N.

    dense   out[m, o] = Σ_k in[m, k]·W[o, k] + b[o]        both layers; with W transposed, the way back to dz and dp
    norm    mean and biased variance of z over the rows    only norm="batch"
    outer   dW[o, k] = Σ_m d[m, o]·in[m, k], db = Σ_m d    both layers

`in` is made from what lies in memory while it is loaded (`_source`): activations and the gate's derivative cost no
launch. Products are multiply-adds in a (BM, BO, BK) tile, not tl.dot: that would round float32 to TF32, and these are
too small to gain. Backward of a norm or of prelu's slopes is left to the eager form: few calls, for rare networks.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .shared_mlp import Mlp
from .shared_mlp import shared_mlp_bwd as declared


@triton.jit
def _hidden(
    z, k, mask, mean_ptr, var_ptr, scale_ptr, shift_ptr, act_weight_ptr, act_weight_s,
    NORM: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """act(norm(z)) for columns k of the hidden layer."""
    weight = None
    if NORM:
        z = (z - tl.load(mean_ptr + k, mask=mask, other=0).to(ACC)) / tl.sqrt(
            tl.load(var_ptr + k, mask=mask, other=1).to(ACC) + EPS
        )
        if scale_ptr is not None:
            z *= tl.load(scale_ptr + k, mask=mask, other=0).to(ACC)
        if shift_ptr is not None:
            z += tl.load(shift_ptr + k, mask=mask, other=0).to(ACC)
    if ACT == "prelu":
        weight = tl.load(act_weight_ptr + k * act_weight_s, mask=mask, other=0).to(ACC)
    return tile.activate(z, ACT, SLOPE, weight)


@triton.jit
def _source(
    in_ptr, logit_ptr, row, k, M, K, mean_ptr, var_ptr, scale_ptr, shift_ptr, weight_ptr, weight_s,
    MODE: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows (BM, 1) by columns k (1, BK) of a layer's input, 0 outside.

    "rows": Σ_p in; "hidden": Σ_p act(norm(in)), p over MANY descriptors; "logits": in·gate'(logit), d logits.
    """
    mask = (row < M) & (k < K)
    if MODE == "logits":
        d = tl.load(in_ptr + row * K + k, mask=mask, other=0).to(ACC)
        u = tl.load(logit_ptr + row * K + k, mask=mask, other=0).to(ACC)
        return d * tile.derivative(u, ACT, SLOPE, None)
    else:
        total = tl.zeros(mask.shape, ACC)
        for p in tl.static_range(MANY):
            v = tl.load(in_ptr + (p * M + row) * K + k, mask=mask, other=0).to(ACC)
            if MODE == "hidden":
                v = _hidden(v, k, k < K, mean_ptr, var_ptr, scale_ptr, shift_ptr, weight_ptr, weight_s,
                            NORM, ACT, SLOPE, EPS, ACC)  # fmt: skip
            total += tl.where(mask, v, 0)
        return total


@triton.jit
def _shared_mlp_dense_kernel(
    in_ptr, logit_ptr, w_ptr, bias_ptr, z_ptr, out_ptr, gate_ptr, M, K, OUT, w_so, w_sk,
    mean_ptr, var_ptr, scale_ptr, shift_ptr, weight_ptr, weight_s, gate_weight_ptr, gate_weight_s,
    MODE: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, BACK: tl.constexpr,
    GATE: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, SPREAD: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BM, BO, BK), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)[None, :]
        source = _source(in_ptr, logit_ptr, row, k, M, K, mean_ptr, var_ptr, scale_ptr, shift_ptr, weight_ptr, weight_s,
                         MODE, MANY, NORM, ACT, SLOPE, EPS, ACC)  # fmt: skip
        w = tl.load(w_ptr + o[:, None] * w_so + k * w_sk, mask=(o[:, None] < OUT) & (k < K), other=0).to(ACC)
        total += source[:, None, :] * w[None, :, :]
    out, o = tl.sum(total, 2), o[None, :]
    mask = (row < M) & (o < OUT)
    if bias_ptr is not None:
        out += MANY * tl.load(bias_ptr + o, mask=o < OUT, other=0).to(ACC)
    # Forward writes a row; the way back writes it for each of SPREAD descriptors, through the derivative at its own z.
    for p in tl.static_range(SPREAD):
        to = (p * M + row) * OUT + o
        d = out
        if z_ptr is not None:
            d = out * tile.derivative(tl.load(z_ptr + to, mask=mask, other=0).to(ACC), BACK, SLOPE, None)
        tl.store(out_ptr + to, d.to(out_ptr.dtype.element_ty), mask=mask)
    if gate_ptr is not None:
        weight = None
        if GATE == "prelu":
            weight = tl.load(gate_weight_ptr + o * gate_weight_s, mask=o < OUT, other=0).to(ACC)
        tl.store(gate_ptr + row * OUT + o, tile.activate(out, GATE, SLOPE, weight), mask=mask)


@triton.jit
def _shared_mlp_norm_kernel(z_ptr, mean_ptr, var_ptr, M, H, ACC: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    h = tl.program_id(0) * BH + tl.arange(0, BH)[None, :]
    rows = tl.arange(0, BM)[:, None]
    total = tl.zeros((BM, BH), ACC)
    for start in range(0, M, BM):
        total += tl.load(z_ptr + (start + rows) * H + h, mask=(start + rows < M) & (h < H), other=0)
    mean = tl.sum(total, 0)[None, :] / M
    total = tl.zeros((BM, BH), ACC)  # twice over z, which is small: Σz² − mean² would cancel
    for start in range(0, M, BM):
        mask = (start + rows < M) & (h < H)
        z = tl.load(z_ptr + (start + rows) * H + h, mask=mask, other=0)
        total += tl.where(mask, (z - mean) * (z - mean), 0)
    tl.store(mean_ptr + h, mean, mask=h < H)
    tl.store(var_ptr + h, tl.sum(total, 0)[None, :] / M, mask=h < H)


@triton.jit
def _shared_mlp_outer_kernel(
    d_ptr, logit_ptr, in_ptr, dw_ptr, db_ptr, M, OUT, K,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MANY: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    SLOPE: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    dw = tl.zeros((BM, BO, BK), ACC)
    db = tl.zeros((BM, BO), ACC)
    for start in range(0, M, BM):
        row = start + tl.arange(0, BM)[:, None]
        d = _source(d_ptr, logit_ptr, row, o[None, :], M, OUT, None, None, None, None, None, 0,
                    LEFT, 1, False, GATE, SLOPE, 0.0, ACC)  # fmt: skip
        source = _source(in_ptr, None, row, k[None, :], M, K, None, None, None, None, None, 0,
                         RIGHT, MANY, False, ACT, SLOPE, 0.0, ACC)  # fmt: skip
        dw += d[:, :, None] * source[:, None, :]
        db += d
    to = o[:, None] * K + k[None, :]
    tl.store(dw_ptr + to, tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), mask=(o[:, None] < OUT) & (k[None, :] < K))
    if db_ptr is not None:  # noqa: SIM102  (settled when compiling; what follows, when running)
        if tl.program_id(1) == 0:
            tl.store(db_ptr + o, (MANY * tl.sum(db, 0)).to(db_ptr.dtype.element_ty), mask=o < OUT)


def _blocks(rows: int, outputs: int, inner: int, acc: torch.dtype, sums: int = 32) -> dict[str, int]:
    """BM, BO, BK: `sums` a thread (a quarter in float64, whose erf and exp are long).

    Few rows: as much of a row of W at once as fits, because then latency counts, and little is read twice anyway.
    Many: blocks about as high as wide, so that both operands are read seldom.
    """
    double = acc == torch.float64
    size = tile.THREADS * (sums // 4 if double else sums)
    bm = min(8, triton.next_power_of_2(max(1, rows)))
    bk = min(triton.next_power_of_2(max(1, inner)), 64 if rows >= 64 or double else 2048 // bm)
    return dict(BM=bm, BO=min(triton.next_power_of_2(max(1, outputs)), size // (bm * bk)), BK=bk)


def _vector(t: Tensor | None) -> Tensor | None:
    """A bias and the like, with stride 1."""
    return t if t is None else t.contiguous()


def _step(weight: Tensor | None) -> int:
    """How far apart the slopes of prelu are: 0 where one serves all."""
    return 0 if weight is None or weight.numel() == 1 else weight.stride(0)


def _dense(
    source: Tensor, w: Tensor, out: Tensor, rows: int, mlp: Mlp, *, mode: str, many: int = 1,
    bias: Tensor | None = None, gate: Tensor | None = None, logits: Tensor | None = None, z: Tensor | None = None,
    spread: int = 1,
    stats: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """One launch of the dense kernel; w (outputs, inner) with any strides."""
    acc = accumulator(source.dtype)
    outputs, inner = w.shape
    act_weight = mlp.act_weight if mode == "hidden" and mlp.act == "prelu" else None
    gate_weight = mlp.gate_weight if gate is not None and mlp.gate == "prelu" else None
    norm = mode == "hidden" and mlp.norm != "none"
    blocks = _blocks(rows, outputs, inner, acc)
    tile.launch(
        _shared_mlp_dense_kernel, (triton.cdiv(rows, blocks["BM"]), triton.cdiv(outputs, blocks["BO"])), source,
        source, logits, w, _vector(bias), z, out, gate, rows, inner, outputs, w.stride(0), w.stride(1),
        *map(_vector, (*stats, mlp.norm_weight, mlp.norm_bias) if norm else (None,) * 4),
        act_weight, _step(act_weight), gate_weight, _step(gate_weight),
        MODE=mode, MANY=many, NORM=norm, ACT={"hidden": mlp.act, "logits": mlp.gate}.get(mode, "identity"),
        BACK=mlp.act, GATE=mlp.gate, SLOPE=mlp.slope, EPS=mlp.eps, ACC=tile.ACC.get(acc, tl.float32),
        SPREAD=spread, **blocks,
        num_warps=tile.THREADS // tile.WARP, **tile.OPTIONS,
    )  # fmt: skip


def _outer(
    d: Tensor, source: Tensor, w: Tensor, bias: Tensor | None, rows: int, mlp: Mlp, *, right: str, many: int,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dW in w's shape and dtype, and db."""
    outputs, inner = w.shape[:2]
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    db = None if bias is None else torch.empty(outputs, dtype=bias.dtype, device=w.device)
    acc = accumulator(source.dtype)
    blocks = _blocks(rows, outputs, inner, acc, sums=16)  # beside them it holds both operands: 32 take 167 registers
    # Without inputs there is no dW, but a db, which the first programs write.
    across = max(1, triton.cdiv(inner, blocks["BK"]))
    tile.launch(
        _shared_mlp_outer_kernel, (triton.cdiv(outputs, blocks["BO"]), across), source,
        d, logits, source, dw, db, rows, outputs, inner,
        LEFT="rows" if logits is None else "logits", RIGHT=right, MANY=many, ACT=mlp.act, GATE=mlp.gate,
        SLOPE=mlp.slope, ACC=tile.ACC.get(acc, tl.float32), **blocks,
        num_warps=tile.THREADS // tile.WARP, **tile.OPTIONS,
    )  # fmt: skip
    return dw, db


def _matrix(w: Tensor) -> Tensor:
    """A weight as (rows, columns): a view, whatever the strides of a 1×1 convolution's are."""
    return w.flatten(1) if w.dim() > 2 else w


def saved_size(mlp: Mlp, many: int, n: int) -> int:
    """How many elements `saved` has: z | u | batch mean | batch variance."""
    hidden = mlp.w1.shape[0]
    if mlp.w2 is None:
        return n * hidden
    return many * n * hidden + n * mlp.w2.shape[0] + (2 * hidden if mlp.norm == "batch" else 0)


def mlp_into(pooled: Tensor, mlp: Mlp, gate: Tensor, saved: Tensor) -> None:
    """Fills gate (N, C) and saved from pooled (P, N, C), all contiguous."""
    many, n, _ = pooled.shape
    hidden = mlp.w1.shape[0]
    if mlp.w2 is None:
        _dense(pooled, _matrix(mlp.w1), saved, n, mlp, mode="rows", many=many, bias=mlp.b1, gate=gate)
        return
    z, u, rest = saved.split([many * n * hidden, gate.numel(), saved.numel() - many * n * hidden - gate.numel()])
    _dense(pooled, _matrix(mlp.w1), z, many * n, mlp, mode="rows", bias=mlp.b1)
    stats = (mlp.norm_mean, mlp.norm_var)
    if mlp.norm == "batch":
        stats = mean, var = rest[:hidden], rest[hidden:]
        tile.launch(
            _shared_mlp_norm_kernel, (triton.cdiv(hidden, 32),), z, z, mean, var, many * n, hidden,
            ACC=tile.ACC.get(z.dtype, tl.float32), BM=16, BH=32, num_warps=tile.THREADS // tile.WARP,
            **tile.OPTIONS,
        )  # fmt: skip
    _dense(z, _matrix(mlp.w2), u, n, mlp, mode="hidden", many=many, bias=mlp.b2, gate=gate, stats=stats)


def shared_mlp(pooled: Tensor, *network: object) -> tuple[Tensor, Tensor]:
    mlp = Mlp(*network)  # type: ignore[arg-type]
    p = (pooled if pooled.dim() == 3 else pooled.unsqueeze(0)).contiguous()
    many, n = p.shape[:2]
    gate = torch.empty(n, (mlp.w1 if mlp.w2 is None else mlp.w2).shape[0], dtype=accumulator(p.dtype), device=p.device)
    saved = gate.new_empty(saved_size(mlp, many, n))
    mlp_into(p, mlp, gate, saved)
    return gate, saved


def shared_mlp_bwd(pooled: Tensor, dgate: Tensor, saved: Tensor, *network: object) -> tuple[Tensor, ...]:
    mlp = Mlp(*network)  # type: ignore[arg-type]
    if mlp.norm != "none" or "prelu" in (mlp.gate, mlp.act if mlp.w2 is not None else None):
        return declared.eager(pooled, dgate, saved, *network)
    p = (pooled if pooled.dim() == 3 else pooled.unsqueeze(0)).contiguous()
    (many, n, _), hidden, dgate = p.shape, mlp.w1.shape[0], dgate.contiguous()
    dp = torch.empty_like(p)
    grads: list[Tensor | None] = [None] * 10
    w1 = _matrix(mlp.w1)
    if mlp.w2 is None:
        grads[0], grads[1] = _outer(dgate, p, mlp.w1, mlp.b1, n, mlp, right="rows", many=many, logits=saved)
        _dense(dgate, w1.t(), dp, n, mlp, mode="logits", logits=saved, spread=many)
    else:
        z, u = saved.split([many * n * hidden, saved.numel() - many * n * hidden])
        d = torch.empty_like(z)
        grads[2], grads[3] = _outer(dgate, z, mlp.w2, mlp.b2, n, mlp, right="hidden", many=many, logits=u)
        _dense(dgate, _matrix(mlp.w2).t(), d, n, mlp, mode="logits", logits=u, z=z, spread=many)
        grads[0], grads[1] = _outer(d, p, mlp.w1, mlp.b1, many * n, mlp, right="rows", many=1, logits=None)
        _dense(d, w1.t(), dp, many * n, mlp, mode="rows")
    return (dp.view(pooled.shape), *(mlp.w1.new_empty((0,)) if g is None else g for g in grads))
