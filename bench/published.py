"""Mechanisms that no package on PyPI has, as their users run them: each paper's equations in plain PyTorch, step by
step as the published modules take them. What the bench compares with; nothing of the library is in here.

Parameters have the names of the library's blocks, so that `load_state_dict` makes both compute the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PyramidSqueeze(nn.Module):
    """PSA behind its convolutions (EPSANet, arXiv:2105.14447): four branches, one SE for all, softmax over branches."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        part = channels // 4
        self.fc1 = nn.Conv2d(part, part // reduction, 1)
        self.fc2 = nn.Conv2d(part // reduction, part, 1)

    def forward(self, *branches: Tensor) -> Tensor:
        n, c, h, w = branches[0].shape
        feats = torch.cat(branches, 1).view(n, 4, c, h, w)
        gates = [torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(b, 1))))) for b in branches]
        weighted = feats * torch.softmax(torch.cat(gates, 1).view(n, 4, c, 1, 1), 1)
        return torch.cat([weighted[:, i] for i in reversed(range(4))], 1)


class SoftThreshold(nn.Module):
    """DRSN's shrinkage (doi:10.1109/TII.2019.2943898) as ports write it: |x| − τ, kept where it is positive."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, channels),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        size = torch.abs(x)
        mean = F.adaptive_avg_pool2d(size, 1).flatten(1)
        tau = (self.fc(mean) * mean)[..., None, None]
        sub = size - tau
        return torch.sign(x) * torch.max(sub, sub - sub)


class Shuffle(nn.Module):
    """Shuffle Attention (arXiv:2102.00240): half of each group gated by its mean, half by its normalised map."""

    def __init__(self, channels: int, groups: int = 64) -> None:
        super().__init__()
        part = channels // (2 * groups)
        self.groups = groups
        self.cweight = nn.Parameter(torch.randn(1, part, 1, 1))
        self.cbias = nn.Parameter(torch.randn(1, part, 1, 1))
        self.sweight = nn.Parameter(torch.randn(1, part, 1, 1))
        self.sbias = nn.Parameter(torch.randn(1, part, 1, 1))
        self.gn = nn.GroupNorm(part, part)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        a, b = x.reshape(n * self.groups, -1, h, w).chunk(2, 1)
        a = a * torch.sigmoid(self.cweight * F.adaptive_avg_pool2d(a, 1) + self.cbias)
        b = b * torch.sigmoid(self.sweight * self.gn(b) + self.sbias)
        out = torch.cat([a, b], 1).reshape(n, 2, c // 2, h, w)
        return out.transpose(1, 2).reshape(n, c, h, w)


class GroupEnhance(nn.Module):
    """Spatial Group-wise Enhance (arXiv:1905.09646): each group gated by its likeness to its own mean."""

    def __init__(self, groups: int = 64) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.randn(1, groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n * self.groups, -1, h, w)
        t = (x * F.adaptive_avg_pool2d(x, 1)).sum(1).reshape(n * self.groups, -1)
        t = t - t.mean(1, keepdim=True)
        t = (t / (t.std(1, keepdim=True) + 1e-5)).view(n, self.groups, h, w)
        gate = torch.sigmoid(t * self.weight + self.bias).view(n * self.groups, 1, h, w)
        return (x * gate).view(n, c, h, w)


def channel_norm_scale(z: Tensor, trunk: Tensor) -> Tensor:
    """Residual Attention's f2 (arXiv:1704.06904): logits normalised over channels."""
    return (1 + F.normalize(z, dim=1)) * trunk


def spatial_norm_scale(z: Tensor, trunk: Tensor) -> Tensor:
    """Residual Attention's f3: logits standardised over positions, through a sigmoid."""
    mean = z.mean((2, 3), keepdim=True)
    std = z.var((2, 3), unbiased=False, keepdim=True).sqrt()
    return (1 + torch.sigmoid((z - mean) / std)) * trunk


def sigmoid_scale(z: Tensor, trunk: Tensor) -> Tensor:
    """Residual Attention's f1: a sigmoid of the logits."""
    return (1 + torch.sigmoid(z)) * trunk


def product_merge(x: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
    """BAM's merge as published code has it (arXiv:1807.06514): both gates expanded, multiplied, through a sigmoid."""
    return x * (1 + torch.sigmoid(channel[..., None, None].expand_as(x) * spatial.expand_as(x)))


class Tail(nn.Module):
    """What ends a bottleneck: BatchNorm, a gate or none, the shortcut, ReLU."""

    def __init__(self, channels: int, gate: nn.Module | None) -> None:
        super().__init__()
        self.bn, self.gate, self.act = nn.BatchNorm2d(channels), gate, nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.bn(x)
        x = x if self.gate is None else self.gate(x)
        x += shortcut
        return self.act(x)  # type: ignore[no-any-return]


class Ahead(nn.Module):
    """What stands before the last convolution of EPSANet's bottleneck, behind the pyramid's own convolutions: PSA,
    BatchNorm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate, self.bn, self.act = PyramidSqueeze(channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, *branches: Tensor) -> Tensor:
        return self.act(self.bn(self.gate(*branches)))  # type: ignore[no-any-return]


class Inner(nn.Module):
    """What stands before the last convolution of an MBConv: BatchNorm, SiLU, a gate."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.bn, self.gate, self.act = nn.BatchNorm2d(channels), gate, nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.act(self.bn(x)))  # type: ignore[no-any-return]
