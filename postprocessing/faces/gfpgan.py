"""GFPGAN, the "clean" network of v1.2 to v1.4: restore a face with a U-Net that steers a StyleGAN2.

The U-Net reads the damaged face: its deepest features become the styles, and its decoder features become
scales and shifts of half of StyleGAN2's channels. Source: Wang et al. 2021, arXiv 2101.04061; Karras et al.
2020, arXiv 1912.04958.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, leaky_relu

from checkpoints.dialects import LoadPlan, count, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources

# Letters: B faces, C channels, h w height and width of features, S side of a face in pixels

SMALLEST = 4  # side of the deepest features, and of the decoder's first ones
RELEASED_FILES = "GFPGANv1.4.pth or GFPGANv1.3.pth, or a safetensors file of the same tensors,"
# unused at inference: outputs for training the U-Net, and the mapping of random styles
UNUSED = ("toRGB.*", "stylegan_decoder.style_mlp.*")


@dataclass(frozen=True)
class GfpganConfig:
    """Channel counts of GFPGAN; `body` and `decoder` have one value more than there are downsamplings."""

    body: tuple[int, ...]  # channels of the U-Net, from full size down
    decoder: tuple[int, ...]  # channels of the decoder, from `SMALLEST` up
    style: int  # width of a style vector
    # channels that get a scale and a shift, at each size above `SMALLEST`
    modulated_channels: tuple[int, ...]

    @property
    def size(self) -> int:
        """Side of the face image in pixels."""
        return SMALLEST << (len(self.body) - 1)


def _lrelu(x: Tensor) -> Tensor:
    return leaky_relu(x, 0.2)


def _resize(x: Tensor, factor: float) -> Tensor:
    return interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class StyleResidualBlock(nn.Module):
    """Residual block with two convolutions and a resize between them."""

    def __init__(self, width_in: int, width: int, factor: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_in, 3, padding=1)
        self.conv2 = nn.Conv2d(width_in, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1, bias=False)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return features at the new size, B C H W."""
        changed = _lrelu(self.conv2(_resize(_lrelu(self.conv1(x)), self.factor)))
        return changed + self.skip(_resize(x, self.factor))


class ModulatedConv(nn.Module):
    """StyleGAN2 convolution whose kernel is scaled by a style vector, separately for each face."""

    def __init__(self, width_in: int, width: int, kernel: int, style: int, demodulate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width, width_in, kernel, kernel))
        self.modulation = nn.Linear(style, width_in)
        self.demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Convolve the features with kernels that are scaled by a style vector (StyleGAN2), B C h w.

        Args:
            x: Features, B C h w.
            style: Style vector, B D.
        """
        # float32: the squares of a large style are beyond float16
        scales = self.modulation(style).float()[:, None, :, None, None]
        kernels = self.weight.float() * scales  # B out in kernel kernel
        if self.demodulate:
            kernels = kernels * torch.rsqrt(kernels.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        # all faces as groups of one convolution
        grouped = rearrange(kernels.to(x.dtype), "b out c kh kw -> (b out) c kh kw")
        features = rearrange(x, "b c h w -> 1 (b c) h w")
        features = conv2d(features, grouped, padding="same", groups=len(x))
        return rearrange(features, "1 (b c) h w -> b c h w", b=len(x))


class StyleConv(nn.Module):
    """Modulated convolution with noise, bias and activation, optionally at twice the size."""

    def __init__(self, width_in: int, width: int, style: int, doubles: bool) -> None:
        super().__init__()
        self.modulated_conv = ModulatedConv(width_in, width, 3, style, demodulate=True)
        self.weight = nn.Parameter(torch.empty(1))  # of the noise
        self.bias = nn.Parameter(torch.empty(1, width, 1, 1))
        self.doubles = doubles

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        """Return convolved features with noise, B C h w or twice as large.

        Args:
            x: Features, B C h w.
            style: Style vector, B D.
            noise: Noise, 1 1 and the size of the result.
        """
        x = self.modulated_conv(_resize(x, 2) if self.doubles else x, style) * math.sqrt(2)
        return _lrelu(x + self.weight * noise.to(x.dtype) + self.bias)


class ToRgb(nn.Module):
    """Predict RGB values from features, and add the upsampled result of half the size."""

    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.modulated_conv = ModulatedConv(width, 3, 1, style, demodulate=False)
        self.bias = nn.Parameter(torch.empty(1, 3, 1, 1))

    def forward(self, x: Tensor, style: Tensor, smaller: Tensor | None = None) -> Tensor:
        """Return RGB values, B 3 h w, added to the enlarged result of the previous level.

        Args:
            x: Features, B C h w.
            style: Style vector, B D.
            smaller: Colors of half the size, B 3 h/2 w/2.
        """
        image = self.modulated_conv(x, style) + self.bias
        return image if smaller is None else image + _resize(smaller, 2)


class StyleDecoder(nn.Module):
    """StyleGAN2 decoder of GFPGAN, with a style per layer, steered by features of the U-Net."""

    def __init__(self, config: GfpganConfig) -> None:
        """Create the empty layers of the decoder, with the module names of the released GFPGAN file."""
        super().__init__()
        widths = config.decoder
        style = config.style
        # StyleGAN2: a learned constant of the smallest size, then two convolutions for each doubled size
        self.constant_input = nn.ParameterDict(
            {"weight": nn.Parameter(torch.empty(1, widths[0], SMALLEST, SMALLEST))}
        )
        self.style_conv1 = StyleConv(widths[0], widths[0], style, doubles=False)
        self.to_rgb1 = ToRgb(widths[0], style)
        self.style_convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        self.noises = nn.Module()
        self.noises.register_buffer("noise0", torch.empty(1, 1, SMALLEST, SMALLEST))
        for level, (width_in, width) in enumerate(pairwise(widths)):
            self.style_convs.append(StyleConv(width_in, width, style, doubles=True))
            self.style_convs.append(StyleConv(width, width, style, doubles=False))
            self.to_rgbs.append(ToRgb(width, style))
            # each level doubles the side, and its two convolutions have a noise buffer each
            side = SMALLEST << (level + 1)
            for number in (2 * level + 1, 2 * level + 2):
                self.noises.register_buffer(f"noise{number}", torch.empty(1, 1, side, side))

    def forward(self, styles: Tensor, scales_and_shifts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Generate faces from style vectors, steered by features of the U-Net, B 3 S S.

        Args:
            styles: Style vectors, B layers D.
            scales_and_shifts: Scales and shifts for the features of each size from 8 on, B C h w each.
        """
        style = styles.unbind(1)  # one vector for each convolution and color layer
        noise = [self.noises.get_buffer(f"noise{number}") for number in range(len(self.style_convs) + 1)]
        x = self.constant_input["weight"].expand(len(styles), -1, -1, -1)
        x = self.style_conv1(x, style[0], noise[0])
        image = self.to_rgb1(x, style[1])
        for level, (scale, shift) in enumerate(scales_and_shifts):
            # a level has two convolutions and one color layer, which shares its style with the next level
            style_index = 2 * level + 1
            x = self.style_convs[2 * level](x, style[style_index], noise[style_index])
            # only the last channels are modulated by the U-Net
            unmodulated, modulated = x.split([x.shape[1] - scale.shape[1], scale.shape[1]], dim=1)
            x = torch.cat([unmodulated, modulated * scale + shift], dim=1)
            x = self.style_convs[2 * level + 1](x, style[style_index + 1], noise[style_index + 1])
            image = self.to_rgbs[level](x, style[style_index + 2], image)
        return image


class Gfpgan(nn.Module):
    """GFPGAN: restores faces that are aligned to the face template."""

    def __init__(self, config: GfpganConfig) -> None:
        """Create the layers of GFPGAN, with the module names of the released file."""
        super().__init__()
        body = config.body
        levels = len(body) - 1
        self.config = config
        self.conv_body_first = nn.Conv2d(3, body[0], 1)
        # 0.5 and 2: factors by which the blocks resize the features
        self.conv_body_down = nn.ModuleList(StyleResidualBlock(a, b, 0.5) for a, b in pairwise(body))
        self.final_conv = nn.Conv2d(body[-1], body[-1], 3, padding=1)
        # a style for each convolution of the decoder, and for its last color layer
        self.final_linear = nn.Linear(body[-1] * SMALLEST**2, (2 * levels + 2) * config.style)
        upwards = body[::-1]
        self.conv_body_up = nn.ModuleList(StyleResidualBlock(a, b, 2) for a, b in pairwise(upwards))
        skip_widths = list(zip(upwards[1:], config.modulated_channels, strict=True))
        self.condition_scale = nn.ModuleList(_make_condition_layers(a, b) for a, b in skip_widths)
        self.condition_shift = nn.ModuleList(_make_condition_layers(a, b) for a, b in skip_widths)
        self.stylegan_decoder = StyleDecoder(config)

    def forward(self, faces: Tensor) -> Tensor:
        """Encode aligned faces with a U-Net, and decode them with a StyleGAN that the U-Net steers.

        Args:
            faces: Aligned faces, B 3 S S, -1..1.

        Returns:
            Restored faces, B 3 S S, about -1..1, float32, not clamped.
        """
        x = _lrelu(self.conv_body_first(faces.to(self.conv_body_first.weight.dtype)))
        skips = []
        for down in self.conv_body_down:
            x = down(x)
            skips.append(x)
        x = _lrelu(self.final_conv(x))
        styles = self.final_linear(x.flatten(1)).view(len(x), -1, self.config.style)
        scales_and_shifts = []
        for skip, up, scale, shift in zip(
            reversed(skips), self.conv_body_up, self.condition_scale, self.condition_shift, strict=True
        ):
            x = up(x + skip)
            # each level of the decoder is scaled and shifted by features of its size
            scales_and_shifts.append((scale(x), shift(x)))
        return self.stylegan_decoder(styles, scales_and_shifts).float()

    def draw_noise(self, generator: torch.Generator) -> None:
        """Fill the decoder's noise buffers once after loading, so that equal faces have equal results."""
        for noise in self.stylegan_decoder.noises.buffers():
            noise.copy_(torch.randn(noise.shape, generator=generator))


def _make_condition_layers(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_in, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width_in, width, 3, padding=1),
    )


def read_gfpgan(checkpoint: Checkpoint) -> LoadPlan[GfpganConfig]:
    """Plan the loading of a GFPGAN; the layer sizes are read from tensor shapes.

    Raises:
        CheckpointError: If the file is not a GFPGAN file.
    """
    tensor_names = checkpoint.tensors
    wrong_kind_error = make_wrong_kind_error(
        checkpoint, "a GFPGAN of v1.2 to v1.4", "--model", RELEASED_FILES
    )
    if (
        "conv_body_first.weight" not in tensor_names
        or "stylegan_decoder.constant_input.weight" not in tensor_names
    ):
        raise wrong_kind_error
    sources = list_tensor_sources(checkpoint)
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)

    def out_channels(name: str) -> int:
        return shape(f"{name}.weight")[0]

    levels = range(count(tensor_names, r"conv_body_down\.\d+"))
    decoder_prefix = "stylegan_decoder."
    # channels of each size: of the U-Net's encoder, then of the decoder
    body = [out_channels(f"conv_body_down.{level}.conv2") for level in levels]
    decoder = [
        shape(f"{decoder_prefix}style_convs.{2 * level}.modulated_conv.weight", 5)[1] for level in levels
    ]
    config = GfpganConfig(
        body=(out_channels("conv_body_first"), *body),
        decoder=(shape(f"{decoder_prefix}constant_input.weight")[1], *decoder),
        style=shape(f"{decoder_prefix}style_conv1.modulated_conv.modulation.weight", 2)[1],
        modulated_channels=tuple(out_channels(f"condition_scale.{level}.2") for level in levels),
    )
    for num_modulated, channels in zip(config.modulated_channels, config.decoder[1:], strict=True):
        if num_modulated > channels:
            raise wrong_kind_error
    return LoadPlan(config, checkpoint, sources, ignore=UNUSED)
