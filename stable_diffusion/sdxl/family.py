"""Stable Diffusion XL for sdxl_train_network.py and its caches."""

from stable_diffusion import family
from stable_diffusion.sdxl.options import (
    SdxlGenerationOptions,
    SdxlLatentCachingOptions,
    SdxlTextCachingOptions,
    SdxlTrainingOptions,
)


def family_for_latent_caching(options: SdxlLatentCachingOptions) -> family.StableDiffusion:
    return family.family_for_latent_caching(family.OF_XL, options)


def family_for_text_caching(options: SdxlTextCachingOptions) -> family.StableDiffusion:
    return family.family_for_text_caching(family.OF_XL, options)


def family_for_training(options: SdxlTrainingOptions) -> family.StableDiffusion:
    return family.family_for_training(family.OF_XL, options)


def family_for_generation(options: SdxlGenerationOptions) -> family.StableDiffusion:
    return family.family_for_generation(family.OF_XL, options)
