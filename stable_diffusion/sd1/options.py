"""Options of train_network.py and the sd_cache_... scripts. Standard library only."""

from modules.options import HABIT, IDENTITY, option
from stable_diffusion.generation_options import StableDiffusionGenerationOptions, script_defaults
from stable_diffusion.training_options import (
    LatentCachingOptions,
    StableDiffusionTrainingOptions,
    TextCachingOptions,
    caching_options,
    generation_options,
)

__all__ = ("caching_options", "generation_options")
NAME = "Stable Diffusion 1.x and 2.x"
GENERATION = script_defaults(512, side_step=8)


def _clip_skip() -> int | None:
    skip: int | None = option(
        "layer of the text encoder whose states are used, from the end: 1 is the last one, which is usual; "
        "2.x is loaded without OpenCLIP's last layer, as it was trained",
        least=1,
        hint="1 or 2",
        facts=IDENTITY,
    )
    return skip


class Sd1TrainingOptions(StableDiffusionTrainingOptions, title=NAME):
    """Options of train_network.py besides the shared ones."""

    v2: bool = option("the checkpoint is Stable Diffusion 2.x; read from the file if not given", facts=HABIT)
    clip_skip: int | None = _clip_skip()


class Sd1LatentCachingOptions(LatentCachingOptions, title=NAME):
    """Options of sd_cache_latents.py besides the shared ones."""


class Sd1TextCachingOptions(TextCachingOptions, title=NAME):
    """Options of sd_cache_text_encoder_outputs.py besides the shared ones."""

    clip_skip: int | None = _clip_skip()


class Sd1GenerationOptions(StableDiffusionGenerationOptions, title=NAME):
    """Options of sd_generate_image.py besides the shared ones."""
