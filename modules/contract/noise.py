"""Noise conventions of a family: how noise is mixed in, and the network's timesteps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSpec:
    """Noise conventions of a family; the defaults are those of the video families.

    Without a table the model is a rectified flow: noisy = (1 - sigma) latents + sigma noise, sigma from 0 to
    1. With one it predicts noise, in k-diffusion's form: noisy = latents + sigma noise, sigma from the table.
    In both, the velocity that `predict` returns is the derivative of `noisy` by sigma: `noise - latents`, or
    `noise`.
    """

    training_offset: float = 1.0  # training feeds 1000 sigma + this, except with --timestep_sampling sigma
    # of the velocity in what the network itself returns: -1 for latents - noise, which `predict` turns round.
    # Only --model_prediction_type mixes the output with other tensors, so that it matters
    output_sign: float = 1.0
    whole_timesteps: bool = False  # what is fed is cut to a whole number
    table_is_shifted: bool = False  # --discrete_flow_shift shifts --timestep_sampling sigma too
    # shape of the latents -> number of tokens, for shifts that follow the size. No lambda: workers receive it
    tokens: Callable[[Sequence[int]], int] | None = None
    table: tuple[float, ...] = ()  # the sigma of each of the 1000 timesteps, for a model that predicts noise
    # with which a batch of clips is trained with its first latent frame clean, as `Tweaks.given_frames` says
    first_frame_probability: float = 0.0

    def data_shares(self, sigmas: Tensor) -> Tensor:
        """Return the factor of the latents in a mixture: shaped like `sigmas`, float32."""
        return torch.ones_like(sigmas.float()) if self.table else 1 - sigmas.float()

    def velocity(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Return the target of `predict`: shaped like `latents` and `noise`, B C F H W."""
        return noise if self.table else noise - latents


def count_picture_tokens(shape: Sequence[int]) -> int:
    """Return the tokens of one latent frame: its height and width are halved. shape: B C F H W."""
    return (shape[-2] // 2) * (shape[-1] // 2)


# of the video families; as in other tuners the length of a video does not count towards its shift
FLOW = NoiseSpec(tokens=count_picture_tokens)
