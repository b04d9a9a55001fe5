"""The two feature extractors of RetinaFace: ResNet-50 and a MobileNet of a quarter of the width.

Sources: He et al. 2015, arXiv 1512.03385 (stride in the 3x3 convolution, as torchvision has it); Howard et
al. 2017, arXiv 1704.04861. Both return features at 1/8, 1/16 and 1/32 of the image's size.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import relu

from postprocessing.contract import batch_norm

# Letters: B batch, C channels, H W height and width of the image

MOBILE_STRIDES = ((2, 1, 2, 1, 2, 1), (2, 1, 1, 1, 1, 1), (2, 1))  # of the blocks of each stage
MOBILE_SLOPE = 0.1


@dataclass(frozen=True)
class ResNetConfig:
    """Channel counts and numbers of blocks of a ResNet with bottleneck blocks."""

    stem: int
    blocks: tuple[int, ...]  # number of blocks of each of the four layers
    inner: tuple[int, ...]  # width inside the blocks of each layer
    outer: tuple[int, ...]  # width between them

    @property
    def widths(self) -> tuple[int, ...]:
        """Channel counts of the three feature maps that the detector uses."""
        return self.outer[1:]


@dataclass(frozen=True)
class MobileNetConfig:
    """Output channels of each block in the three stages of a MobileNet."""

    stages: tuple[tuple[int, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channel counts of the three feature maps that the detector uses."""
        return tuple(stage[-1] for stage in self.stages)


class Bottleneck(nn.Module):
    """Residual block of a ResNet: 1x1 convolution to fewer channels, 3x3, and 1x1 back."""

    def __init__(self, width: int, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = batch_norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = batch_norm(inner)
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = batch_norm(outer)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or width != outer:
            self.downsample = nn.Sequential(nn.Conv2d(width, outer, 1, stride, bias=False), batch_norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the block, B C H W."""
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet backbone without the classifier."""

    def __init__(self, config: ResNetConfig) -> None:
        """Create the layers of a ResNet, with torchvision's module names."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem, 7, 2, padding=3, bias=False)
        self.bn1 = batch_norm(config.stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        width = config.stem
        layers = []
        for stage, (count, inner, outer) in enumerate(
            zip(config.blocks, config.inner, config.outer, strict=True)
        ):
            # the first block of each stage halves the size, except in the first stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            blocks = [
                # only the first block changes the number of channels
                Bottleneck(width if block == 0 else outer, inner, outer, stride)
                for block, stride in enumerate(strides)
            ]
            layers.append(nn.Sequential(*blocks))
            width = outer
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return three feature maps, B C h w, the largest first.

        Args:
            x: Images, B 3 H W.
        """
        x = self.layer1(self.maxpool(relu(self.bn1(self.conv1(x)))))
        features = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class MobileNet(nn.Module):
    """MobileNet v1 backbone: depthwise convolutions, each followed by a 1x1 convolution."""

    def __init__(self, config: MobileNetConfig) -> None:
        """Create MobileNet's three stages with the module names of the RetinaFace file."""
        super().__init__()
        width_in = 3
        stages = []
        for strides, widths in zip(MOBILE_STRIDES, config.stages, strict=True):
            blocks = []
            for stride, width_out in zip(strides, widths, strict=True):
                if width_in == 3:  # the first layer, which sees the colors
                    layers = _make_layers(width_in, width_out, 3, stride)
                else:  # a depthwise convolution, then a pointwise one
                    layers = _make_layers(width_in, width_in, 3, stride, groups=width_in) + _make_layers(
                        width_in, width_out, 1
                    )
                blocks.append(nn.Sequential(*layers))
                width_in = width_out
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3 = stages

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return three feature maps, B C h w, the largest first.

        Args:
            x: Images, B 3 H W.
        """
        features = []
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x)
            features.append(x)
        return features


def _make_layers(width: int, wider: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolve = nn.Conv2d(width, wider, size, stride, padding=size // 2, groups=groups, bias=False)
    return [convolve, batch_norm(wider), nn.LeakyReLU(MOBILE_SLOPE)]
