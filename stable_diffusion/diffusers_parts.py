"""Classes and functions of diffusers, each imported on first use.

Importing them takes eight processor seconds, as they import torch's compiler, PEFT and transformers. What
only describes a model (`new`, checks of options and files' marks) does without.
"""

from importlib import import_module
from typing import Any

from torch import Tensor


def unet_class() -> type[Any]:
    """Import and return diffusers' U-Net class."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel


def vae_class() -> type[Any]:
    """Import and return diffusers' VAE class."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


def scheduler_class(name: str) -> type[Any]:
    """Import a diffusers scheduler by module and class, such as ddim.DDIMScheduler.

    Importing from the module also works without scipy, whereas the package omits classes that need it.
    """
    file, _, class_name = name.partition(".")
    found: type[Any] = getattr(import_module(f"diffusers.schedulers.scheduling_{file}"), class_name)
    return found


def make_xformers_processor() -> Any:
    """Return an attention processor that calls xformers."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    return XFormersAttnProcessor()


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas so that the last timestep has zero signal-to-noise ratio.

    Args:
        betas: Betas of the schedule, float32, one per timestep.
    """
    from diffusers.schedulers import scheduling_ddim

    return scheduling_ddim.rescale_zero_terminal_snr(betas)


def diffusers_version() -> str:
    """Return the diffusers version, for metadata."""
    import diffusers

    return str(diffusers.__version__)
