"""Ports' shrinkage modules are fused where their forward is proved to be one of the forms, and refused otherwise."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

from fused_attn import fuse_, unfuse_
from tests.support import redraw, relative, step, worst

F64 = torch.float64


def network(channels: int, outputs: int | None = None, norm: type = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, channels), norm(channels), nn.ReLU(inplace=True),
        nn.Linear(channels, outputs or channels), nn.Sigmoid(),
    )  # fmt: skip


class _Base(nn.Module):
    def __init__(self, channels: int = 6, outputs: int | None = None, norm: type = nn.BatchNorm1d) -> None:
        super().__init__()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = network(channels, outputs, norm)


def channelwise() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            x_raw = x
            x = torch.abs(x)
            x_abs = x
            x = self.gap(x)
            x = torch.flatten(x, 1)
            average = x
            x = self.fc(x)
            x = torch.mul(average, x)
            x = x.unsqueeze(2).unsqueeze(2)
            sub = x_abs - x
            zeros = sub - sub
            n_sub = torch.max(sub, zeros)
            return torch.mul(torch.sign(x_raw), n_sub)

    return Shrinkage


def shared() -> type:
    class RSBU_CS(_Base):
        def forward(self, x):
            size = x.abs()
            gap = self.gap(size).flatten(1)
            average = torch.mean(gap, dim=1, keepdim=True)
            tau = (average * self.fc(gap)).unsqueeze(2).unsqueeze(2)
            return x.sign() * torch.max(size - tau, size * 0)

    return RSBU_CS


def raw_pooling() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            gap = self.gap(x)
            gap = gap.view(gap.size(0), -1)
            tau = (gap * self.fc(gap))[:, :, None, None]
            sub = x.abs() - tau
            return torch.sign(x) * torch.max(sub, sub - sub)

    return Shrinkage


def without_factor() -> type:
    class RSBU_CW(_Base):
        def forward(self, x):
            tau = self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None]
            sub = x.abs() - tau
            return torch.sign(x) * torch.relu(sub)

    return RSBU_CW


FORMS = {
    "channel-wise": (channelwise, {}, ("own", "mean_abs")),
    "one threshold": (shared, {"outputs": 1}, ("mean", "mean_abs")),
    "one factor, thresholds by channel": (shared, {}, ("mean", "mean_abs")),
    "mean of x": (raw_pooling, {}, ("own", "mean")),
    "threshold is the share": (without_factor, {}, ("none", "mean_abs")),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, training: bool) -> None:
    make, options, expected = FORMS[form]
    plain = redraw(make()(**options).double()).train(training)
    fused = copy.deepcopy(plain)
    state = copy.deepcopy(fused.state_dict())
    model = nn.Sequential(fused)
    report = fuse_(model)
    assert report.fused == ["0"], report
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), state.values(), strict=True))
    plan = vars(fused)["_fused_attn_plan"]
    assert (plan.factor, plan.pool) == expected
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(2), dtype=F64)
    y, grads = step(fused, x)
    want, true = step(plain, x)
    assert relative(y, want) < 1e-12
    grads.pop("fc.0.bias"), true.pop("fc.0.bias")  # 0 in training but for rounding
    assert worst(grads, true) < 1e-9
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert relative(a, b) < 1e-12
    twin = copy.deepcopy(model)
    assert relative(twin(x), model(x)) < 1e-12
    unfuse_(model)
    assert type(fused) is type(plain)


def branch() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            tau = self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None]
            if x.shape[2] > 64:
                tau = tau * 2
            return torch.sign(x) * torch.relu(x.abs() - tau)

    return Shrinkage


def bound() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            tau = self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None]
            return torch.sign(x) * torch.relu(x.abs() - tau.clamp(max=1e6))

    return Shrinkage


def flag() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            tau = self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None] * self.training
            return torch.sign(x) * torch.relu(x.abs() - tau)

    return Shrinkage


def _threshold(x: Tensor, tau: Tensor) -> Tensor:
    return torch.sign(x) * torch.relu(x.abs() - tau)


def helper() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            return _threshold(x, self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None])

    return Shrinkage


def garrote() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            tau = self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None]
            return torch.sign(x) * torch.relu(x.abs() - tau * tau / x.abs())

    return Shrinkage


def writes_its_input() -> type:
    class Shrinkage(_Base):
        def forward(self, x):
            tau = self.fc(self.gap(x.abs()).flatten(1))[:, :, None, None]
            y = torch.sign(x) * torch.relu(x.abs() - tau)
            x.zero_()
            return y

    return Shrinkage


def unit() -> type:
    class RSBU_CW(_Base):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            tau = self.fc(self.gap(z.abs()).flatten(1))[:, :, None, None]
            return x + torch.sign(z) * torch.relu(z.abs() - tau)

    return RSBU_CW


REFUSED = {
    "branch": (branch, {}, "has a If in line"),
    "bound": (bound, {}, "has the number 1000000.0"),
    "flag": (flag, {}, "reads self.training"),
    "helper": (helper, {}, "uses _threshold"),
    "garrote": (garrote, {}, "agrees with none"),
    "writes its input": (writes_its_input, {}, "fails on a trial|changes its input"),
    "unit": (unit, {}, "further layers, conv"),
    "layer norm": (channelwise, {"norm": nn.LayerNorm}, "LayerNorm, not a BatchNorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Whatever isn't proved stays as it is, with the reason."""
    make, options, why = REFUSED[name]
    module = make()(**options)
    before = type(module)
    ((_, reason),) = fuse_(module).refused
    assert re.search(why, reason), reason
    assert type(module) is before


def test_maps_of_another_rank_are_left_to_the_original() -> None:
    module = redraw(channelwise()().double()).eval()
    x = torch.randn(6, 5, 7, dtype=F64)  # AdaptiveAvgPool2d takes (C, H, W); what follows makes little sense of it
    try:
        want = module(x)
    except (RuntimeError, ValueError) as error:
        want = type(error)
    fuse_(module)
    if isinstance(want, type):
        with pytest.raises(want):
            module(x)
    else:
        assert torch.equal(module(x), want)


class Shrinkage(_Base):
    """At a module's top level, where pickle finds it."""

    def forward(self, x: Tensor) -> Tensor:
        gap = self.gap(x.abs()).flatten(1)
        sub = x.abs() - (gap * self.fc(gap))[:, :, None, None]
        return torch.sign(x) * torch.max(sub, sub - sub)


def test_pickles() -> None:
    module = redraw(Shrinkage().double()).eval()
    fuse_(module)
    twin = pickle.loads(pickle.dumps(module))
    x = torch.randn(2, 6, 4, 4, dtype=F64)
    assert torch.equal(twin(x), module(x))
    assert type(unfuse_(twin)) is Shrinkage
