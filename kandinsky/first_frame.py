"""Clips of Kandinsky that begin with an image: their size, and the correction of their first frames."""

from pathlib import Path

from torch import Tensor

from modules.media.pixels import image_size

SIZE_STEP = 16  # pixels: VAE stride 8, patch 2
CORRECTED_FRAMES, REFERENCE_FRAMES = 4, 5  # latent frames
# how far the mean and the standard deviation may move down and up
MEAN_LIMITS = (0.05, 0.1)
STD_LIMITS = (0.1, 0.25)


def size_like_image(path: Path, area: int) -> tuple[int, int]:
    """Return a width and height with an image's aspect ratio and about `area` pixels.

    Sides are rounded to the nearest multiple of 16. Source: the maker's image-to-video code.
    """
    width, height = image_size(path)
    scale = (area / (width * height)) ** 0.5 / SIZE_STEP
    return max(round(width * scale), 1) * SIZE_STEP, max(round(height * scale), 1) * SIZE_STEP


def match_first_frames(latents: Tensor) -> Tensor:
    """Bring the mean and spread of the first four latent frames to those of the next five.

    Without it, the first frames of a clip that begins with an image show a mesh. Both numbers move only
    within limits. A clip of fewer than five latent frames is returned as it is, because no frame follows the
    first four. Source: the maker's code and diffusers' `normalize_first_frame`.

    Args:
        latents: Finished latents of clips, B C F H W float32.

    Returns:
        Latents of the same shape.
    """
    first, reference = latents[:, :, :CORRECTED_FRAMES], latents[:, :, CORRECTED_FRAMES:]
    reference = reference[:, :, :REFERENCE_FRAMES]
    if not reference.shape[2]:
        return latents
    corrected = latents.clone()
    for index in range(len(latents)):  # each clip has its own statistics
        mean, std = first[index].mean(), first[index].std()
        new_mean = reference[index].mean().clamp(mean - MEAN_LIMITS[0], mean + MEAN_LIMITS[1])
        new_std = reference[index].std().clamp(std - STD_LIMITS[0], std + STD_LIMITS[1])
        corrected[index, :, :CORRECTED_FRAMES] = (first[index] - mean) / std * new_std + new_mean
    return corrected
