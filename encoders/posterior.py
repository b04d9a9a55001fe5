"""Draw latents from the posterior that an autoencoder's encoder gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.seeds import derive_seed


def posterior_generator(owner: int | str) -> torch.Generator:
    """Return the generator for the posterior sample of a clip or a picture.

    owner: the name of the cached item, or the seed of the generation. So an item's cache does not depend on
    the other items of a run, and a generation depends only on its seed.
    """
    return torch.Generator().manual_seed(derive_seed("posterior", owner))


def sample_posterior(
    moments: Tensor, generators: Sequence[torch.Generator], limits: tuple[float, float] | None = None
) -> Tensor:
    """Return a sample of each posterior, B Z ... float32, on the device of `moments`.

    moments: B 2Z ... float32, means and logarithms of variances on the channel axis; overwritten. generators:
    one for each item; the noise is drawn in float32 on their device. limits: of the logarithms of variances;
    None: they count as they are.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    if limits is not None:
        log_variance.clamp_(*limits)
    # in place: even the latents of a long clip are large
    deviation = log_variance.mul_(0.5).exp_()
    for item, each in enumerate(generators):
        noise = torch.randn(mean.shape[1:], generator=each, device=each.device)
        mean[item] += deviation[item].mul_(noise.to(mean.device))
    return mean.contiguous()
