"""RRDBNet, the network of ESRGAN, BSRGAN and Real-ESRGAN: dense residual convolutions, then enlargement.

Sources: Wang et al. 2018, arXiv 1809.00219 (ESRGAN); Wang et al. 2021, arXiv 2107.10833 (Real-ESRGAN: for
small factors, pixel unshuffle comes first); Rakotonirina and Rasoanaivo 2020,
arXiv 2001.08073 (ESRGAN+: 1x1 shortcuts).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pixel_shuffle, pixel_unshuffle

from modules.layers.convolution import repeat_pixels

COLOURS = 3
SLOPE = 0.2  # of every leaky ReLU
RESIDUAL_SCALE = 0.2  # factor on a block's result before it is added to the input


@dataclass(frozen=True)
class RrdbConfig:
    """Channel counts, depth and factors of an RRDBNet."""

    features: int
    growth: int  # channels that each convolution of a dense block adds
    blocks: int
    doublings: int  # of height and width, after the blocks
    unshuffle: int  # factor of the pixel unshuffle before the blocks
    has_shortcuts: bool  # ESRGAN+

    @property
    def factor(self) -> int:
        """Upscaling factor of width and height."""
        return 2**self.doublings // self.unshuffle

    @property
    def step(self) -> int:
        """Number that image sides must be divisible by."""
        return self.unshuffle

    @property
    def with_one_block(self) -> "RrdbConfig":
        """Return the configuration with one block of each kind, for measuring the memory per pixel."""
        return replace(self, blocks=1)


class DenseBlock(nn.Module):
    """Five convolutions; each one receives the outputs of all previous ones."""

    def __init__(self, config: RrdbConfig) -> None:
        super().__init__()
        features, growth = config.features, config.growth
        for number in range(1, 6):
            outputs = growth if number < 5 else features
            inputs = features + (number - 1) * growth
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv1x1 = nn.Conv2d(features, growth, 1, bias=False) if config.has_shortcuts else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus RESIDUAL_SCALE times the output of the last convolution."""
        features = [x]
        for number in range(1, 5):
            convolve = self.get_submodule(f"conv{number}")
            output = leaky_relu(convolve(torch.cat(features, dim=1)), SLOPE, inplace=True)
            if self.conv1x1 is not None and number == 2:
                output = output + self.conv1x1(x)
            if self.conv1x1 is not None and number == 4:
                output = output + features[2]
            features.append(output)
        return x + RESIDUAL_SCALE * self.get_submodule("conv5")(torch.cat(features, dim=1))


class DenseResidualBlock(nn.Module):
    """Three consecutive dense blocks with a residual connection around them."""

    def __init__(self, config: RrdbConfig) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(config) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus RESIDUAL_SCALE times the output of the three dense blocks."""
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """RRDBNet, the upscaling network of Real-ESRGAN, with the module names of its files."""

    def __init__(self, config: RrdbConfig) -> None:
        super().__init__()
        features = config.features
        self.config = config
        self.conv_first = nn.Conv2d(COLOURS * config.unshuffle**2, features, 3, padding=1)
        self.body = nn.ModuleList(DenseResidualBlock(config) for _ in range(config.blocks))
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        for number in range(1, config.doublings + 1):
            self.add_module(f"conv_up{number}", nn.Conv2d(features, features, 3, padding=1))
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, COLOURS, 3, padding=1)

    @property
    def repeated_blocks(self) -> tuple[nn.Module, ...]:
        """Submodules of the same shape, which share one compilation."""
        return tuple(self.body)

    def forward(self, x: Tensor) -> Tensor:
        """Return images upscaled by the factor f, B 3 fH fW, not clamped.

        Args:
            x: Images, B 3 H W, 0..1, with H and W multiples of `config.step`.
        """
        if self.config.unshuffle > 1:
            x = pixel_unshuffle(x, self.config.unshuffle)
        shallow_features = x = self.conv_first(x)
        for block in self.body:
            x = block(x)
        x = shallow_features + self.conv_body(x)
        # each doubling repeats pixels and convolves them
        for number in range(1, self.config.doublings + 1):
            convolve = self.get_submodule(f"conv_up{number}")
            x = leaky_relu(convolve(repeat_pixels(x, 2)), SLOPE, inplace=True)
        return self.conv_last(leaky_relu(self.conv_hr(x), SLOPE, inplace=True))


# The compact networks of Real-ESRGAN (SRVGGNet): a row of convolutions, added to the enlarged image.
#
# Made for videos: many times faster than RRDBNet. Source: the released realesr-animevideov3 and
# realesr-general-x4v3 of Wang et al. 2021, arXiv 2107.10833.
@dataclass(frozen=True)
class CompactConfig:
    """Widths, depth and factor of a compact upscaling network."""

    features: int
    depth: int  # convolutions between the first and the last one
    factor: int  # how many times higher and wider the result is
    step: int = 1  # height and width must be multiples of this

    @property
    def with_one_block(self) -> "CompactConfig":
        """Return the configuration with one block of each kind, for measuring the memory per pixel."""
        return replace(self, depth=1)


class CompactNet(nn.Module):
    """Compact upscaling network of Real-ESRGAN; its layers are numbered in the files."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential()
        for place in range(config.depth + 1):
            inputs = config.features if place else COLOURS
            self.body.append(nn.Conv2d(inputs, config.features, 3, padding=1))
            self.body.append(nn.PReLU(config.features))
        self.body.append(nn.Conv2d(config.features, COLOURS * config.factor**2, 3, padding=1))

    @property
    def repeated_blocks(self) -> tuple[nn.Module, ...]:
        """All layers together, as one module to compile."""
        return (self.body,)

    def forward(self, x: Tensor) -> Tensor:
        """Return images upscaled by the factor f, B 3 fH fW, not clamped.

        Args:
            x: Images, B 3 H W, 0..1.
        """
        large = repeat_pixels(x, self.config.factor)
        return pixel_shuffle(self.body(x), self.config.factor) + large
