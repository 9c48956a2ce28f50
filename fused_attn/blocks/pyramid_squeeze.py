"""Pyramid squeeze attention: convolutions of four sizes, squeezed by one shared SE, weighed against each other.

    F_i = conv_i(x),   Z_i = sigmoid(W2 relu(W1 mean_s F_i + b1) + b2),   a = softmax_i Z_i,   y = [a_i·F_i]

Zhang et al., "EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional Neural Network", arXiv:2105.14447,
§3.2.

What differs between published versions:
    order     the authors' code puts the last branch's channels first in y, which checkpoints depend on; the paper the
              first
    softmax   over values that went through a sigmoid already, in the authors' code: weights from 0.11 to 0.48
    SE        one for all branches; copies in other repositories have one for each, not registered as parameters
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.branch_softmax import gates_of
from ..plan import Plan, Refused, Rule, by_structure, fingerprint, path, register
from ..registry import Block, case
from .competing import Competing, Head, convolution, foreign

_CONVS = ("conv_1", "conv_2", "conv_3", "conv_4")
_WEIGHTS = "d40162a8007a"  # the authors' SEWeightModule.forward


class _Pyramid(Head):
    """The convolutions are called, `se` is the head."""

    __slots__ = ("convs", "merge", "rank")

    def __init__(self, module: nn.Module, weights: str | None, merge: str, dims: int = 2) -> None:
        skipped = ("se", "softmax") if weights is not None else ("se",)
        Plan.__init__(self, module, skipped, ("split_channel",) if weights is not None else ())
        children: dict[str, Any] = vars(module)["_modules"]
        se = children["se"]
        if weights is not None:
            if type(se).__name__ != "SEWeightModule" or fingerprint(type(se).forward) != weights:
                raise Refused(f"se is a {path(type(se))}, whose forward isn't one that is known")
            self.usual(self, children, None, "softmax")
        inner = Plan(se, ("avg_pool", "fc1", "relu", "fc2", "sigmoid"))
        self.inner = ((se, inner),)
        self.usual(inner, vars(se)["_modules"], "avg_pool", None)
        self.read(inner, "fc1", "fc2", "relu", None, "sigmoid", vars(se)["_modules"])
        if self.groups != 1:
            raise Refused(f"the layers of se have {self.groups} groups")
        self.convs, self.merge, self.rank = tuple(children[name] for name in _CONVS), merge, dims + 2
        self.outputs(len(self.convs), each=True)
        if weights is not None and vars(module)["split_channel"] != self.channels:
            raise Refused(f"split_channel is {vars(module)['split_channel']}, and se takes {self.channels}")

    def weigh(self, x: Tensor) -> Tensor:
        return self.weighed(tuple(conv(x) for conv in self.convs))

    def maps(self, x: Tensor) -> tuple[Tensor, ...] | None:
        return tuple(conv(x) for conv in self.convs) if x.dim() == self.rank else None

    def weighed(self, maps: tuple[Tensor, ...]) -> Tensor:
        return self.softmax(maps, each=True, merge=self.merge)

    def weighs(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], str]:
        excite, given = self.excite()
        count, channels, backwards = len(self.convs), self.channels, self.merge == "concat_reversed"

        def gates(p: Tensor, *tensors: Tensor) -> Tensor:
            p = p.unflatten(1, (count, channels))
            found = gates_of(excite(p.flip(1) if backwards else p, *tensors), count, channels, 1)
            return (found.flip(1) if backwards else found).flatten(1)

        return gates, tuple(given), self.merge


class _Weights(nn.Module):
    """The shared squeeze-and-excitation, which gives the weights alone."""

    def __init__(self, channels: int, reduction: int, **where: Any) -> None:
        super().__init__()
        hidden = channels // reduction
        if hidden == 0:
            raise ValueError(f"planes must be at least {4 * reduction}, 4·reduction; got {4 * channels}")
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, hidden, 1, **where)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1, **where)
        self.sigmoid = nn.Sigmoid()

    def forward(self, p: Tensor) -> Tensor:
        return self.sigmoid(self.fc2(self.relu(self.fc1(p[..., None, None])))).flatten(1)


class PyramidSqueezeAttention(Competing):
    """Pyramid squeeze attention of feature maps (N, inplans, *S), with the authors' arguments and state_dict keys.

    inplans, planes: channels of x and of y; planes is a multiple of 4
    conv_kernels, conv_groups: of the four convolutions; stride: of all
    reduction: of the shared SE
    reverse: the last branch's channels come first in y, as in the authors' code and checkpoints
    dims: 1, 2 or 3 spatial dimensions

    Raises ValueError for channels that can't be shared out.
    """

    ahead: ClassVar[bool] = True

    def __init__(
        self,
        inplans: int,
        planes: int,
        conv_kernels: Sequence[int] = (3, 5, 7, 9),
        stride: int = 1,
        conv_groups: Sequence[int] = (1, 4, 8, 16),
        reduction: int = 16,
        reverse: bool = True,
        dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if planes % 4 or len(conv_kernels) != 4 or len(conv_groups) != 4:
            raise ValueError(
                f"planes must be a multiple of 4, with four conv_kernels and conv_groups; got planes={planes}, "
                f"{len(conv_kernels)} and {len(conv_groups)}"
            )
        self.split_channel, self.reverse = planes // 4, reverse
        self.inplans, self.dims = inplans, dims
        for name, kernel, groups in zip(_CONVS, conv_kernels, conv_groups, strict=True):
            conv = convolution(dims)(
                inplans, planes // 4, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False, **where
            )
            self.add_module(name, conv)
        self.se = _Weights(planes // 4, reduction, **where)
        self._finish()

    def _plan(self) -> Plan:
        return _Pyramid(self, None, "concat_reversed" if self.reverse else "concat", self.dims)

    def takes(self) -> tuple[int, int]:
        return self.inplans, self.dims

    def equations(self, x: Tensor) -> Tensor:
        maps = [getattr(self, name)(x) for name in _CONVS]
        gates = torch.softmax(torch.stack([self.se(m.flatten(2).mean(-1)) for m in maps], 1), 1)
        scaled = [m * gates[:, i].reshape(m.shape[:2] + (1,) * (m.dim() - 2)) for i, m in enumerate(maps)]
        return torch.cat(scaled[::-1] if self.reverse else scaled, 1)


def _authors(where: str) -> Rule:
    return Rule(
        where,
        foreign,
        lambda module: _Pyramid(module, _WEIGHTS, "concat_reversed"),
        {"forward": ("083fc0f23128",)},
        ahead=True,
    )


# The authors' repository is no package: its classes are named by wherever the file is imported from. The fingerprints
# are those of its published source (models/epsanet.py, models/SE_weight_module.py).
RULES = register(*(_authors(f"{where}.PSAModule") for where in ("models.epsanet", "epsanet", "EPSANet.models.epsanet")))
by_structure("PSAModule", _authors)

Block(
    name="pyramid_squeeze",
    module=PyramidSqueezeAttention,
    paper="Zhang et al., EPSANet: An Efficient Pyramid Squeeze Attention Block, https://arxiv.org/abs/2105.14447",
    ops=("branch_softmax",),
    ports=("PSAModule",),
    rules=RULES,
    cases=(
        case(args={"inplans": 64, "planes": 64}, x=(2, 64, 7, 7)),
        case(args={"inplans": 16, "planes": 64, "stride": 2, "reverse": False}, x=(3, 16, 9, 5)),
        case(
            args={
                "inplans": 12, "planes": 76, "conv_kernels": (1, 3, 5, 3), "conv_groups": (1, 1, 1, 1),
                "reduction": 5,
            },
            x=(2, 12, 6, 5),
        ),
        case(
            args={"inplans": 8, "planes": 32, "conv_groups": (1, 1, 2, 4), "reduction": 4, "dims": 1}, x=(2, 8, 13)
        ),
    ),
)  # fmt: skip
