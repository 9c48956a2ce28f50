"""ShuffleAttention and SpatialGroupEnhance against the papers' equations, element by element, in float64.

No release of either can be installed, so the equations are written twice: here in index form, with loops over samples,
groups and channels; in the library as tensor operations (formula, eager form) and as closed-form gradients.
"""

import copy
import math

import pytest
import torch
from torch import nn

from fused_attn import OPS, ShuffleAttention, SpatialGroupEnhance, ops, testing, use_backend
from tests.support import redraw, relative, step

F64 = torch.float64
BACKENDS = testing.candidates("cpu")


def sigmoid(v):
    return 1 / (1 + torch.exp(-v))


def shuffle_attention(x, cweight, cbias, sweight, sbias, weight, bias, eps):
    """Zhang & Yang, eq. 2-5, plane by plane; x (N, C, H, W), parameters of K elements."""
    n, c, k = x.shape[0], x.shape[1], cweight.numel()
    size = x.shape[2] * x.shape[3]
    gated = {}
    for i in range(n):
        for j in range(c):
            plane, m = x[i, j], j % k
            mean = plane.sum() / size
            if (j // k) % 2 == 0:
                gated[i, j] = plane * sigmoid(cweight[m] * mean + cbias[m])
            else:
                var = ((plane - mean) ** 2).sum() / size
                norm = (plane - mean) / torch.sqrt(var + eps) * weight[m] + bias[m]
                gated[i, j] = plane * sigmoid(sweight[m] * norm + sbias[m])
    order = [j // 2 + (c // 2 if j % 2 else 0) for j in range(c)]
    return torch.stack([torch.stack([gated[i, order[j]] for j in range(c)]) for i in range(n)])


def group_enhance(x, weight, bias, eps):
    """Li et al., eq. 1-4, position by position within a group; the unbiased deviation of the authors' code."""
    n, c, g = x.shape[0], x.shape[1], weight.numel()
    per, size = c // g, x.shape[2] * x.shape[3]
    samples = []
    for i in range(n):
        planes = []
        for j in range(g):
            members = [x[i, j * per + m] for m in range(per)]
            t = sum(plane * (plane.sum() / size) for plane in members)
            mean = t.sum() / size
            std = torch.sqrt(((t - mean) ** 2).sum() / (size - 1))
            gate = sigmoid(weight[j] * ((t - mean) / (std + eps)) + bias[j])
            planes += [plane * gate for plane in members]
        samples.append(torch.stack(planes))
    return torch.stack(samples)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_()


def assert_same(got, want, inputs):
    assert relative(got, want) < 1e-12
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    mine, theirs = torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy)
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("c", "k", "h", "w"), [(16, 2, 5, 4), (6, 3, 3, 7), (40, 1, 2, 2), (68, 17, 3, 3)])
def test_shuffle_attention_by_the_paper(c, k, h, w, backend, memory_format):
    x = (drawn(2, c, h, w).detach() + 0.5).contiguous(memory_format=memory_format).requires_grad_()
    parameters = [drawn(k, seed=i + 1) for i in range(6)]
    r = drawn(2, c, h, w, seed=8).detach().contiguous(memory_format=memory_format).requires_grad_()
    with use_backend(backend):
        assert_same(
            ops.plane_gate_shuffle(x, *parameters, eps=1e-3), shuffle_attention(x, *parameters, 1e-3), [x, *parameters]
        )
        got = ops.plane_gate_shuffle(x, *parameters, r, 1e-3, "relu")
        assert_same(got, torch.relu(shuffle_attention(x, *parameters, 1e-3) + r), [x, r, *parameters])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("c", "g", "h", "w"), [(16, 4, 5, 4), (6, 6, 3, 7), (19, 1, 2, 2), (36, 2, 3, 3)])
def test_group_enhance_by_the_paper(c, g, h, w, backend, memory_format):
    x = (drawn(2, c, h, w).detach() + 0.5).contiguous(memory_format=memory_format).requires_grad_()
    parameters = [drawn(g, seed=i + 1) for i in range(2)]
    r = drawn(2, c, h, w, seed=8).detach().contiguous(memory_format=memory_format).requires_grad_()
    with use_backend(backend):
        got = ops.group_similarity_scale(x, *parameters, eps=1e-3)
        assert_same(got, group_enhance(x, *parameters, 1e-3), [x, *parameters])
        got = ops.group_similarity_scale(x, *parameters, r, 1e-3, "relu")
        assert_same(got, torch.relu(group_enhance(x, *parameters, 1e-3) + r), [x, r, *parameters])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shuffle_at_its_start_halves_nothing(backend):
    """As initialised both gates are sigmoid(1) everywhere, so that the output is the shuffled input times that."""
    x = torch.arange(256.0, dtype=F64).view(1, 256, 1, 1).expand(2, 256, 3, 3).contiguous()
    with use_backend(backend):
        y = ShuffleAttention(256, dtype=F64)(x)
    want = [j // 2 + (128 if j % 2 else 0) for j in range(256)]
    assert torch.allclose(y, torch.tensor(want, dtype=F64).view(1, 256, 1, 1) / (1 + math.exp(-1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_gives_nan(backend):
    """The unbiased deviation of one position is 0/0, in the authors' code and here."""
    x = torch.randn(2, 8, 1, 1, requires_grad=True)
    with use_backend(backend):
        y = SpatialGroupEnhance(4)(x)
    assert y.isnan().all()
    assert torch.autograd.grad(y.sum(), x)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_map_has_no_slope(backend):
    """std = 0: torch lets no gradient through it, and nor do we."""
    x = torch.ones(2, 8, 3, 3, dtype=F64, requires_grad=True)
    w, b = drawn(4), drawn(4, seed=1)
    op = OPS["group_similarity_scale"]
    with use_backend(backend):
        got = op(x, w, b)
    want = op.formula(x, w, b, None, 1e-5, "identity", 0.01)
    assert_same(got, want, [x, w, b])


def test_bias_starts_where_it_is_told():
    assert (SpatialGroupEnhance(3).bias == 1).all()
    assert (SpatialGroupEnhance(3, bias_init=0).bias == 0).all()
    assert (SpatialGroupEnhance(3).weight == 0).all()


def test_state_dict_keys():
    shapes = {k: tuple(v.shape) for k, v in ShuffleAttention(256).state_dict().items()}
    one = (1, 2, 1, 1)
    assert shapes == dict(cweight=one, cbias=one, sweight=one, sbias=one, **{"gn.weight": (2,), "gn.bias": (2,)})
    shapes = {k: tuple(v.shape) for k, v in SpatialGroupEnhance(32).state_dict().items()}
    assert shapes == dict(weight=(1, 32, 1, 1), bias=(1, 32, 1, 1))


@pytest.mark.parametrize("size", [(13,), (5, 4), (3, 2, 4)], ids=["1d", "2d", "3d"])
def test_the_equations_are_the_op(size):
    """Where the plan doesn't hold the module runs plain PyTorch: the same numbers."""
    module = redraw(ShuffleAttention(24, 3, dtype=F64))
    x = drawn(2, 24, *size)
    fused, calls = module(x, x, "relu"), []
    with module.gn.register_forward_hook(lambda *_: calls.append(1)):
        assert relative(fused, module(x, x, "relu")) < 1e-12
    assert calls
    module = redraw(SpatialGroupEnhance(3, dtype=F64))
    fused = module(x, x, "relu")
    parametrised = copy.deepcopy(module)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Identity())
    assert relative(fused, parametrised(x, x, "relu")) < 1e-12


def test_wrong_arguments():
    with pytest.raises(ValueError, match="multiple of 2·groups"):
        ShuffleAttention(64)
    with pytest.raises(ValueError, match="groups"):
        SpatialGroupEnhance(0)
    with pytest.raises(ValueError, match="weight must have one element per group"):
        SpatialGroupEnhance(5)(torch.randn(1, 8, 3, 3))
    with pytest.raises(ValueError, match="cweight must have"):
        ShuffleAttention(128)(torch.randn(1, 96 + 1, 3, 3))


def test_copies():
    x = torch.randn(2, 128, 5, 5)
    for module in (redraw(ShuffleAttention(128)), redraw(SpatialGroupEnhance(8))):
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), module(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), module(x))
        step(module, x)


# ---- channel_pool(pool="mean_var")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (28, 28), (57, 63)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_beside_a_large_mean(backend, size, dtype, layout):
    """Mean 1000, deviation 0.01: E[x²] − E[x]² would have no digit of it left in float32."""
    draw = torch.Generator().manual_seed(3)
    noise, offset = (1e-2, 1e3) if dtype == torch.float32 else (1.0, 60.0)
    x = testing.arrange((offset + noise * torch.randn(2, 37, *size, generator=draw, dtype=F64)).to(dtype), layout)
    with use_backend(backend):
        mean, var = ops.channel_pool(x, "mean_var")
    flat = x.double().flatten(2)
    assert mean.dtype == var.dtype == torch.float32
    assert relative(mean, flat.mean(-1)) < 1e-7
    assert float(((var - flat.var(-1, correction=0)) / flat.var(-1, correction=0)).abs().max()) < 2e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_where_the_first_value_is_far_from_the_rest(backend, layout):
    """What everything is taken relative to must not matter."""
    x = 1e3 + torch.randn(1, 20, 64, 64, generator=torch.Generator().manual_seed(3), dtype=F64)
    x[:, :, 0, 0] = 0
    x = testing.arrange(x.float(), layout)
    with use_backend(backend):
        _, var = ops.channel_pool(x, "mean_var")
    want = x.double().flatten(2).var(-1, correction=0)
    assert float(((var - want) / want).abs().max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_values_have_an_infinite_mean(backend):
    x = torch.randn(2, 4, 9, 5)
    x[0, 0, 0, 0], x[0, 1, 3, 3], x[0, 2, 0, 0] = math.inf, -math.inf, math.nan
    for layout in ("contiguous", "channels_last"):
        with use_backend(backend):
            mean, var = ops.channel_pool(testing.arrange(x, layout), "mean_var")
        assert mean[0, 0] == math.inf
        assert mean[0, 1] == -math.inf
        assert mean[0, 2].isnan()
        assert var[0, :3].isnan().all()
        assert mean[1].isfinite().all()
        assert var[1].isfinite().all()
