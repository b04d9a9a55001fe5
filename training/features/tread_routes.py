"""Which tokens of a micro-batch go through the middle blocks (--tread)."""
# Letters: B batch, L tokens of the grid of an image or video, K tokens in the middle blocks, F H W latents

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool3d

from modules.integers import ceil_div
from modules.private_torch import disable_modes
from modules.seeds import derive_seed
from training.loss import NoisyBatch, mask_weights


def select_kept_tokens(noisy_batch: NoisyBatch, grid: tuple[int, ...], drop_rate: float, seed: int) -> Tensor:
    """Return the indices of the tokens that pass through the middle blocks, B K on the CPU, ascending.

    The tokens are drawn for each sample. Frames given as conditions always pass through the blocks, and so do
    tokens inside the loss mask if it covers less than half of the sample. If too few other tokens remain,
    fewer than `drop_rate` bypass the blocks; the number is the same for all samples. The indices have values
    even when memory is predicted on tensors without storage.

    Args:
        noisy_batch: Batch with noise and timesteps.
        grid: Number of tokens along frames, rows and columns; images may have no frames.
        drop_rate: Fraction of the tokens to omit.
        seed: Seed of the run.
    """
    with disable_modes():
        # Ascending indices, B K, of the tokens to process: all required tokens and random others
        sizes = (*(1,) * (3 - len(grid)), *grid)
        # B L
        # A mask of the tokens that always pass through the blocks, B L bool on the CPU
        required = torch.zeros(len(noisy_batch.noise), sizes[0] * sizes[1] * sizes[2], dtype=torch.bool)
        weights = mask_weights(noisy_batch.batch, noisy_batch.noise)
        if weights is not None:
            latent_frames = noisy_batch.noise.shape[2]
            counts = (weights > 0).float().expand(-1, -1, latent_frames, -1, -1)
            masked = adaptive_max_pool3d(counts, sizes).flatten(1).bool().cpu()
            required |= masked & (masked.float().mean(1, keepdim=True) < 0.5)
        required[:, : _count_clean_tokens(noisy_batch, sizes)] = True
        is_required = required
        num_tokens = is_required.shape[1]
        # all samples drop equally many tokens, so the sample with the most required tokens sets the limit
        num_droppable = num_tokens - int(is_required.sum(1).max())
        num_noisy_tokens = num_tokens - _count_clean_tokens(noisy_batch, sizes)
        num_dropped = min(round(drop_rate * num_noisy_tokens), num_droppable)
        generator = torch.Generator().manual_seed(derive_seed(seed, "tread", noisy_batch.number))
        # random numbers below 1, plus 1 for required tokens: these come first
        priority = torch.rand(is_required.shape, generator=generator, dtype=torch.float64) + is_required
        by_priority = priority.argsort(dim=1, descending=True, stable=True)
        return by_priority[:, : num_tokens - num_dropped].sort(dim=1).values


def _count_clean_tokens(noisy_batch: NoisyBatch, sizes: tuple[int, ...]) -> int:
    """Return the number of tokens of the first latent frames, which stay clean in this batch."""
    frames, rows, columns = sizes
    num_latent_frames = noisy_batch.noise.shape[2]
    return ceil_div(noisy_batch.num_clean_frames * frames, num_latent_frames) * rows * columns
