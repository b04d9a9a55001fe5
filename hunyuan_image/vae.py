"""The VAE of HunyuanImage-2.1: pictures to latents and back, 32 pixels to one along each side.

Latents are those of cache files: not multiplied by the scaling factor. A picture is a clip of one frame.
"""

import logging
from pathlib import Path

import torch

from encoders.autoencoder import PictureVae
from hunyuan_image.configs import STRIDE
from hunyuan_image.vae_blocks import (
    HunyuanImageVaeConfig,
    HunyuanImageVaeDecoder,
    HunyuanImageVaeEncoder,
    compute_in_rows,
)
from hunyuan_image.vae_checkpoints import WHAT, read_vae
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name
from modules.layers.convolution import lay_out

logger = logging.getLogger(__name__)


class HunyuanImageVae(PictureVae):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`."""

    stride = STRIDE
    limits = (-30.0, 20.0)

    def __init__(self, config: HunyuanImageVaeConfig, tile: int | None = None) -> None:
        super().__init__(tile)
        self.encoder = HunyuanImageVaeEncoder(config)
        self.decoder = HunyuanImageVaeDecoder(config)


def load_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    chunk_size: int | None = None,
    tile: int | None = None,
) -> HunyuanImageVae:
    """Load the VAE from any of its file layouts.

    chunk_size: rows that a convolution computes at a time; it changes memory, not results. tile: edge of a
    tile in pixels. Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(plan, lambda config: HunyuanImageVae(config, tile), device, dtype, WHAT)
    lay_out(vae, device)
    if chunk_size is not None:
        compute_in_rows(vae, chunk_size)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
