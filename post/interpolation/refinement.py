"""Layers that refine the flow and enlarge features, for the synthesis.

Source: Li et al. 2023 (AMT), arXiv 2304.09790. Attributes of the modules are named as in the released files
of GIMM-VFI.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from post.interpolation.correlation import CHANNELS
from post.interpolation.layers import StoredNorm, conv

SLOPE = 0.1


@dataclass(frozen=True)
class RefinementConfig:
    """Widths of a decoder."""

    doublings: int  # of height and width
    first: int  # size of the first convolution
    upsample: tuple[int, int]
    width: int
    side: int  # channels of the inner steps of a residual block
    outputs: int


@dataclass(frozen=True)
class UpdateConfig:
    """Widths of an update."""

    correlation: tuple[int, int]
    flow: tuple[int, int]
    motion: int
    hidden: int


def prelu(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    """Return a convolution and its activation."""
    return nn.Sequential(conv(inputs, outputs, size), nn.PReLU(outputs))


class Residual(nn.Module):
    """Five convolutions; two of them change only the last channels."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = prelu(width, width), prelu(side, side)
        self.conv3, self.conv4 = prelu(width, width), prelu(side, side)
        self.conv5, self.prelu = conv(width, width), nn.PReLU(width)
        self._side = side

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        for whole, part in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            for layer in whole:  # one by one and in place: at full size each takes a large part of memory
                inner = layer(inner)
            inner[:, -self._side :] = part(inner[:, -self._side :])
        inner = self.conv5(inner).add_(x)
        return self.prelu(inner)


class Decoder(nn.Module):
    """Enlarge the features of a picture; and make what `outputs` says of all that is known at that size."""

    def __init__(self, features: int, others: int, config: RefinementConfig) -> None:
        """features: channels of a picture's map. others: inputs beside the two enlarged maps."""
        super().__init__()
        inner, outer = config.upsample
        shuffles = [nn.PixelShuffle(2) for _ in range(config.doublings)]
        self.upsample = nn.Sequential(
            *shuffles,
            prelu(features // 4**config.doublings, inner, 5),
            *(prelu(inner, inner) for _ in range(3)),
            prelu(inner, outer),
            conv(outer, outer, 1),
            StoredNorm(outer),
            nn.ReLU(),
        )
        self.convblock = nn.Sequential(
            prelu(2 * outer + others, config.width, config.first),
            *(Residual(config.width, config.side) for _ in range(3)),
            conv(config.width, config.outputs),
        )


class Update(nn.Module):
    """One refinement of the flow and of the feature."""

    def __init__(self, feature: int, config: UpdateConfig) -> None:
        super().__init__()
        self.convc1, self.convc2 = conv(2 * CHANNELS, config.correlation[0], 1), conv(*config.correlation)
        self.convf1, self.convf2 = conv(4, config.flow[0], 7), conv(*config.flow)
        self.conv = conv(config.correlation[1] + config.flow[1], config.motion)
        hidden = config.hidden
        self.gru = self._two(config.motion + 4 + feature, hidden, hidden)
        self.feat_head = self._two(hidden, hidden, feature)
        self.flow_head = self._two(hidden, hidden, 4)

    @staticmethod
    def _two(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, hidden), nn.LeakyReLU(SLOPE), conv(hidden, outputs))

    def forward(self, feature: Tensor, flow: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changes of the feature and, in float32, of the flow. flow: 1 4 h w, of both pictures."""
        dtype = self.conv.weight.dtype
        feature, given, correlation = feature.to(dtype), flow.to(dtype), correlation.to(dtype)
        compared = _leaky(self.convc2(_leaky(self.convc1(correlation))))
        moved = _leaky(self.convf2(_leaky(self.convf1(given))))
        motion = _leaky(self.conv(torch.cat([compared, moved], dim=1)))
        hidden = self.gru(torch.cat([motion, given, feature], dim=1))
        return self.feat_head(hidden), self.flow_head(hidden).float()


def _leaky(x: Tensor) -> Tensor:
    return leaky_relu(x, SLOPE)
