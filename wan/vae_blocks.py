"""Layers of Wan's video VAEs. They process a clip in chunks; a `FrameCache` keeps state between these.

Module names follow the published checkpoints. Source: the released VAEs of Wan2.1 (arXiv 2503.20314, section
4.1) and Wan2.2, whose layers are the same, in stages with a shortcut around each.
"""
# Letters: B batch, C channels, T frames of the chunk, H height, W width (at the layer's own resolution)

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.frame_groups import FrameCache, RmsNorm
from modules.layers.convolution import conv3d, empty_clip, repeat_pixels
from wan.vae_shortcuts import Factors, add_repeated, average_groups

TIME_KERNEL = 3  # a causal convolution sees its frame and the two before it


# kind of layer -> how many frames, rows and columns are merged into one, or expanded from one
FACTORS: dict[str, Factors] = {"residual": (1, 1, 1), "spatial": (1, 2, 2), "temporal": (2, 2, 2)}


@dataclass(frozen=True)
class VaeLayer:
    """One layer of the encoder's `downsamples` or the decoder's `upsamples`."""

    kind: str  # "residual", "spatial" (resampled in height and width), "temporal" (in time as well)
    width_in: int
    width_out: int
    # Wan2.2: layers of a stage, which has a shortcut; the last one may resample and sets the stage's kind
    layers: tuple["VaeLayer", ...] = ()


@dataclass(frozen=True)
class WanVaeConfig:
    """Dimensions of a VAE, read from a checkpoint's tensors."""

    latent_channels: int
    encoder: tuple[VaeLayer, ...]
    decoder: tuple[VaeLayer, ...]
    patch: int = 1  # rows and columns of pixels that the first layer takes as channels of one place
    colors: int = 3  # number of pixel channels: 4 with alpha


class WanCausalConv(nn.Conv3d):
    """A 3x3x3 convolution that sees no later frame.

    Zeros pad the space around the clip and the time before it.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, (TIME_KERNEL, 3, 3), padding=(0, 1, 1))

    def forward(  # type: ignore[override]  # a stream needs its cache in addition to the next frames
        self, x: Tensor, frame_cache: FrameCache | None, norm: RmsNorm | None = None
    ) -> Tensor:
        """Convolve the next frames of a clip, x B C T H W to B C' T H W.

        Args:
            x: The frames.
            frame_cache: Last frames of earlier parts of the clip, updated here; None if x is the whole clip.
            norm: Norm to apply first, followed by SiLU.
        """
        previous_frames = None if frame_cache is None else frame_cache.get_frames(self, x.device)
        if previous_frames is None and x.shape[2] == 1:
            h = x if norm is None else F.silu(norm(x), inplace=True)
            if frame_cache is not None:
                frame_cache.store_frames(self, h)
            # two of the three taps in time would see only zeros: the last one is an image convolution
            return F.conv2d(h.squeeze(2), self.weight[:, :, -1], self.bias, padding=1).unsqueeze(2)
        h = _prepend_previous_frames(x, previous_frames, norm)
        if frame_cache is not None:
            frame_cache.store_frames(self, h[:, :, 1 - TIME_KERNEL :])
        return conv3d(self, h)


def _prepend_previous_frames(x: Tensor, previous_frames: Tensor | None, norm: RmsNorm | None) -> Tensor:
    """Return x preceded by the last two frames before it, B C T+2 H W; missing frames are zeros."""
    # With `norm`, x is normalized and passed through SiLU first, as `previous_frames` was. The result is
    # written into one tensor, so that no concatenation copies it again.
    batch, channels, frames, height, width = x.shape
    num_previous = TIME_KERNEL - 1  # frames that the convolution sees before the current one
    size = (batch, channels, num_previous + frames, height, width)
    joined = empty_clip(x, *size)
    num_missing = num_previous if previous_frames is None else num_previous - previous_frames.shape[2]
    joined[:, :, :num_missing] = 0
    if previous_frames is not None:
        joined[:, :, num_missing:num_previous] = previous_frames
    current = joined[:, :, num_previous:]  # a view: writing to it fills `joined`
    if norm is None:
        current.copy_(x)
    else:
        F.silu(norm(x, out=current), inplace=True)
    return joined


class WanResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RmsNorm(width_in),
                "2": WanCausalConv(width_in, width_out),
                "3": RmsNorm(width_out),
                "6": WanCausalConv(width_out, width_out),
            }
        )
        self.shortcut = nn.Conv3d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Apply the block to the next frames x, B C T H W to B C' T H W."""
        norm1, conv1, norm2, conv2 = self.residual.values()
        h = conv2(conv1(x, frame_cache, norm1), frame_cache, norm2)
        return h.add_(self.shortcut(x))


class WanFrameAttention(nn.Module):
    """One-head attention among the pixels of each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width, spatial_axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Add the attention within each frame to x, B C T H W. `frame_cache` is unused."""
        batch, channels, _, height, width = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)  # B*T C H W
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)  # B*T 1 H*W 3C
        q, k, v = qkv.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        h = self.proj(h.squeeze(1).transpose(1, 2).reshape(-1, channels, height, width))
        return x + h.unflatten(0, (batch, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width; `temporal` also joins two frames into one, except the clip's first."""

    def __init__(self, width: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=2)})
        self.time_conv = nn.Conv3d(width, width, (TIME_KERNEL, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Return x, B C T H W, at half the height and width.

        If temporal, every two frames are joined, except the clip's first one.
        """
        x = _convolve_frames(self.resample["1"], x, pad=True)
        if self.time_conv is None or frame_cache is None:  # the only frame of a clip passes unchanged
            return x
        previous_frames = frame_cache.get_frames(self, x.device)
        joined = x if previous_frames is None else torch.cat([previous_frames, x], dim=2)
        frame_cache.store_frames(self, x[:, :, -1:])
        return x if previous_frames is None else self.time_conv(joined)


class Upsample(nn.Module):
    """Double height and width, and halve the channels.

    `temporal` also turns each frame except the clip's first into two.
    """

    def __init__(self, width: int, width_out: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width_out, 3, padding=1)})
        self.time_conv = nn.Conv3d(width, 2 * width, (TIME_KERNEL, 1, 1)) if temporal else None

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Return x, B C T H W, at twice the height and width, and if temporal at twice the frames."""
        if self.time_conv is not None and frame_cache is not None:
            previous_frames = frame_cache.get_frames(self, x.device)
            if previous_frames is None:  # the clip's first frame passes unchanged; later frames do not see it
                frame_cache.store_frames(self, x[:, :, :0])
            else:
                h = _prepend_previous_frames(x, previous_frames, None)
                del previous_frames
                frame_cache.store_frames(self, h[:, :, 1 - TIME_KERNEL :])
                pairs = self.time_conv(h).unflatten(1, (2, -1))  # B 2 C T H W
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
                del h, pairs
        return _convolve_frames(self.resample["1"], x, enlarge=True)


def _convolve_frames(conv: nn.Module, x: Tensor, pad: bool = False, enlarge: bool = False) -> Tensor:
    """Apply an image convolution to every frame."""
    # `pad` first adds one row at the bottom and one column at the right. `enlarge` first repeats each pixel
    # in both directions.
    batch = x.shape[0]
    frames = x.transpose(1, 2).flatten(0, 1)  # B*T C H W
    if pad:
        frames = F.pad(frames, (0, 1, 0, 1))
    if enlarge:
        frames = repeat_pixels(frames, 2)
    return conv(frames).unflatten(0, (batch, -1)).transpose(1, 2)


class WanVaeHalf(nn.Module):
    """The encoder or the decoder, which processes a clip in chunks.

    The encoder turns patches of pixels B 3PP T H W into means and log variances B 2Z t h w, the decoder
    latents B Z t h w into patches of pixels.
    """

    def __init__(self, config: WanVaeConfig, is_encoder: bool) -> None:
        """Build the layers of the encoder or the decoder, named as in the released checkpoint."""
        super().__init__()
        self.is_encoder = is_encoder
        layers = config.encoder if is_encoder else config.decoder
        width_in = layers[0].width_in
        width_out = layers[-1].width_out
        pixel_channels = config.colors * config.patch**2
        if is_encoder:
            self.conv1 = WanCausalConv(pixel_channels, width_in)
            self.downsamples = _make_layers(layers, is_down=True)
            self.middle = _make_middle(width_out)
            channels_out = 2 * config.latent_channels  # means and log variances
        else:
            self.conv1 = WanCausalConv(config.latent_channels, width_in)
            # built before the middle, which runs first: the order decides which random weights a layer gets
            upsamples = _make_layers(layers, is_down=False)
            self.middle = _make_middle(width_in)
            self.upsamples = upsamples
            channels_out = pixel_channels
        self.head = nn.ModuleDict({"0": RmsNorm(width_out), "2": WanCausalConv(width_out, channels_out)})

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Return the result for the next chunk x of a clip; `frame_cache` is None if x is the whole clip."""
        x = self.conv1(x, frame_cache)
        order = [*self.downsamples, *self.middle] if self.is_encoder else [*self.middle, *self.upsamples]
        for layer in order:
            x = layer(x, frame_cache)
        return self.head["2"](x, frame_cache, self.head["0"])


class DownStage(nn.Module):
    """Layers of the encoder; means of their input are added to their output (Wan2.2)."""

    def __init__(self, stage: VaeLayer) -> None:
        super().__init__()
        self.downsamples = _make_layers(stage.layers, is_down=True)
        self.factors = FACTORS[stage.kind]

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Apply the layers to the next frames x, and add averaged groups of x to the result."""
        h = x
        for layer in self.downsamples:
            h = layer(h, frame_cache)
        return h.add_(average_groups(x, h.shape[1], self.factors))


class UpStage(nn.Module):
    """Layers of the decoder; if they enlarge, their repeated input is added to their output (Wan2.2)."""

    def __init__(self, stage: VaeLayer) -> None:
        super().__init__()
        self.upsamples = _make_layers(stage.layers, is_down=False)
        self.factors = FACTORS[stage.kind]

    def forward(self, x: Tensor, frame_cache: FrameCache | None) -> Tensor:
        """Apply the layers to the next frames x.

        Upsampling layers add x, with its values repeated, to their result.
        """
        h = x
        for layer in self.upsamples:
            h = layer(h, frame_cache)
        return h if self.factors == (1, 1, 1) else add_repeated(h, x, self.factors)


def _make_middle(width: int) -> nn.ModuleList:
    return nn.ModuleList(
        [WanResidualBlock(width, width), WanFrameAttention(width), WanResidualBlock(width, width)]
    )


def _make_layers(layers: Sequence[VaeLayer], is_down: bool) -> nn.ModuleList:
    """Build the layers of the encoder or decoder; a nested list becomes a stage."""
    made = nn.ModuleList()
    for layer in layers:
        if layer.layers:
            made.append(DownStage(layer) if is_down else UpStage(layer))
        elif layer.kind == "residual":
            made.append(WanResidualBlock(layer.width_in, layer.width_out))
        elif is_down:
            made.append(Downsample(layer.width_in, layer.kind == "temporal"))
        else:
            made.append(Upsample(layer.width_in, layer.width_out, layer.kind == "temporal"))
    return made
