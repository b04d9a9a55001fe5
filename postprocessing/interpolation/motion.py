"""GIMM: the motion between two images at any time between them, as a function of time and position.

Source: Guo et al. 2024, arXiv 2407.08680. All in float32: half precision has too few steps for a flow.
Attributes of the modules are named as in the released files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, normalize, pad

from postprocessing.interpolation.layers import EncodedImage, FlowEstimator, conv, resize, splat, warp
from postprocessing.interpolation.synthesis import Maps, PairCorrelations, Synthesis, SynthesisConfig

# Letters: B batch, C channels, H W height and width, L layers

SLOPE = 0.1  # slope of the leaky ReLUs
MIN_VARIANCE = 1e-9


@dataclass(frozen=True)
class MotionConfig:
    """Channel counts of the motion network, and three settings that its tensors do not reveal."""

    encoder: tuple[int, int, int]  # widths of two convolutions, and output channels
    encoder_blocks: int
    residual: tuple[int, int]
    residual_blocks: int
    layers: tuple[int, ...]  # output widths of the layers of the function
    coordinates: tuple[float, float] = (-1.0, 1.0)  # coordinates of the first and the last edge
    frequency: float = 1.0
    output_bias: float = 0.5


class Lateral(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(width, width), nn.LeakyReLU(SLOPE), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus the output of the two convolutions."""
        return x + self.layers(x)


def lateral_network(inputs: int, first: int, second: int, outputs: int, blocks: int) -> nn.Sequential:
    """Return the layers of a `cnn_encoder` or `res_conv`: convolutions around residual blocks."""
    return nn.Sequential(
        conv(inputs, first),
        conv(first, second),
        nn.LeakyReLU(SLOPE),
        *(Lateral(second) for _ in range(blocks)),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(second, outputs, 3, padding=1, padding_mode="reflect"),
    )


class HypoNet(nn.Module):
    """Implicit network with sine layers: maps features and coordinates (t, y, x) to normalized flow."""

    def __init__(self, inputs: int, config: MotionConfig) -> None:
        super().__init__()
        self.params_dict = nn.ParameterDict()
        for number, width in enumerate(config.layers):
            self.params_dict[f"linear_wb{number}"] = nn.Parameter(torch.zeros(inputs + 1, width))
            inputs = width
        self._config = config

    def coordinates_at(self, like: Tensor, time: float) -> Tensor:
        """Return a coordinate map, 1 3 H W, of `time` and the pixel centers (y, x), as large as `like`."""
        height, width = like.shape[-2:]
        low, high = self._config.coordinates
        y, x = (
            low + (high - low) * (torch.arange(size, device=like.device) + 0.5) / size
            for size in (height, width)
        )
        row = y[:, None].expand(height, width)
        return torch.stack([torch.full_like(row, time), row, x.expand(height, width)])[None]

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Evaluate the implicit network at each position; return the normalized flow, 1 2 H W, about 0..1.

        Args:
            features: Features, 1 C H W.
            positions: Coordinates, 1 3 H W.
        """
        values = torch.cat([features, positions], dim=1)
        last = len(self.params_dict) - 1
        for number in range(last + 1):
            # rows of weights, and the bias as the last row
            weight_and_bias = self.params_dict[f"linear_wb{number}"]
            # as a 1x1 convolution, which needs no other memory layout
            weight = normalize(weight_and_bias[:-1], dim=0).t()[:, :, None, None]
            values = conv2d(values, weight, weight_and_bias[-1])
            if number < last:
                values = torch.sin(self._config.frequency * values)
        return values + self._config.output_bias


class MotionField(nn.Module):
    """Motion between two images: encoded once from both flows, evaluated at any time between them."""

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        first, second, outputs = config.encoder
        self.alpha_v, self.alpha_fe = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.cnn_encoder = lateral_network(2, first, second, outputs, blocks=config.encoder_blocks)
        self.res_conv = lateral_network(4 * outputs, *config.residual, 2 * outputs, config.residual_blocks)
        self.hyponet = HypoNet(2 * outputs + 3, config)

    def encode_flows(self, forward_flow: Tensor, backward_flow: Tensor) -> "Motion":
        """Return the motion between two images, from their optical flow in both directions.

        Args:
            forward_flow: Flow from the first image to the second, 1 2 H W.
            backward_flow: Flow from the second image to the first, 1 2 H W.
        """
        normal, scale = normalize_flows(forward_flow, backward_flow)
        # normal: 1 2 2 H W; axis 2 is the direction
        first, second = (self.cnn_encoder(normal[:, :, index]) for index in (0, 1))
        first_weight, second_weight = self.splat_weights(forward_flow, backward_flow)
        return Motion(
            forward_flow,
            backward_flow,
            scale=scale,
            first_features=first,
            second_features=second,
            first_weight=first_weight,
            second_weight=second_weight,
        )

    def splat_weights(self, forward_flow: Tensor, backward_flow: Tensor) -> tuple[Tensor, Tensor]:
        """Return the splatting weights of the pixels of each image, 1 1 H W each.

        Weights are larger where both flows agree and where the flow is smooth.
        """
        return self._weigh(forward_flow, backward_flow), self._weigh(backward_flow, forward_flow)

    def _weigh(self, flow: Tensor, opposite: Tensor) -> Tensor:
        """Return the weights of an image, 1 1 H W, from its flow and the flow back to it, 1 2 H W each."""
        # the backward flow at the target of the flow should be its negative
        disagreement = (-warp(opposite, flow) - flow).abs().mean(dim=1, keepdim=True)
        # the standard deviation of the flow around each pixel, the mean of x and y
        mean = _blur(flow)
        mean_square = _blur(flow**2)
        deviation = (mean_square - mean**2).clamp(min=MIN_VARIANCE).sqrt().mean(dim=1, keepdim=True)
        return 1 / (1 + self.alpha_fe * disagreement) + 1 / (1 + self.alpha_v * deviation)

    def predict_motion(self, motion: "Motion", time: float) -> Tensor:
        """Return the motion from the first to the second image at `time`, 1 2 H W in pixels."""
        return (2 * self.predict_normalized_motion(motion, time) - 1) * motion.scale

    def predict_normalized_motion(self, motion: "Motion", time: float) -> Tensor:
        """Return the motion at `time`, scaled by the largest motion to 0..1; 0.5 is no motion."""
        first = splat(motion.first_features, time * motion.forward_flow, motion.first_weight)
        second = splat(motion.second_features, (1 - time) * motion.backward_flow, motion.second_weight)
        residual = self.res_conv(
            torch.cat([motion.first_features, motion.second_features, first, second], dim=1)
        )
        features = torch.cat([first, second], dim=1) + residual
        return self.hyponet(features, self.hyponet.coordinates_at(features, time))


@dataclass(frozen=True)
class Motion:
    """Encoded motion of a pair of images, shared by all times between them."""

    forward_flow: Tensor
    backward_flow: Tensor
    scale: Tensor  # the largest movement in pixels
    first_features: Tensor  # of the normalized flow from the first image
    second_features: Tensor  # of the flow from the second image
    first_weight: Tensor  # splatting weights of the pixels of the first image
    second_weight: Tensor


def _blur(values: Tensor) -> Tensor:
    """Average each channel of values, 1 2 H W, with binomial weights over 3 x 3 pixels."""
    row = torch.tensor([1.0, 2.0, 1.0], device=values.device)
    kernel = (row[:, None] * row / 16).expand(2, 1, 3, 3)
    return conv2d(pad(values, (1, 1, 1, 1), mode="reflect"), kernel, groups=2)


def normalize_flows(forward_flow: Tensor, backward_flow: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both flows by the largest movement to 0..1.

    Returns:
        A tensor, 1 2 2 H W (x and y, then the forward and the negative backward flow), in which 0.5 means no
        motion; and the scale in pixels.
    """
    scale = torch.maximum(forward_flow.abs().amax(), backward_flow.abs().amax())
    both = torch.stack([forward_flow, -backward_flow], dim=2) / torch.where(scale == 0, 1.0, scale)
    return (both + 1) / 2, scale


# GIMM-VFI: images at any time between two, from their optical flow.
#
# Sources: Guo et al. 2024, arXiv 2407.08680 (motion); Li et al. 2023, arXiv 2304.09790 (synthesis).
# Written from the formulas.
# Letters: H W height and width of the images


@dataclass(frozen=True)
class GimmConfig:
    """Sizes of the two networks of GIMM-VFI."""

    motion: MotionConfig
    synthesis: SynthesisConfig


class GimmVfi(nn.Module):
    """GIMM-VFI without its optical flow network."""

    def __init__(self, config: GimmConfig) -> None:
        super().__init__()
        self.config = config
        self.motion = MotionField(config.motion)
        self.synthesis = Synthesis(config.synthesis)


@dataclass(frozen=True)
class Frame:
    """An image with its encoded features."""

    image: Tensor  # 1 3 H W, 0..1
    small_image: Tensor  # the same, scaled to the size at which flow is computed
    encoded: EncodedImage
    maps: Maps


class Interpolation:
    """GIMM-VFI: `encode_image` encodes one image, `interpolate` computes images between two encoded ones."""

    def __init__(self, network: GimmVfi, estimator: FlowEstimator, motion_scale: float = 1.0) -> None:
        """Combine the interpolation network with an optical flow network.

        Args:
            network: The interpolation network.
            estimator: Estimator of the optical flow.
            motion_scale: Scale, above 0 and at most 1, at which everything but the last step is computed.
        """
        self.network = network
        self.estimator = estimator
        self.motion_scale = motion_scale

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Frame:
        """Compute the features of a single image.

        Args:
            image: Image, 1 3 H W, 0..1, float32; its sides times the factor are multiples of 32.
        """
        small = resize(image, self.motion_scale)
        encoded = self.estimator.encode(255 * small)
        return Frame(image, small, encoded, self.network.synthesis.maps(encoded))

    @torch.no_grad()
    def interpolate(self, first: Frame, second: Frame, times: Sequence[float]) -> Iterator[Tensor]:
        """Yield interpolated images, 1 3 H W in 0..1, at the given times between 0 and 1."""
        motion = self.network.motion.encode_flows(
            self.estimator.flow(first.encoded, second.encoded),
            self.estimator.flow(second.encoded, first.encoded),
        )
        synthesis = self.network.synthesis
        correlations = PairCorrelations(first.maps, second.maps)
        # the synthesis takes colors from -1 to 1
        images = 2 * torch.cat([first.image, second.image]) - 1
        # at the size for computing motion, --ds_factor times the full size
        small = 2 * torch.cat([first.small_image, second.small_image]) - 1
        for time in times:
            flow = self.network.motion.predict_motion(motion, time)
            flow = torch.cat([-time * flow, (1 - time) * flow])  # from the new image to the first and second
            blend = synthesis.blend(
                small, flow, first.maps, second.maps, correlations=correlations, time=time
            )
            del flow
            yield synthesis.render(images, blend.enlarged(1 / self.motion_scale))
