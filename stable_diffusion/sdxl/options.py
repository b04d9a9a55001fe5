"""Options of sdxl_train_network.py and the sdxl_cache_... scripts. Standard library only."""

from modules.options import not_needed, unsupported
from stable_diffusion.generation_options import StableDiffusionGenerationOptions, script_defaults
from stable_diffusion.training_options import (
    LatentCachingOptions,
    StableDiffusionTrainingOptions,
    TextCachingOptions,
    caching_options,
    generation_options,
)

__all__ = ("caching_options", "generation_options")
NAME = "Stable Diffusion XL"
GENERATION = script_defaults(1024, side_step=32)
_IN_GUIDES = (
    "guides name it, and the known script itself does not have it. Give both rates to --text_encoder_lr: "
    "first that of CLIP-L, then that of OpenCLIP, such as --text_encoder_lr 1e-5 1e-5"
)


class SdxlTrainingOptions(StableDiffusionTrainingOptions, title=NAME):
    """Options of sdxl_train_network.py besides the shared ones."""

    text_encoder_lr1 = unsupported(_IN_GUIDES, type=float)
    text_encoder_lr2 = unsupported(_IN_GUIDES, type=float)
    v2 = unsupported("this script trains Stable Diffusion XL. Train 2.x with train_network.py --v2")
    clip_skip = not_needed(
        "Stable Diffusion XL was trained on the last but one layer of both text encoders, which is used.",
        type=int,
    )


class SdxlLatentCachingOptions(LatentCachingOptions, title=NAME):
    """Options of sdxl_cache_latents.py besides the shared ones."""


class SdxlTextCachingOptions(TextCachingOptions, title=NAME):
    """Options of sdxl_cache_text_encoder_outputs.py besides the shared ones."""


class SdxlGenerationOptions(StableDiffusionGenerationOptions, title=NAME):
    """Options of sdxl_generate_image.py besides the shared ones."""
