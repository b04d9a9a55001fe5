"""The noise schedule that Stable Diffusion is trained on: levels, loss factors, changes to the noise.

SNR is the ratio of signal to noise of a timestep, a / (1 - a), where a is `alphas_cumprod` of DDPM.
Sources: DDPM, Ho et al. 2020, arXiv 2006.11239; min-SNR, Hang et al. 2023, arXiv 2303.09556; zero terminal
SNR, Lin et al. 2023, arXiv 2305.08891; debiased estimation, Yu et al. 2023, arXiv 2310.08442.
"""
# Letters: B images, C channels, h w latent size

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from protocols.family import NoiseSpec
from stable_diffusion.diffusers_parts import rescale_zero_terminal_snr
from stable_diffusion.samplers import TRAINED
from stable_diffusion.training_options import LossWeightOptions, VariedNoiseOptions

# larger values are clamped to this, because the first timestep's would dwarf all others
MAX_SNR = 1000.0


@dataclass(frozen=True)
class VariedNoise:
    """Modify training noise: add a constant offset per channel, and noise of lower resolutions."""

    offset: float | None = None
    offset_is_random: bool = False  # whether a random fraction of the offset is used for each batch
    adaptive_scale: float = 0.0  # added to the offset, times the mean of the latents' channel
    levels: int = 0  # number of levels of coarser noise
    discount: float = 0.3  # factor on each coarser level

    def __call__(self, noise: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the modified training noise, B C 1 h w.

        Args:
            noise: Gaussian noise, B C 1 h w.
            latents: Latents in model space, B C 1 h w.
            generator: Random generator.
        """
        if self.offset is not None:
            noise = self._add_offset(noise, latents, generator)
        return self._add_levels(noise, generator) if self.levels else noise

    def _add_offset(self, noise: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise that is constant per channel ("Diffusion with Offset Noise", Guttenberg 2023)."""
        assert self.offset is not None
        share = torch.rand((), generator=generator) if self.offset_is_random else torch.ones(())
        offset = self.offset * share
        if self.adaptive_scale:
            means = latents.mean(dim=(-2, -1), keepdim=True).abs()
            offset = (offset + self.adaptive_scale * means).clamp(min=0)
        return noise + offset * torch.randn((*noise.shape[:2], 1, 1, 1), generator=generator)

    def _add_levels(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise of lower resolutions ("Multi-Resolution Noise", Whitaker 2023)."""
        height, width = noise.shape[-2:]
        total = noise
        for level in range(self.levels):
            ratio = 2 + 2 * torch.rand((), generator=generator).item()
            size = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
            coarse = torch.randn((*noise.shape[:2], *size), generator=generator)
            fine = interpolate(coarse, (height, width), mode="bilinear")
            total = total + fine.unsqueeze(2) * self.discount**level
            if 1 in size:
                break
        return total / total.std()


def read_noise_changes(options: VariedNoiseOptions) -> VariedNoise | None:
    """Return the modifications of training noise that the options request; None for none."""
    if options.noise_offset is None and not options.multires_noise_iterations:
        return None
    return VariedNoise(
        options.noise_offset,
        offset_is_random=options.noise_offset_random_strength,
        adaptive_scale=options.adaptive_noise_scale or 0.0,
        levels=options.multires_noise_iterations or 0,
        discount=options.multires_noise_discount,
    )


def read_betas() -> Tensor:
    """Return the 1000 betas that the models were trained with, float32, computed like diffusers' betas."""
    low, high = TRAINED["beta_start"] ** 0.5, TRAINED["beta_end"] ** 0.5
    return torch.linspace(low, high, TRAINED["num_train_timesteps"], dtype=torch.float32).square()


def make_noise_spec(
    predicts_v: bool,
    zero_terminal_snr: bool = False,
    weights: LossWeightOptions | None = None,
    vary: VariedNoise | None = None,
) -> NoiseSpec:
    """Describe the noise schedule, prediction type and loss factors of a model that predicts noise or v.

    Args:
        predicts_v: Whether the U-Net predicts v instead of noise.
        zero_terminal_snr: Whether the betas are rescaled so that the last timestep is pure noise.
        weights: Options for loss factors.
        vary: Changes the noise; None leaves it Gaussian.
    """
    betas = read_betas()
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    factors = () if weights is None else loss_factors(weights, alphas_cumprod, predicts_v)
    if zero_terminal_snr:
        alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    return NoiseSpec(
        training_offset=0.0,
        integer_timesteps=True,
        table=tuple((1 - alphas_cumprod).sqrt().tolist()),  # share of noise (sigma) at each timestep
        keeps_variance=True,  # noisy = sqrt(1 - sigma^2) latents + sigma noise, as in DDPM
        predicts_v=predicts_v,
        loss_factors=factors,
        vary_noise=vary,
    )


def loss_factors(weights: LossWeightOptions, alphas_cumprod: Tensor, predicts_v: bool) -> tuple[float, ...]:
    """Return the loss factor of each timestep; () if all are 1. Several weightings multiply.

    Args:
        weights: Options of the factors.
        alphas_cumprod: Products of 1 - beta, before betas are rescaled for zero terminal SNR, as in other
            trainers. With rescaled betas, some factors would divide by the last timestep's SNR, 0.
        predicts_v: Whether the U-Net predicts v instead of noise.
    """
    if not weights.has_any:
        return ()
    alphas_cumprod = alphas_cumprod.double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    capped = snr.clamp(max=MAX_SNR)  # not for Min-SNR, which has its own, smaller limit
    factors = torch.ones_like(snr)
    if weights.min_snr_gamma:
        factors *= snr.clamp(max=weights.min_snr_gamma) / (snr + 1 if predicts_v else snr)
    if weights.scale_v_pred_loss_like_noise_pred:
        factors *= capped / (capped + 1)
    if weights.v_pred_like_loss:
        factors *= 1 + weights.v_pred_like_loss * (capped + 1) / capped
    if weights.debiased_estimation_loss:
        factors *= 1 / (capped + 1) if predicts_v else capped.rsqrt()
    return tuple(factors.tolist())
