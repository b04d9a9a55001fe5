"""Synthesize the image at a time between two images from their flow: refine the flow, then blend.

Source: Li et al. 2023 (AMT), arXiv 2304.09790. Attributes of the module are named as in the released files of
GIMM-VFI. Layers compute in their weights' dtype; flows, correlations and warps in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from postprocessing.contract import batch_norm
from postprocessing.interpolation.layers import (
    CHANNELS,
    Correlation,
    EncodedImage,
    conv,
    pixel_coordinates,
    resize,
    warp,
)

# Layers that refine the flow and enlarge features, for the synthesis.
#
# Source: Li et al. 2023 (AMT), arXiv 2304.09790. Attributes of the modules are named as in the released files
# of GIMM-VFI.
SLOPE = 0.1


@dataclass(frozen=True)
class RefinementConfig:
    """Channel counts of a decoder."""

    doublings: int  # of height and width
    first: int  # size of the first convolution
    upsample: tuple[int, int]
    width: int
    inner_channels: int  # channels of the inner steps of a residual block
    outputs: int


@dataclass(frozen=True)
class UpdateConfig:
    """Channel counts of an update block."""

    correlation: tuple[int, int]
    flow: tuple[int, int]
    motion: int
    hidden: int


def prelu(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    """Return a convolution followed by a PReLU with one slope per channel."""
    return nn.Sequential(conv(inputs, outputs, size), nn.PReLU(outputs))


class Residual(nn.Module):
    """Five convolutions with a residual connection; the second and fourth change only the last channels."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = prelu(width, width), prelu(side, side)
        self.conv3, self.conv4 = prelu(width, width), prelu(side, side)
        self.conv5 = conv(width, width)
        self.prelu = nn.PReLU(width)
        self._side = side

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features, B C H W."""
        inner = x
        for of_all, part in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            for layer in of_all:  # in place, because tensors are large at full size
                inner = layer(inner)
            inner[:, -self._side :] = part(inner[:, -self._side :])
        inner = self.conv5(inner).add_(x)
        return self.prelu(inner)


class Decoder(nn.Module):
    """Upsample the features of each image, and predict `outputs` channels from them and other inputs."""

    def __init__(self, features: int, other_channels: int, config: RefinementConfig) -> None:
        """Create the layers of an AMT decoder, with the module names of the released file.

        Args:
            features: Channels of each image's features.
            other_channels: Channels of the other inputs apart from the two upsampled features.
            config: Widths of the layers.
        """
        super().__init__()
        inner, outer = config.upsample
        shuffles = [nn.PixelShuffle(2) for _ in range(config.doublings)]
        self.upsample = nn.Sequential(
            *shuffles,
            # each pixel shuffle divides the channels by 4
            prelu(features // 4**config.doublings, inner, 5),
            *(prelu(inner, inner) for _ in range(3)),
            prelu(inner, outer),
            conv(outer, outer, 1),
            batch_norm(outer),
            nn.ReLU(),
        )
        self.convblock = nn.Sequential(
            prelu(2 * outer + other_channels, config.width, config.first),
            *(Residual(config.width, config.inner_channels) for _ in range(3)),
            conv(config.width, config.outputs),
        )


class Update(nn.Module):
    """One update block of AMT, which refines the flow and the feature."""

    def __init__(self, feature: int, config: UpdateConfig) -> None:
        super().__init__()
        self.convc1 = conv(2 * CHANNELS, config.correlation[0], 1)
        self.convc2 = conv(*config.correlation)
        self.convf1 = conv(4, config.flow[0], 7)
        self.convf2 = conv(*config.flow)
        self.conv = conv(config.correlation[1] + config.flow[1], config.motion)
        hidden = config.hidden
        self.gru = self._make_two_layers(config.motion + 4 + feature, hidden, hidden)
        self.feat_head = self._make_two_layers(hidden, hidden, feature)
        self.flow_head = self._make_two_layers(hidden, hidden, 4)

    @staticmethod
    def _make_two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, hidden), nn.LeakyReLU(SLOPE), conv(hidden, outputs))

    def forward(self, feature: Tensor, flow: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the corrections of the feature and of both flows, 1 4 h w in float32."""
        dtype = self.conv.weight.dtype
        feature, inputs, correlation = feature.to(dtype), flow.to(dtype), correlation.to(dtype)
        correlations = _leaky(self.convc2(_leaky(self.convc1(correlation))))
        moved = _leaky(self.convf2(_leaky(self.convf1(inputs))))
        motion = _leaky(self.conv(torch.cat([correlations, moved], dim=1)))
        hidden = self.gru(torch.cat([motion, inputs, feature], dim=1))
        return self.feat_head(hidden), self.flow_head(hidden).float()


def _leaky(x: Tensor) -> Tensor:
    return leaky_relu(x, SLOPE)


# Letters: C channels, H W height and width of the images, K blends

PER_BLEND = 8  # channels of the last layer for each of K blends: two flows, a mask, three colors
FLOWS, IMAGES = 4, 12  # channels: flows to both images; both images unchanged, and warped


@dataclass(frozen=True)
class SynthesisConfig:
    """Channel counts of the AMT synthesis network."""

    projections: tuple[tuple[int, int], ...]  # (in, out) of quarter, eighth and matching maps; or none
    quarter: int  # channels of the feature maps that the decoders take
    eighth: int
    first: RefinementConfig
    last: RefinementConfig
    low: UpdateConfig
    high: UpdateConfig
    combined_width: int  # width of the last combining layers

    @property
    def feature(self) -> int:
        """Number of feature channels that the first decoder outputs besides its flows and mask."""
        return self.first.outputs - FLOWS - 1

    @property
    def blends(self) -> int:
        """Number of blended images that are averaged for the result."""
        return self.last.outputs // PER_BLEND


@dataclass(frozen=True)
class Maps:
    """Feature maps of one image, at two scales, for synthesizing frames."""

    quarter: Tensor  # in the dtype of the layers
    eighth: Tensor
    matching: Tensor  # float32


# at a quarter of the size: flow to both images, 1 4 h w in pixels of this size, float32; mask, 1 1 h w,
# logit, float32; feature, 1 C h w
Refined = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Blend:
    """Flows, masks and colors of K blends of two images, whose results are averaged; float32."""

    flow: Tensor  # 1 4K H W: K flows to the first image, then K to the second
    mask: Tensor  # 1 K H W, 0..1: the share of the first image
    colors: Tensor  # 1 3K H W, colors to add

    def enlarged(self, factor: float) -> "Blend":
        """Return the blend, resized for images that are `factor` times as large."""
        if factor == 1:
            return self
        return Blend(
            resize(self.flow, factor) * factor, resize(self.mask, factor), resize(self.colors, factor)
        )


class Synthesis(nn.Module):
    """AMT synthesis: predicts flows, masks and colors to blend two images into one."""

    def __init__(self, config: SynthesisConfig) -> None:
        """Create the layers of the AMT decoder, with the module names of the released GIMM-VFI file."""
        super().__init__()
        feature = config.feature
        blends = config.blends
        self.is_projected = bool(config.projections)
        # only for RAFT, whose feature maps have other channels than the decoder takes
        if config.projections:
            quarter, eighth, matching = config.projections
            self.amt_second_last_cproj = conv(*quarter, 1)
            self.amt_last_cproj = conv(*eighth, 1)
            self.amt_fproj = conv(*matching, 1)
        self.amt_init_decoder = Decoder(config.eighth, FLOWS + IMAGES, config.first)
        # + 1: the blending mask of the previous decoder
        self.amt_final_decoder = Decoder(config.quarter, feature + FLOWS + 1 + IMAGES, config.last)
        self.amt_update4_low = Update(feature, config.low)
        self.amt_update4_high = Update(feature, config.high)
        # three channels for each of the blended images
        self.amt_comb_block = nn.Sequential(
            conv(3 * blends, config.combined_width, 7),
            nn.PReLU(config.combined_width),
            conv(config.combined_width, 3, 7),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return self.amt_comb_block[0].weight.dtype  # type: ignore[return-value]

    def maps(self, encoded: EncodedImage) -> Maps:
        """Return an image's feature maps in the layout that the synthesis network takes."""
        dtype = self.dtype
        quarter, eighth, matching = (
            features.to(dtype) for features in (encoded.quarter, encoded.eighth, encoded.matching)
        )
        if not self.is_projected:
            return Maps(quarter, eighth, encoded.matching)
        return Maps(
            self.amt_second_last_cproj(quarter),
            self.amt_last_cproj(eighth),
            self.amt_fproj(matching).float(),
        )

    def blend(
        self,
        images: Tensor,
        flow: Tensor,
        first: Maps,
        second: Maps,
        correlations: "PairCorrelations",
        time: float,
    ) -> Blend:
        """Return the blend of two images (flows, masks and color changes) that gives the image between them.

        Args:
            images: The first and the second image, 2 3 H W, -1..1.
            flow: Flow from the new image to each of them, 2 2 H W.
            first: Features of the first image.
            second: Features of the second image.
            correlations: Correlations of the two images.
            time: Time between the images, 0..1.
        """
        initial = self._predict_initial(images, flow, first.eighth, second.eighth)
        refined = self._refine(initial, correlations, time)
        return self._predict_final(images, refined, first.quarter, second.quarter)

    def _predict_initial(self, images: Tensor, flow: Tensor, first: Tensor, second: Tensor) -> Refined:
        """Return the first estimate of flow, mask and features at a quarter of the size."""
        flow = 0.25 * resize(flow, 0.25)
        images = resize(images, 0.25)
        decoder = self.amt_init_decoder
        both_flows = _join_channels(flow)  # 1 4 h w
        parts = []
        for index, features in enumerate((first, second)):
            parts.append(warp(decoder.upsample(features), flow[index, None]))
        parts += [both_flows, _join_channels(images), _join_channels(warp(images, flow))]
        predicted = _apply_layers(decoder.convblock, parts, self.dtype)
        change, mask, feature = predicted.split([FLOWS, 1, predicted.shape[1] - FLOWS - 1], dim=1)
        return both_flows + change.float(), mask.float(), feature

    def _refine(self, refined: Refined, correlations: "PairCorrelations", time: float) -> Refined:
        """Refine flow and feature by comparing the images at the positions that the flow points to."""
        flow, mask, wide = refined
        low = 0.5 * resize(flow, 0.5)
        correlation = correlations.lookup(low, time)
        feature, change = self.amt_update4_low(resize(wide, 0.5), low, correlation)
        flow = flow + 2 * resize(change, 2)
        wide = wide + resize(feature, 2)
        feature, change = self.amt_update4_high(wide, flow, resize(correlation, 2))
        return flow + change, mask, wide + feature

    def _predict_final(self, images: Tensor, refined: Refined, first: Tensor, second: Tensor) -> Blend:
        """Predict the final flows, masks and colors at full size from estimates at a quarter of the size."""
        # images: Both images, 2 3 H W.
        decoder = self.amt_final_decoder
        small_flow, small_mask, small_feature = refined
        # flows are in pixels, so their values grow with the size
        both_flows = 4 * resize(small_flow, 4)
        mask = resize(small_mask, 4)
        flow = both_flows[0].unflatten(0, (2, 2))  # 2 2 H W
        # the estimate so far, with the images and their features, plain and warped
        inputs = [resize(small_feature, 4)]
        for index, features in enumerate((first, second)):
            inputs.append(warp(decoder.upsample(features), flow[index, None]).to(self.dtype))
        inputs += [both_flows, mask, _join_channels(images), _join_channels(warp(images, flow))]
        predicted = _apply_layers(decoder.convblock, inputs, self.dtype).float()
        # number of blends: each has two flows, a mask and three colors
        blends = predicted.shape[1] // PER_BLEND
        change, shift, colors = predicted.split([FLOWS * blends, blends, 3 * blends], dim=1)
        # the network predicts several flows for each image, as offsets from the same flow
        repeated_flow = _join_channels(flow.repeat(1, blends, 1, 1))
        return Blend(repeated_flow + change, torch.sigmoid(mask + shift), colors)

    def render(self, images: Tensor, blend: Blend) -> Tensor:
        """Blend two images, 2 3 H W in -1..1, into the new image, 1 3 H W in 0..1."""
        blends = blend.mask.shape[1]
        flows = blend.flow[0].unflatten(0, (2, blends, 2))
        colors = blend.colors[0].unflatten(0, (blends, 3))
        candidates = []
        for index in range(blends):
            first, second = warp(images, flows[:, index])
            weight = blend.mask[0, index]
            candidates.append(weight * first + (1 - weight) * second + colors[index])
        change = self.amt_comb_block(torch.cat(candidates)[None].to(self.dtype)).float()
        return ((torch.stack(candidates).mean(dim=0) + change + 1) / 2).clamp(0, 1)


class PairCorrelations:
    """Correlations between the features of two images, from each image to the other."""

    def __init__(self, first: Maps, second: Maps) -> None:
        # few lookups: storing all products would take longer, and memory in addition to the largest layers
        self._forward = Correlation(first.matching, second.matching, stores_volume=False)
        self._backward = Correlation(second.matching, first.matching, stores_volume=False)
        self._grid = pixel_coordinates(first.matching)

    def lookup(self, flow: Tensor, time: float) -> Tensor:
        """Return correlations, 1 648 h w, at the positions the flow from `time` points to in both images.

        648 are 81 offsets at 4 scales: first in the second image, then in the first.
        """
        to_first, to_second = flow.split(2, dim=1)
        forward = self._forward.lookup(self._grid + to_second / (1 - time))
        return torch.cat([forward, self._backward.lookup(self._grid + to_first / time)], dim=1)


def _join_channels(both: Tensor) -> Tensor:
    """Reshape 2 C H W to 1 2C H W."""
    return both.flatten(0, 1)[None]


def _apply_layers(layers: nn.Sequential, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Apply layers to concatenated tensors; `parts` is emptied to free its large tensors."""
    x = torch.cat([part.to(dtype) for part in parts], dim=1)
    parts.clear()
    for layer in layers:
        x = layer(x)
    return x
