"""The VAE's computation in differentiable form: whole clips at once, new tensors only, equal results.

The modules are the same. wan/vae_blocks.py streams a clip through buffers that it overwrites, which suits
generation but not gradients.
"""
# Letters: B batch, C channels, F frames (4n + 1), H height, W width, Z latent channels, f h w of the latents

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.frame_groups import RmsNorm
from wan.configs import WAN_2_1
from wan.vae import WanVae
from wan.vae_blocks import Downsample, Upsample, WanCausalConv, WanFrameAttention, WanResidualBlock


def encode(vae: WanVae, pixels: Tensor) -> Tensor:
    """Return the posterior's means before normalization, B Z f h w, of pixels B 3 F H W in -1..1."""
    encoder = vae.encoder
    x = _through([*encoder.downsamples, *encoder.middle], _causal(encoder.conv1, pixels))
    return vae.conv1(_causal(encoder.head["2"], x, encoder.head["0"])).chunk(2, dim=1)[0].float()


def decode(vae: WanVae, means: Tensor) -> Tensor:
    """Return the pixels B 3 F H W of means as `encode` returns them."""
    decoder = vae.decoder
    x = _through([*decoder.middle, *decoder.upsamples], _causal(decoder.conv1, vae.conv2(means)))
    return _causal(decoder.head["2"], x, decoder.head["0"]).float()


@torch.no_grad()
def fold_statistics(vae: WanVae, mean: Tensor, std: Tensor) -> None:
    """Scale the VAE so that means with these statistics (Z each) have those of Wan's constants.

    Normalized latents then have mean 0 and deviation 1. The affine map goes into the last convolution of the
    encoder and, inverted, into the first of the decoder.
    """
    scale = torch.tensor(WAN_2_1.std) / std
    shift = torch.tensor(WAN_2_1.mean) - mean * scale  # new mean = old mean * scale + shift
    channels = len(scale)
    (weight, bias), (weight2, bias2) = (
        (conv.get_parameter("weight"), conv.get_parameter("bias")) for conv in (vae.conv1, vae.conv2)
    )
    weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    bias[:channels] = bias[:channels] * scale + shift
    weight2.div_(scale.view(1, -1, 1, 1, 1))
    bias2.sub_(weight2.flatten(1) @ shift)


@torch.no_grad()
def begin(vae: WanVae) -> None:
    """Set the first weights: linear, frame by frame, with a zero branch next to each shortcut.

    So the signal passes from the first step on.
    """
    for module in vae.modules():
        match module:
            case WanCausalConv():
                nn.init.zeros_(module.weight)
                nn.init.normal_(module.weight[:, :, -1], std=(9 * module.in_channels) ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
            case nn.Conv2d() | nn.Conv3d():
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
    for module in vae.modules():
        match module:
            case WanResidualBlock():
                nn.init.zeros_(module.residual["6"].get_parameter("weight"))
            case WanFrameAttention():
                nn.init.zeros_(module.proj.weight)
            case Downsample(time_conv=nn.Conv3d() as conv):  # two frames become their mean
                nn.init.zeros_(conv.weight)
                conv.weight[:, :, 1:, 0, 0] = (torch.eye(conv.in_channels) / 2).unsqueeze(2)
            case Upsample(time_conv=nn.Conv3d() as conv):  # one frame becomes two like it
                nn.init.zeros_(conv.weight)
                conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(2, 1)


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = _layer(layer, x)
    return x


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    match layer:
        case WanResidualBlock():
            norm1, conv1, norm2, conv2 = layer.residual.values()
            return _causal(conv2, _causal(conv1, x, norm1), norm2) + layer.shortcut(x)
        case WanFrameAttention():
            return _attend(layer, x)
        case Downsample():
            x = _each_frame(layer.resample["1"], F.pad(x, (0, 1, 0, 1)))
            if layer.time_conv is None or x.shape[2] == 1:
                return x
            return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
        case Upsample():
            if layer.time_conv is not None and x.shape[2] > 1:
                # B 2 C f H W
                pairs = layer.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0))).unflatten(1, (2, -1))
                x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
            return _each_frame(
                layer.resample["1"], F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
            )
    raise TypeError(f"no such layer in the VAE: {type(layer).__name__}")


def _causal(conv: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    assert isinstance(conv, WanCausalConv)
    if isinstance(norm, RmsNorm):
        x = F.silu(_normalize(norm, x))
    if x.shape[2] == 1:
        return F.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=1).unsqueeze(2)
    return F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), conv.weight, conv.bias, padding=(0, 1, 1))


def _normalize(norm: RmsNorm, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    return x * (x.shape[1] ** 0.5 / length).to(x.dtype) * norm.gamma.to(x.dtype)


def _attend(layer: WanFrameAttention, x: Tensor) -> Tensor:
    batch, _, _, height, _ = x.shape
    frames = x.transpose(1, 2).flatten(0, 1)  # B*F C H W
    q, k, v = (
        layer.to_qkv(_normalize(layer.norm, frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
    )
    seen = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)  # B*F C H*W
    return x + layer.proj(seen.unflatten(2, (height, -1))).unflatten(0, (batch, -1)).transpose(1, 2)


def _each_frame(conv: nn.Module, x: Tensor) -> Tensor:
    batch = x.shape[0]
    return conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)
