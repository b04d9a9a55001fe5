"""FLUX.2's autoencoder: FLUX.1's with 32 channels, whose latents are packed and normalized by statistics.

Module names are those of the released file. Source: the released code of FLUX.2.
"""
# Letters: B batch, Z latent channels (32), C = 4 Z channels of packed latents, H height, W width (in pixels),
# h = H / 16, w = W / 16

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, load_planned
from checkpoints.opening import Checkpoint, open_checkpoint
from encoders.autoencoder import Autoencoder, AutoencoderKind, read_autoencoder
from encoders.autoencoder_blocks import AutoencoderConfig, AutoencoderDecoder, AutoencoderEncoder
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.layers.convolution import cast_for_convolution, set_memory_format

logger = logging.getLogger(__name__)

KIND = AutoencoderKind(
    description="the autoencoder of FLUX.2",
    option="--vae",
    release="flux2-vae.safetensors of Comfy-Org, or the folder vae of FLUX.2's diffusers release",
    channels=32,
    is_quantized=True,
    classes=("AutoencoderKLFlux2",),
)
EPS = 1e-4  # added to the variances of the statistics, as released
MEAN, VARIANCE = "bn.running_mean", "bn.running_var"


class Flux2Encoder(AutoencoderEncoder):
    """Encode pixels B 3 H W as means and logarithms of variances, B 2Z 2h 2w."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode pixels, B 3 H W, to posterior means and log variances, B 2Z 2h 2w."""
        moments: Tensor = self.quant_conv(super().forward(x))
        return moments


class Flux2Decoder(AutoencoderDecoder):
    """Decode latents B Z 2h 2w to pixels B 3 H W."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Decode latents, B Z 2h 2w, to pixels, B 3 H W."""
        return super().forward(self.post_quant_conv(x))


class Flux2Vae(Autoencoder):
    """FLUX.2's autoencoder. Latents B C 1 h w are in model space. Load one with `load_vae`."""

    stride = 16
    mean: Tensor  # C 1 1 float32, of packed latents
    deviation: Tensor  # C 1 1 float32, of packed latents

    def __init__(self, config: AutoencoderConfig, tile: int | None = None) -> None:
        super().__init__(config, tile)
        self.encoder = Flux2Encoder(config)
        self.decoder = Flux2Decoder(config)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return the normalized means of the posterior for pixels; `generators` are not used."""
        return self.moments(pixels)

    def _moments(self, pixels: Tensor) -> Tensor:
        means = super()._moments(pixels).chunk(2, dim=1)[0]
        packed = rearrange(means, "b z (h ph) (w pw) -> b (z ph pw) h w", ph=2, pw=2)
        return (packed - self.mean) / self.deviation

    def _pixels(self, latents: Tensor) -> Tensor:
        # in float32: 16 bits would tint every image
        packed = latents.to(self.device).float() * self.deviation + self.mean
        unpacked = rearrange(packed, "b (z ph pw) h w -> b z (h ph) (w pw)", ph=2, pw=2)
        return self.decoder(cast_for_convolution(unpacked, self.device, self.dtype)).float()


def read_vae(checkpoint: Checkpoint) -> LoadPlan[AutoencoderConfig]:
    """Plan how to load FLUX.2's autoencoder, with released or diffusers tensor names.

    Raises CheckpointError for any other file, or if it has no statistics to normalize latents.
    """
    plan = read_autoencoder(checkpoint, KIND)
    # the statistics are for packed latents, with 2 x 2 pixels in the channels
    count = 4 * plan.config.latent_channels
    for name in (MEAN, VARIANCE):
        info = plan.checkpoint.tensors.get(name)
        if info is None or info.shape != (count,):
            raise CheckpointError(
                f"{checkpoint.path}: {name}, the statistics of its {count} channels, is missing. "
                f"Pass {KIND.release} to {KIND.option}.",
                checkpoint.path,
            )
    return plan


def load_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    tile: int | None = None,
    variance_eps: float = EPS,
) -> Flux2Vae:
    """Load FLUX.2's autoencoder from a file or folder.

    Args:
        path: The file or folder.
        device: Device to load to.
        dtype: Compute dtype.
        tile: Edge of a tile in pixels; None computes images as a whole.
        variance_eps: Added to the variances of the statistics.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        network = load_planned(
            plan, lambda config: Flux2Vae(config, tile), device, dtype, label=KIND.description
        )
        mean, variance = (plan.checkpoint.read(name).float().to(device) for name in (MEAN, VARIANCE))
    network.mean = mean.view(-1, 1, 1)
    network.deviation = (variance + variance_eps).sqrt().view(-1, 1, 1)
    set_memory_format(network, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return network
