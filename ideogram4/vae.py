"""FLUX.2's autoencoder as Ideogram 4 uses it: packed in another order, with statistics of its own.

Source: diffusers' `pipeline_ideogram4.py`, which packs (row, column, channel).
"""
# Letters: B batch, Z latent channels (32), C = 4 Z channels of packed latents, h = H / 16, w = W / 16

import logging
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.autoencoder import Autoencoder
from flux_2.vae import KIND, Flux2Vae, read_vae
from ideogram4.configs import LATENT
from modules.devices import dtype_name
from modules.layers.convolution import cast_for_convolution, set_memory_format

logger = logging.getLogger(__name__)


class Ideogram4Vae(Flux2Vae):
    """FLUX.2's autoencoder. It encodes to packed means as they are, and decodes latents in model space."""

    def _moments(self, pixels: Tensor) -> Tensor:
        means = Autoencoder._moments(self, pixels).chunk(2, dim=1)[0]
        return rearrange(means, "b z (h ph) (w pw) -> b (ph pw z) h w", ph=2, pw=2)

    def _pixels(self, latents: Tensor) -> Tensor:
        # in float32: 16 bits would tint every image
        packed = latents.to(self.device).float() * self.deviation + self.mean
        unpacked = rearrange(packed, "b (ph pw z) h w -> b z (h ph) (w pw)", ph=2, pw=2)
        return self.decoder(cast_for_convolution(unpacked, self.device, self.dtype)).float()


def load_vae(path: Path, device: torch.device, dtype: torch.dtype, tile: int | None = None) -> Ideogram4Vae:
    """Load the autoencoder; statistics in the file are not used.

    Args:
        path: File or folder of FLUX.2's or of Ideogram's own autoencoder, whose statistics differ.
        device: Device to load to.
        dtype: Compute dtype.
        tile: Edge of a tile in pixels; None computes images as a whole.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        network = load_planned(
            plan, lambda config: Ideogram4Vae(config, tile), device, dtype, label=KIND.description
        )
    network.mean = torch.tensor(LATENT.channel_means, device=device).view(-1, 1, 1)
    network.deviation = torch.tensor(LATENT.channel_deviations, device=device).view(-1, 1, 1)
    set_memory_format(network, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return network
