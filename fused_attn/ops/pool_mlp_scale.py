"""Squeeze-and-excitation as one op: pool, small network, scale, with what follows it.

    p = (1−w)·mean_s x + w·max_s x,   gate = g(W2 act(norm(W1 p + b1)) + b2),   y = epilogue(x·gate + residual)

Hu et al., arXiv:1709.01507, eq. 2–4 (w = 0); w = ½ is timm's `add_maxpool`; one layer is effective SE (Lee & Park,
arXiv:1911.06667, eq. 3). It is `pool_scale` around `shared_mlp` as one launch on the CPU and one autograd node
everywhere: measured, separate calls cost the host more than the arithmetic of a 7×7 map. Forward 2R+1W, backward 3R+1W.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import activations, checks
from .channel_pool import TIES, pooled
from .pool_scale import keeps_e, pool_scale_apply, pool_scale_reduce
from .scale import formula as scaled
from .shared_mlp import Mlp, or_none, pack, shared_mlp_bwd, statistics
from .shared_mlp import formula as gates


def pool_of(max_weight: float) -> str:
    """The pooling that a weight of the maximum stands for."""
    return "mean" if max_weight == 0 else "max" if max_weight == 1 else "mean_max"


def keeps_max(max_weight: float, ties: str) -> bool:
    """Whether backward compares x with its maxima."""
    return max_weight != 0 and ties == "split"


def descriptor(x: Tensor, max_weight: float, ties: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """p, the maxima, and their index where ties="first"; differentiable."""
    value, index = pooled(x, pool_of(max_weight), ties)
    if max_weight == 0:
        return value, None, None
    if max_weight == 1:
        return value, value, index
    return (1 - max_weight) * value[0] + max_weight * value[1], value[1], index


def unpack(saved: Tensor, n: int, c: int, with_max: bool) -> tuple[Tensor, Tensor, Tensor]:
    """saved = p | maxima | what the network saved (csrc/cpu/pool_mlp_scale.cpp writes it so)."""
    p, rest = saved[: n * c].view(n, c), saved[n * c :]
    if not with_max:
        return p, rest[:0], rest
    return p, rest[: n * c].view(n, c), rest[n * c :]


def _check(x: Tensor, *args: object) -> None:
    checks.feature_map("x", x)
    network, residual = Mlp(*args[:10], *args[11:16]), args[10]  # type: ignore[arg-type]
    max_weight, ties, epilogue, epilogue_slope = args[16:]
    n, c = x.shape[:2]
    network.check(n, c)
    checks.same_device("x", x, **dict(zip(Mlp._fields[:10], network[:10], strict=True)))
    if network.w2 is None and network.w1.shape[0] != c:
        raise ValueError(f"w1 must have shape (C, C) = ({c}, {c}) where w2 is None; got {tuple(network.w1.shape)}")
    if network.w2 is not None and network.w2.shape[0] != c:
        raise ValueError(f"w2 must have shape (C, H) = ({c}, {network.w1.shape[0]}); got {tuple(network.w2.shape)}")
    checks.like("residual", residual, "x", x)  # type: ignore[arg-type]
    checks.one_of("ties", ties, TIES)
    checks.one_of("epilogue", epilogue, activations.EPILOGUES)
    checks.number("epilogue_slope", epilogue_slope)
    checks.number("max_weight", max_weight)
    if not 0 <= max_weight <= 1:  # type: ignore[operator]
        raise ValueError(f"max_weight must lie in [0, 1]; got {max_weight}")


def _formula(x: Tensor, *args: object) -> Tensor | tuple[Tensor, Tensor]:
    network, residual = args[:10] + args[11:16], args[10]
    max_weight, ties, epilogue, epilogue_slope = args[16:]
    p, _, _ = descriptor(x, max_weight, ties)  # type: ignore[arg-type]
    out = gates(p, *network)
    gate, *stats = out if isinstance(out, tuple) else (out,)
    y = scaled(x, gate, residual, None, epilogue, epilogue_slope)  # type: ignore[arg-type]
    return (y, stats[0]) if stats else y


def _save(args: tuple, outs: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, residual, epilogue = args[0], args[11], args[19]
    need = activations.needs_aux(epilogue, residual is not None)
    aux = {"output": outs[0], "residual": residual, None: None}[need]
    return (x, aux, outs[1], outs[2], *args[1:11]), (*args[12:], residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, aux, state, index, *weights = saved
    dy = match(grads[0], x)
    dx, dresidual, *dweights = pool_mlp_scale_bwd(x, dy, aux, state, index, *weights, *consts)
    if consts[-1] and consts[7] == "identity":
        dresidual = dy
    return (
        dx,
        *or_none(tuple(dweights), needs[1:11]),
        dresidual if consts[-1] else None,
    )


def _public(args: tuple, outs: tuple[Tensor, Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    if args[15] != "batch":
        return outs[0]
    found = statistics(Mlp(*args[1:11], *args[12:17]), outs[1])
    # Of no sample there are none. The C++ kernel has zeros there, which its backward multiplies by nothing.
    empty = isinstance(args[0], Tensor) and args[0].shape[0] == 0  # a Proxy of torch.fx has no shape to look at
    return outs[0], torch.full_like(found, torch.nan) if empty else found


def _reduces(x: Tensor, w1: Tensor, *rest: object) -> int:
    return (x[0, 0].numel() if x.numel() else 1) + x.shape[1] + w1.shape[0]


_SE = dict(w1=(4, 32), b1=(4,), w2=(32, 4), b2=(32,))


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=_public,
    alone=lambda *args: args[15] != "batch",
    maps=("x", "residual"),
    budget=lambda x, *args: (3 if args[10] is not None else 2, 1),
    reduces=_reduces,
    opens=True,
    cases=[
        *(
            case("bench", x=(n, c, s, s), w1=(c // 16, c), b1=(c // 16,), w2=(c, c // 16), b2=(c,))
            for n, c, s in (
                (8, 64, 56), (8, 256, 56), (8, 512, 28), (8, 1024, 14), (8, 2048, 7), (1, 64, 56), (1, 1024, 14),
            )
        ),
        case(x=(2, 32, 7, 7), **_SE),
        case(x=(2, 32, 13), **_SE, act="silu", residual=(2, 32, 13), epilogue="relu"),
        case(x=(1, 32, 3, 4, 5), **_SE, gate="hard_sigmoid", residual=(1, 32, 3, 4, 5)),
        case(x=(3, 17, 5, 5), w1=(17, 17, 1, 1), b1=(17,), gate="hard_sigmoid"),
        case(x=(2, 32, 7, 5), **_SE, max_weight=0.5),
        case(x=(2, 32, 7, 5), **_SE, max_weight=0.5, ties="first", residual=(2, 32, 7, 5), epilogue="silu"),
        case(x=(2, 32, 6, 6), **_SE, max_weight=1.0, epilogue="relu6"),
        case(x=(4, 24, 9, 1), w1=(3, 24), w2=(24, 3), act="gelu", epilogue="relu"),
        case(x=(2, 5, 1, 1), w1=(1, 5), b1=(1,), w2=(5, 1), b2=(5,)),
        case(x=(5, 16, 7, 7), w1=(6, 16), b1=(6,), w2=(16, 6), b2=(16,), norm="batch",
             norm_weight=(6,), norm_bias=(6,), epilogue="relu6"),
        case(x=(2, 16, 7, 7), w1=(6, 16), b1=(6,), w2=(16, 6), b2=(16,), norm="running",
             norm_weight=(6,), norm_bias=(6,), norm_mean=(6,), norm_var=(6,)),
        case(x=(2, 8, 5, 5), w1=(8, 8), b1=(8,), w2=(8, 8), b2=(8,), act="prelu", gate="prelu",
             act_weight=(8,), gate_weight=(8,)),
        case(x=(0, 4, 5, 5), w1=(2, 4), w2=(4, 2)),
        case(x=(1, 3, 127, 2), w1=(2, 3), w2=(3, 2)),
    ],
)  # fmt: skip
def pool_mlp_scale(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    act_weight: Tensor | None = None,
    gate_weight: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "relu",
    gate: str = "sigmoid",
    slope: float = 0.01,
    norm: str = "none",
    eps: float = 1e-5,
    max_weight: float = 0.0,
    ties: str = "split",
    epilogue: str = "identity",
    epilogue_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squeeze-and-excitation of a feature map, with the residual add and activation that follow it: two reads of x,
    one write.

    x: (N, C, *S) feature map
    w1 … gate_weight, act, gate, slope, norm, eps: the small network, as in `shared_mlp`
    residual: (N, C, *S) added after the gate, of x's dtype
    max_weight: share of the maximum in the descriptor; 0 is SE, 0.5 is timm's add_maxpool
    ties: whose the maximum's gradient is, as in `channel_pool`
    epilogue, epilogue_slope: activation after gate and residual, as `act` and `slope` of `scale`

    Returns y: (N, C, *S) in x's dtype and memory format; with norm="batch" also the statistics (2, H).
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, devices or options.
    """
    acc = accumulator(x.dtype)
    mlp = Mlp(w1, b1, w2, b2, norm_weight, norm_bias, norm_mean, norm_var, act_weight, gate_weight,
              act, gate, slope, norm, eps).cast(acc)  # fmt: skip
    p, maxima, index = descriptor(x, max_weight, ties)
    u, z = mlp.logits(p)
    y = like(x, scaled(x, mlp.gates(u), residual, None, epilogue, epilogue_slope))
    parts = [p.flatten()]
    if maxima is not None and keeps_max(max_weight, ties):
        parts.append(maxima.flatten())
    saved = torch.cat([*parts, pack(mlp, u, z)])
    return y, saved, x.new_empty((0,), dtype=torch.int64) if index is None else index


def _check_bwd(x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, index: Tensor, *args: object) -> None:
    checks.like("dy", dy, "x", x)
    _check(x, *args[:10], aux, *args[10:-1])


def compose_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, index: Tensor, network: Mlp,
    max_weight: float, ties: str, epilogue: str, slope: float, residual: bool,
    reduce: object, mlp_bwd: object, apply: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward out of its three parts; a backend that has no launch of its own for the whole brings its own
    parts."""
    n, c = x.shape[:2]
    pool, with_max = pool_of(max_weight), keeps_max(max_weight, ties)
    p, values, state = unpack(saved, n, c, with_max)
    outputs = n * c
    cast = network.cast(saved.dtype)
    tail = 2 * network.w1.shape[0] if network.norm == "batch" else 0
    u = state[state.numel() - tail - outputs : state.numel() - tail].view(n, c)
    gate = cast.gates(u)
    dgate, e, count = reduce(x, dy, gate, aux, values, epilogue, slope, pool, ties, residual)  # type: ignore[operator]
    dp, *dweights = mlp_bwd(p, dgate, state, *network)  # type: ignore[operator]
    if pool == "mean_max":
        dp = torch.stack([(1 - max_weight) * dp, max_weight * dp])
    written = keeps_e(epilogue, residual)
    through = "identity" if residual else epilogue
    dx = apply(x, e if written else dy, gate, dp, values, index, count, through, slope, pool, ties)  # type: ignore[operator]
    return (dx, e, *dweights)


def _bwd_budget(
    x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, index: Tensor, *args: object
) -> tuple[int, int]:
    max_weight, ties, epilogue, _, residual = args[15:]
    with_x = keeps_max(max_weight, ties) or (epilogue != "identity" and not residual)  # type: ignore[arg-type]
    return 3 + (aux is not None) + with_x, 1 + keeps_e(epilogue, residual)  # type: ignore[arg-type]


@op(check=_check_bwd, maps=("x", "dy", "aux"), budget=_bwd_budget)
def pool_mlp_scale_bwd(
    x: Tensor,
    dy: Tensor,
    aux: Tensor | None,
    saved: Tensor,
    index: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    act_weight: Tensor | None,
    gate_weight: Tensor | None,
    act: str,
    gate: str,
    slope: float,
    norm: str,
    eps: float,
    max_weight: float,
    ties: str,
    epilogue: str,
    epilogue_slope: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `pool_mlp_scale`: dx, dresidual (empty where it is dy), and that of each of the network's ten
    tensors."""
    network = Mlp(w1, b1, w2, b2, norm_weight, norm_bias, norm_mean, norm_var, act_weight, gate_weight,
                  act, gate, slope, norm, eps)  # fmt: skip
    return compose_bwd(  # type: ignore[return-value]
        x, dy, aux, saved, index, network, max_weight, ties, epilogue, epilogue_slope, residual,
        pool_scale_reduce.eager, shared_mlp_bwd.eager, pool_scale_apply.eager,
    )  # fmt: skip
