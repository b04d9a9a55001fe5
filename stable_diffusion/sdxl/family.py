"""Stable Diffusion XL for sdxl_train_network.py and its caches."""

from dataclasses import replace

from stable_diffusion import family
from stable_diffusion.sdxl.options import (
    SdxlControlNetTrainingOptions,
    SdxlGenerationOptions,
    SdxlLatentCachingOptions,
    SdxlLearningOptions,
    SdxlLlliteTrainingOptions,
    SdxlTextCachingOptions,
)
from stable_diffusion.training_options import InversionOptions


def family_for_latent_caching(options: SdxlLatentCachingOptions) -> family.StableDiffusion:
    """Return the family for sdxl_cache_latents.py."""
    return family.family_for_latent_caching(family.ONLY_SDXL, options)


def family_for_text_caching(options: SdxlTextCachingOptions) -> family.StableDiffusion:
    """Return the family for sdxl_cache_text_encoder_outputs.py."""
    return family.family_for_text_caching(family.ONLY_SDXL, options)


def family_for_training(options: SdxlLearningOptions) -> family.StableDiffusion:
    """Return the family for a training script, with the embedding, ControlNet or LLLite that it trains."""
    model = family.family_for_training(family.ONLY_SDXL, options)
    if isinstance(options, SdxlLlliteTrainingOptions):
        from stable_diffusion.lllite_learning import MODULE, describe_lllite  # only to train one

        return replace(model, custom_network=describe_lllite(options), lora_module=MODULE)
    if isinstance(options, InversionOptions):
        return family.with_inversion(model)
    if isinstance(options, SdxlControlNetTrainingOptions):
        return family.with_control_net(
            model,
            options.controlnet_model_name_or_path,
            new_layers_lr=options.control_net_lr,
            gradient_checkpointing=options.gradient_checkpointing,
        )
    return model


def family_for_generation(options: SdxlGenerationOptions) -> family.StableDiffusion:
    """Return the family for sdxl_generate_image.py."""
    return family.family_for_generation(family.ONLY_SDXL, options)
