"""The two feature extractors of RetinaFace: ResNet-50 and a MobileNet of a quarter of the width.

Sources: He et al. 2015, arXiv 1512.03385 (stride in the 3x3 convolution, as torchvision has it); Howard et
al. 2017, arXiv 1704.04861. Both return features of 1/8, 1/16 and 1/32 of the picture's size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import relu

from post.contract import batch_norm

# Letters: B batch, C channels, H W height and width of the picture

Shape = Callable[[str], tuple[int, ...]]  # name of a tensor in the file -> its shape
MOBILE_STRIDES = ((2, 1, 2, 1, 2, 1), (2, 1, 1, 1, 1, 1), (2, 1))  # of the blocks of each stage
MOBILE_SLOPE = 0.1


@dataclass(frozen=True)
class ResNetConfig:
    """Widths of a ResNet of bottleneck blocks."""

    stem: int
    blocks: tuple[int, ...]  # how many, of each of four layers
    inner: tuple[int, ...]  # width inside the blocks of each layer
    outer: tuple[int, ...]  # width between them

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each of the three results."""
        return self.outer[1:]


@dataclass(frozen=True)
class MobileNetConfig:
    """Widths of a MobileNet: output channels of each block, for each of three stages."""

    stages: tuple[tuple[int, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each of the three results."""
        return tuple(stage[-1] for stage in self.stages)


class Bottleneck(nn.Module):
    """A residual block: 1x1 to few channels, 3x3, 1x1 back."""

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
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet without its classifier."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem, 7, 2, padding=3, bias=False)
        self.bn1 = batch_norm(config.stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        width = config.stem
        layers = []
        for number, (count, inner, outer) in enumerate(
            zip(config.blocks, config.inner, config.outer, strict=True)
        ):
            strides = [1 if number == 0 else 2] + [1] * (count - 1)
            blocks = [
                Bottleneck(width if block == 0 else outer, inner, outer, stride)
                for block, stride in enumerate(strides)
            ]
            layers.append(nn.Sequential(*blocks))
            width = outer
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: B 3 H W. Returns three features B C h w, the finest first."""
        x = self.layer1(self.maxpool(relu(self.bn1(self.conv1(x)))))
        found = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            found.append(x)
        return found


class MobileNet(nn.Module):
    """Convolutions apart for each channel, then across channels."""

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        width = 3
        stages = []
        for strides, widths in zip(MOBILE_STRIDES, config.stages, strict=True):
            blocks = []
            for stride, wider in zip(strides, widths, strict=True):
                blocks.append(_first(wider, stride) if width == 3 else _separable(width, wider, stride))
                width = wider
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3 = stages

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: B 3 H W. Returns three features B C h w, the finest first."""
        found = []
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x)
            found.append(x)
        return found


def read_resnet(shape: Shape, count: Callable[[str], int]) -> ResNetConfig:
    """Read the widths of a ResNet off its tensors. count: beginning of names -> how many blocks follow."""
    layers = [f"body.layer{number}" for number in (1, 2, 3, 4)]
    last = [shape(f"{layer}.0.conv3.weight") for layer in layers]
    return ResNetConfig(
        stem=shape("body.conv1.weight")[0],
        blocks=tuple(count(layer) for layer in layers),
        inner=tuple(sizes[1] for sizes in last),
        outer=tuple(sizes[0] for sizes in last),
    )


def read_mobilenet(shape: Shape) -> MobileNetConfig:
    """Read the widths of a MobileNet off its tensors."""

    def widths(stage: int, strides: Sequence[int]) -> tuple[int, ...]:
        names = [f"body.stage{stage}.{block}.3.weight" for block in range(len(strides))]
        if stage == 1:
            names[0] = "body.stage1.0.0.weight"
        return tuple(shape(name)[0] for name in names)

    return MobileNetConfig(
        tuple(widths(stage, strides) for stage, strides in enumerate(MOBILE_STRIDES, start=1))
    )


def _first(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride, padding=1, bias=False),
        batch_norm(width),
        nn.LeakyReLU(MOBILE_SLOPE),
    )


def _separable(width: int, wider: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
        batch_norm(width),
        nn.LeakyReLU(MOBILE_SLOPE),
        nn.Conv2d(width, wider, 1, bias=False),
        batch_norm(wider),
        nn.LeakyReLU(MOBILE_SLOPE),
    )
