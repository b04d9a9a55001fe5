"""Stable Diffusion 1.x and 2.x for train_network.py and its caches."""

from stable_diffusion import family
from stable_diffusion.sd1.options import (
    Sd1ControlNetTrainingOptions,
    Sd1ExtendedInversionTrainingOptions,
    Sd1GenerationOptions,
    Sd1LatentCachingOptions,
    Sd1TextCachingOptions,
    Sd1TrainingOptions,
)
from stable_diffusion.training_options import InversionOptions


def family_for_latent_caching(options: Sd1LatentCachingOptions) -> family.StableDiffusion:
    """Return the family for sd_cache_latents.py."""
    return family.family_for_latent_caching(family.SD1_AND_SD2, options)


def family_for_text_caching(options: Sd1TextCachingOptions) -> family.StableDiffusion:
    """Return the family for sd_cache_text_encoder_outputs.py."""
    return family.family_for_text_caching(family.SD1_AND_SD2, options, options.clip_skip)


def family_for_training(options: Sd1TrainingOptions) -> family.StableDiffusion:
    """Return the family for a training script, with the embedding or ControlNet that the script trains."""
    model = family.family_for_training(family.SD1_AND_SD2, options, options.v2, options.clip_skip)
    if isinstance(options, Sd1ExtendedInversionTrainingOptions):
        return family.with_extended_inversion(model)
    if isinstance(options, InversionOptions):
        return family.with_inversion(model)
    if isinstance(options, Sd1ControlNetTrainingOptions):
        return family.with_control_net(
            model,
            options.controlnet_model_name_or_path,
            new_layers_lr=None,
            gradient_checkpointing=options.gradient_checkpointing,
        )
    return model


def family_for_generation(options: Sd1GenerationOptions) -> family.StableDiffusion:
    """Return the family for sd_generate_image.py."""
    return family.family_for_generation(family.SD1_AND_SD2, options)
