"""The small network between pool and apply: one or two dense layers, shared by all descriptors of a sample.

    z = W1 p + b1,  h = act(norm(z)),  u = Σ_p (W2 h + b2),  gate = g(u)          two layers
    u = Σ_p (W1 p + b1),               gate = g(u)                                one layer (w2 is None)

Σ_p runs over one descriptor, or over mean and max as in CBAM (arXiv:1807.06521, eq. 2); SE's excitation is
arXiv:1709.01507, eq. 3. `norm` is a BatchNorm over the N descriptors of a batch (rexnet's SE), by batch or by running
statistics.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import accumulator
from ..registry import case, op
from . import activations, checks

NORMS = ("none", "batch", "running")


class Mlp(NamedTuple):
    """The parameters of the small network, as every op that holds one takes them, in this order."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_mean: Tensor | None
    norm_var: Tensor | None
    act_weight: Tensor | None
    gate_weight: Tensor | None
    act: str
    gate: str
    slope: float
    norm: str
    eps: float

    def cast(self, acc: torch.dtype) -> "Mlp":
        """The same network in the dtype of its arithmetic, weights of 1×1 convolutions flattened to (rows, columns)."""
        flat = lambda w: w.flatten(1) if w is not None and w.dim() > 2 else w
        tensors = [t if t is None else flat(t).to(acc) for t in self[:10]]
        return Mlp(*tensors, *self[10:])  # type: ignore[arg-type,call-arg]

    def check(self, rows: int, columns: int) -> None:
        """Complains about a network that doesn't map (rows, columns) descriptors to gates."""
        checks.tensor("w1", self.w1)
        checks.weight("w1", self.w1, None, columns, "(H, C)")
        checks.number("slope", self.slope)
        checks.number("eps", self.eps)
        hidden = self.w1.shape[0]
        checks.weight("w2", self.w2, None, hidden, "(C, H)")
        checks.shaped("b1", self.b1, (hidden,), "(H,)")
        if self.w2 is not None:
            checks.shaped("b2", self.b2, (self.w2.shape[0],), "(C,)")
        elif self.b2 is not None:
            raise ValueError("b2 needs w2; got a bias of a second layer that isn't there")
        checks.one_of("act", self.act, activations.ACTS)
        checks.one_of("gate", self.gate, activations.GATES)
        checks.one_of("norm", self.norm, NORMS)
        for name in ("norm_weight", "norm_bias", "norm_mean", "norm_var"):
            checks.shaped(name, getattr(self, name), (hidden,), "(H,)")
        if self.norm != "none" and self.w2 is None:
            raise ValueError(f"norm={self.norm!r} stands between two layers; got w2=None")
        if self.norm == "running" and (self.norm_mean is None or self.norm_var is None):
            raise ValueError("norm='running' needs norm_mean and norm_var; got None")
        if self.norm == "batch" and rows == 1:
            raise ValueError("norm='batch' needs more than 1 descriptor per channel when training; got a batch of 1")
        outputs = hidden if self.w2 is None else self.w2.shape[0]
        for name, used, width in (("act_weight", self.act, hidden), ("gate_weight", self.gate, outputs)):
            slopes = getattr(self, name)
            if used == "prelu" and slopes is None:
                raise ValueError(f"{name} must hold the slopes of prelu; got None")
            if slopes is not None:
                checks.tensor(name, slopes)
            if slopes is not None and tuple(slopes.shape) not in ((1,), (width,)):
                raise ValueError(f"{name} must have shape (1,) or ({width},); got {tuple(slopes.shape)}")

    def normed(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ẑ (normalised, before its affine), and the mean and biased variance that made it; z (rows, H)."""
        if self.norm == "batch":
            mean, var = z.mean(0), z.var(0, unbiased=False)
        else:
            assert self.norm_mean is not None
            assert self.norm_var is not None
            mean, var = self.norm_mean, self.norm_var
        return (z - mean) * torch.rsqrt(var + self.eps), mean, var

    def hidden(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of the activation, and ẑ where there is a norm."""
        if self.norm == "none":
            return z, None
        zhat, _, _ = self.normed(z)
        v = zhat if self.norm_weight is None else zhat * self.norm_weight
        return (v if self.norm_bias is None else v + self.norm_bias), zhat

    def logits(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """u (N, C), and z (P·N, H) where there are two layers; p (N, C) or (P, N, C) in the arithmetic's dtype."""
        p = p if p.dim() == 3 else p.unsqueeze(0)
        z = F.linear(p.flatten(0, 1), self.w1, self.b1)
        if self.w2 is None:
            return z.unflatten(0, p.shape[:2]).sum(0), None
        h = activations.apply(self.act, self.hidden(z)[0], self.slope, self.act_weight)
        return F.linear(h, self.w2, self.b2).unflatten(0, p.shape[:2]).sum(0), z

    def gates(self, u: Tensor) -> Tensor:
        """gate = g(u)."""
        return activations.apply(self.gate, u, self.slope, self.gate_weight)


def pack(mlp: Mlp, u: Tensor, z: Tensor | None) -> Tensor:
    """What backward needs of the network, in one flat tensor: z | u | batch mean | batch variance (csrc/mlp.h reads it
    so)."""
    parts = [u.flatten()]
    if z is not None:
        parts.insert(0, z.flatten())
        if mlp.norm == "batch":
            _, mean, var = mlp.normed(z)
            parts += [mean, var]
    return torch.cat(parts)


def statistics(mlp: Mlp, saved: Tensor) -> Tensor:
    """(2, H): the batch's mean and biased variance, for whoever keeps running statistics."""
    hidden = mlp.w1.shape[0]
    return saved.narrow(0, saved.numel() - 2 * hidden, 2 * hidden).view(2, hidden).clone()


def backward(mlp: Mlp, p: Tensor, saved: Tensor, dgate: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """dp and the gradients of the ten tensors of `mlp`, which is already cast; p, saved, dgate in the same dtype."""
    many = p.dim() == 3
    p = p if many else p.unsqueeze(0)
    count, n, hidden = p.shape[0], p.shape[1], mlp.w1.shape[0]
    two = mlp.w2 is not None
    outputs = mlp.w2.shape[0] if two else hidden  # type: ignore[union-attr]
    rows = p.flatten(0, 1)
    at = count * n * hidden if two else 0
    u = saved[at : at + n * outputs].view(n, outputs)
    du = dgate * activations.grad(mlp.gate, u, mlp.slope, mlp.gate_weight)
    grads: list[Tensor | None] = [None] * 10
    if mlp.gate == "prelu":
        g = torch.where(u > 0, 0, u) * dgate
        grads[9] = g.sum(0) if mlp.gate_weight.numel() == outputs else g.sum().view(1)  # type: ignore[union-attr]
    d = du.expand(count, n, outputs).reshape(count * n, outputs)
    if two:
        z = saved[:at].view(count * n, hidden)
        v, zhat = mlp.hidden(z)
        h = activations.apply(mlp.act, v, mlp.slope, mlp.act_weight)
        grads[2] = d.t() @ h
        grads[3] = d.sum(0) if mlp.b2 is not None else None
        dh = d @ mlp.w2  # type: ignore[operator]
        if mlp.act == "prelu":
            g = torch.where(v > 0, 0, v) * dh
            grads[8] = g.sum(0) if mlp.act_weight.numel() == hidden else g.sum().view(1)  # type: ignore[union-attr]
        d = dh * activations.grad(mlp.act, v, mlp.slope, mlp.act_weight)
        if zhat is not None:
            grads[4] = (d * zhat).sum(0) if mlp.norm_weight is not None else None
            grads[5] = d.sum(0) if mlp.norm_bias is not None else None
            dz = d if mlp.norm_weight is None else d * mlp.norm_weight
            if mlp.norm == "batch":
                dz = dz - dz.mean(0) - zhat * (dz * zhat).mean(0)
                var = saved.narrow(0, saved.numel() - hidden, hidden)
            else:
                var = mlp.norm_var  # type: ignore[assignment]
            d = dz * torch.rsqrt(var + mlp.eps)
            if mlp.norm == "running":
                grads[6] = -d.sum(0)
                grads[7] = -0.5 * (dz * zhat).sum(0) / (var + mlp.eps)
    grads[0] = d.t() @ rows
    grads[1] = d.sum(0) if mlp.b1 is not None else None
    dp = (d @ mlp.w1).view(p.shape)
    return (dp if many else dp[0]), grads


def gradients_like(mlp: Mlp, grads: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Each gradient in its own tensor's shape and dtype; an empty tensor where there is none (an operator can't return
    None)."""
    empty = mlp.w1.new_empty
    pairs = zip(mlp[:10], grads, strict=True)
    return tuple(empty(0) if g is None or t is None else g.reshape(t.shape).to(t.dtype) for t, g in pairs)


def or_none(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The operator's gradients as autograd wants them; None too for a tensor that was given and isn't used, such as the
    slopes of an activation that has none."""
    return tuple(g if need and g.numel() else None for g, need in zip(grads, needs, strict=True))


def _check(pooled: Tensor, *mlp: object) -> None:
    checks.tensor("pooled", pooled)
    if not (pooled.dim() == 2 or (pooled.dim() == 3 and pooled.shape[0] in (1, 2))):
        raise ValueError(f"pooled must have shape (N, C) or (2, N, C); got {tuple(pooled.shape)}")
    network = Mlp(*mlp)  # type: ignore[arg-type]
    network.check(pooled.shape[:-1].numel(), pooled.shape[-1])
    checks.same_device("pooled", pooled, **dict(zip(Mlp._fields[:10], network[:10], strict=True)))


def formula(pooled: Tensor, *mlp: object) -> Tensor | tuple[Tensor, Tensor]:
    """The equations, differentiable: the gate, and with norm="batch" the statistics."""
    network = Mlp(*mlp).cast(accumulator(pooled.dtype))  # type: ignore[arg-type]
    u, z = network.logits(pooled.to(accumulator(pooled.dtype)))
    gate = network.gates(u)
    if network.norm != "batch":
        return gate
    assert z is not None
    return gate, torch.stack(network.normed(z)[1:])


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    return (*args[:11], outs[1]), args[11:]


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    outs = shared_mlp_bwd(saved[0], grads[0], saved[11], *saved[1:11], *consts)
    return or_none(outs, needs)


def _public(args: tuple, outs: tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    mlp = Mlp(*args[1:])
    return (outs[0], statistics(mlp, outs[1])) if mlp.norm == "batch" else outs[0]


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=_public,
    alone=lambda *args: args[14] != "batch",
    maps=(),
    budget=lambda *args: (0, 0),
    reduces=lambda pooled, w1, *rest: pooled.shape[-1] * w1.shape[0],
    cases=[
        case("bench", pooled=(8, 2048), w1=(128, 2048), b1=(128,), w2=(2048, 128), b2=(2048,)),
        case(pooled=(2, 64), w1=(8, 64), b1=(8,), w2=(64, 8), b2=(64,)),
        case(pooled=(3, 17), w1=(5, 17, 1, 1), w2=(17, 5, 1, 1), act="gelu"),
        case(pooled=(2, 3, 31), w1=(4, 31), b1=(4,), w2=(31, 4), b2=(31,)),
        case(pooled=(4, 33), w1=(33, 33), b1=(33,), gate="hard_sigmoid"),
        case(pooled=(5, 24), w1=(8, 24), b1=(8,), w2=(24, 8), b2=(24,), act="silu", gate="clamp"),
        case(pooled=(2, 9), w1=(7, 9), w2=(9, 7), act="leaky_relu", slope=0.1, gate="relu"),
        case(pooled=(2, 9), w1=(7, 9), w2=(9, 7), act="hardswish", gate="identity"),
        case(
            pooled=(3, 8), w1=(8, 8), w2=(8, 8), act="prelu", gate="prelu", act_weight=(8,), gate_weight=(1,)
        ),
        case(
            pooled=(5, 16), w1=(6, 16), b1=(6,), w2=(16, 6), norm="batch", norm_weight=(6,), norm_bias=(6,)
        ),
        case(
            pooled=(5, 16), w1=(6, 16), w2=(16, 6), norm="running", norm_weight=(6,), norm_bias=(6,),
            norm_mean=(6,), norm_var=(6,),
        ),
        case(pooled=(1, 5), w1=(1, 5), b1=(1,), w2=(5, 1), b2=(5,)),
        case(pooled=(0, 6), w1=(2, 6), w2=(6, 2)),
    ],
)  # fmt: skip
def shared_mlp(
    pooled: Tensor,
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
    act: str = "relu",
    gate: str = "sigmoid",
    slope: float = 0.01,
    norm: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Turns descriptors into gates: one or two dense layers with an activation between, a gate at the end.

    pooled: (N, C), or (2, N, C): two descriptors whose logits are added before the gate (CBAM's mean and max)
    w1, b1: (H, C) and (H,) first layer; a 1×1 convolution's weight (H, C, 1, …) fits as it is
    w2, b2: (C, H) and (C,) second layer; None: one layer, w1 (C, C), and no activation
    norm_weight, norm_bias, norm_mean, norm_var: (H,) BatchNorm after the first layer
    act_weight, gate_weight: (1,) or the width, the slopes of prelu
    act: "identity" | "relu" | "relu6" | "leaky_relu" | "silu" | "gelu" | "hardswish" | "prelu"
    gate: "sigmoid" | "hard_sigmoid" (relu6(u+3)/6) | "clamp" (to [0, 1], GhostNet) | "relu" | "prelu" | "identity"
    slope: negative slope of leaky_relu
    norm: "none" | "batch" (statistics of this batch; the result is then a pair) | "running" (norm_mean and norm_var)
    eps: added to the variance

    Returns the gate (N, C) in the arithmetic's dtype, float32 for half-precision descriptors; with norm="batch" also
    the statistics (2, H), mean and biased variance, for running averages.
    Raises ValueError or TypeError, naming the argument, for shapes that don't fit, unknown options, a batch of 1 with
    norm="batch".
    """
    acc = accumulator(pooled.dtype)
    mlp = Mlp(w1, b1, w2, b2, norm_weight, norm_bias, norm_mean, norm_var, act_weight, gate_weight,
              act, gate, slope, norm, eps).cast(acc)  # fmt: skip
    u, z = mlp.logits(pooled.to(acc))
    return mlp.gates(u), pack(mlp, u, z)


def _check_bwd(pooled: Tensor, dgate: Tensor, saved: Tensor, *mlp: object) -> None:
    _check(pooled, *mlp)
    checks.tensor("dgate", dgate)


@op(check=_check_bwd, maps=(), budget=lambda *args: (0, 0))
def shared_mlp_bwd(
    pooled: Tensor,
    dgate: Tensor,
    saved: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `shared_mlp`: dpooled and that of each of its ten tensors, empty where there is none."""
    acc = accumulator(pooled.dtype)
    mlp = Mlp(w1, b1, w2, b2, norm_weight, norm_bias, norm_mean, norm_var, act_weight, gate_weight,
              act, gate, slope, norm, eps)  # fmt: skip
    dp, grads = backward(mlp.cast(acc), pooled.to(acc), saved, dgate.to(acc))
    return (dp.to(pooled.dtype), *gradients_like(mlp, grads))  # type: ignore[return-value]
