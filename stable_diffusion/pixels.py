"""Pictures to latents and back, by the autoencoder of a model. Pixels are B 3 H W, -1..1."""
# Letters: B pictures, h w latent size, H W in pixels: 8 times as much

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modules.media.reading import read_image
from stable_diffusion.contract import Model, PictureSettings

logger = logging.getLogger(__name__)

STRIDE = 8  # pixels of one latent


def latent_size(settings: PictureSettings) -> tuple[int, int]:
    """Return height and width of a picture's latents."""
    return settings.height // STRIDE, settings.width // STRIDE


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB, upright. Raises MediaError if it cannot be read."""
    return Image.fromarray(read_image(path))


def to_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """Return the pixels of a picture at that size (Lanczos), 1 3 H W, float32."""
    resized = fit(picture.convert("RGB"), width, height)
    values = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
    return 2 * values.permute(2, 0, 1)[None] - 1


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture at that size, whatever becomes of its proportions."""
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS)


@torch.no_grad()
def encode_pixels(model: Model, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample the posteriors of pictures, each with its own generator: latents B 4 h w, float32, scaled.

    Pictures are encoded one by one, so that none depends on its batch.
    """
    return torch.cat(
        [_sample(model, each[None], generator) for each, generator in zip(pixels, generators, strict=True)]
    )


def _sample(model: Model, pixels: Tensor, generator: torch.Generator) -> Tensor:
    posterior = model.vae.encode(pixels.to(model.device, model.vae_dtype)).latent_dist
    mean = posterior.mean.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + posterior.std.float() * noise) * model.kind.latent_scale


@torch.no_grad()
def decode_latents(
    model: Model, latents: Tensor, labels: Sequence[str], vae_batch_size: float | None = None
) -> list[Image.Image]:
    """Return the pictures of latents B 4 h w. labels: of the pictures, for warnings."""
    made: list[Image.Image] = []
    size = vae_batch(vae_batch_size, len(latents))
    for group in latents.split(size):
        pixels = model.vae.decode((group / model.kind.latent_scale).to(model.vae_dtype)).sample.float()
        made += [to_image(each, label) for each, label in zip(pixels, labels[len(made) :], strict=False)]
    return made


def to_image(pixels: Tensor, label: str) -> Image.Image:
    """Return pixels 3 H W as a picture. NaN becomes black, with a warning that names the picture."""
    if not bool(pixels.isfinite().all()):
        logger.warning(
            "%s: the picture has NaN or infinite pixels, they are black. A number was too large for 16 bits: "
            "try --no_half_vae, then --bf16 instead of --fp16",
            label,
        )
        pixels = pixels.nan_to_num(-1, -1, -1)
    values = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu() * 255
    return Image.fromarray(values.round().to(torch.uint8).numpy())


def vae_batch(size: float | None, count: int) -> int:
    """Return how many of `count` pictures the autoencoder takes at once.

    size: --vae_batch_size; None: all.
    """
    if size is None:
        return count
    return max(int(size * count if size < 1 else size), 1)
