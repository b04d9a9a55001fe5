"""GIMM-VFI: pictures at any time between two, from their optical flow.

Sources: Guo et al. 2024, arXiv 2407.08680 (motion); Li et al. 2023, arXiv 2304.09790 (synthesis).
Written from the formulas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from post.interpolation.layers import EncodedPicture, FlowEstimator
from post.interpolation.motion import MotionConfig, MotionField
from post.interpolation.synthesis import Compared, Maps, Synthesis, SynthesisConfig
from post.interpolation.warping import resize

# Letters: H W height and width of the pictures


@dataclass(frozen=True)
class GimmConfig:
    """Dimensions of the network."""

    motion: MotionConfig
    synthesis: SynthesisConfig


class GimmVfi(nn.Module):
    """The network without its optical flow."""

    def __init__(self, config: GimmConfig) -> None:
        super().__init__()
        self.config = config
        self.motion = MotionField(config.motion)
        self.synthesis = Synthesis(config.synthesis)


@dataclass(frozen=True)
class Frame:
    """A picture and its own features."""

    image: Tensor  # 1 3 H W, 0..1
    small: Tensor  # the same at the size that flow is computed at
    encoded: EncodedPicture
    maps: Maps


class Interpolation:
    """The whole network: pictures of the same size one by one, then pairs of them."""

    def __init__(self, network: GimmVfi, estimator: FlowEstimator, ds_factor: float = 1.0) -> None:
        """ds_factor: all but the last step is computed at this part of the size, more than 0, at most 1."""
        self.network, self.estimator, self.ds_factor = network, estimator, ds_factor

    @torch.no_grad()
    def frame(self, image: Tensor) -> Frame:
        """Compute the features of a single picture.

        image: 1 3 H W, 0..1, float32; its sides times the factor are multiples of 32.
        """
        small = resize(image, self.ds_factor)
        encoded = self.estimator.encode(255 * small)
        return Frame(image, small, encoded, self.network.synthesis.maps(encoded))

    @torch.no_grad()
    def between(self, first: Frame, second: Frame, times: Sequence[float]) -> Iterator[Tensor]:
        """Yield the pictures, 1 3 H W, 0..1, at times between 0 and 1; both excluded."""
        motion = self.network.motion.between(
            self.estimator.flow(first.encoded, second.encoded),
            self.estimator.flow(second.encoded, first.encoded),
        )
        synthesis = self.network.synthesis
        compared = Compared(first.maps, second.maps)
        images = 2 * torch.cat([first.image, second.image]) - 1
        small = 2 * torch.cat([first.small, second.small]) - 1
        for time in times:
            flow = self.network.motion.at(motion, time)
            flow = torch.cat([-time * flow, (1 - time) * flow])
            blend = synthesis.blend(small, flow, first.maps, second.maps, compared, time)
            del flow
            yield synthesis.put_together(images, blend.enlarged(1 / self.ds_factor))
