"""The compact networks of Real-ESRGAN (SRVGGNet): a row of convolutions, added to the enlarged picture.

Made for videos: many times faster than RRDBNet. Source: the released realesr-animevideov3 and
realesr-general-x4v3 of Wang et al. 2021, arXiv 2107.10833.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from modules.layers.enlarging import repeat_pixels

COLOURS = 3


@dataclass(frozen=True)
class CompactConfig:
    """Dimensions of a compact network."""

    features: int
    depth: int  # convolutions between the first and the last one
    factor: int  # how many times higher and wider the result is
    step: int = 1  # height and width must be multiples of this

    @property
    def short(self) -> "CompactConfig":
        """Return the same network with one part of each form, which takes as much memory for a pixel."""
        return replace(self, depth=1)


class CompactNet(nn.Module):
    """Enlarge pictures. Its layers have numbers in the files."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential()
        for place in range(config.depth + 1):
            seen = config.features if place else COLOURS
            self.body.append(nn.Conv2d(seen, config.features, 3, padding=1))
            self.body.append(nn.PReLU(config.features))
        self.body.append(nn.Conv2d(config.features, COLOURS * config.factor**2, 3, padding=1))

    @property
    def repeated(self) -> tuple[nn.Module, ...]:
        """What is compiled."""
        return (self.body,)

    def forward(self, x: Tensor) -> Tensor:
        """x: B 3 H W, 0..1. Returns B 3 fH fW, not limited."""
        large = repeat_pixels(x, self.config.factor)
        return pixel_shuffle(self.body(x), self.config.factor) + large
