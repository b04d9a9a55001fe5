"""Options of train_network.py and the sd_cache_... scripts. Standard library only."""

from pathlib import Path

from modules.options import CHANGEABLE, FREE, HABIT, IDENTITY, option
from stable_diffusion.generation_options import StableDiffusionGenerationOptions, script_defaults
from stable_diffusion.training_options import (
    IF_TRAINED,
    FullFineTuningMixin,
    InversionOptions,
    LatentCachingOptions,
    StableDiffusionTrainingOptions,
    TextCachingOptions,
    caching_options,
    generation_options,
    text_rate,
    text_switch,
    weights_option,
)

__all__ = ("caching_options", "generation_options")
NAME = "Stable Diffusion 1.x and 2.x"
GENERATION = script_defaults(512, side_step=8)


def _clip_skip() -> int | None:
    skip: int | None = option(
        "layer of the text encoder whose states are used, from the end: 1 is the last one, which is "
        "common; 2.x is loaded without OpenCLIP's last layer, as it was trained",
        minimum=1,
        hint="1 or 2",
        facts=IDENTITY,
    )
    return skip


class Sd1TrainingOptions(StableDiffusionTrainingOptions, title=NAME):
    """Options that train_network.py adds to those shared by all model families."""

    v2: bool = option("the checkpoint is Stable Diffusion 2.x; read from the file if not given", facts=HABIT)
    clip_skip: int | None = _clip_skip()


class Sd1ControlNetTrainingOptions(Sd1TrainingOptions, title=NAME):
    """Options that train_control_net.py adds to those shared by all model families."""

    controlnet_model_name_or_path: Path | None = weights_option()
    gradient_checkpointing: bool = option(name="gradient_checkpointing", facts=FREE)


class Sd1InversionTrainingOptions(InversionOptions, Sd1TrainingOptions, title=NAME):
    """Options that train_textual_inversion.py adds to those shared by all model families."""


class Sd1ExtendedInversionTrainingOptions(InversionOptions, Sd1TrainingOptions, title=NAME):
    """Options that train_textual_inversion_XTI.py adds to those shared by all model families."""


class Sd1FineTuningOptions(FullFineTuningMixin, Sd1TrainingOptions, title=NAME):
    """Options that fine_tune.py adds to those shared by all model families."""

    train_text_encoder: bool = text_switch("train the text encoder with the U-Net")
    learning_rate_te: float | None = text_rate("the text encoder", IF_TRAINED)
    full_bf16: bool = option(name="full_bf16", facts=FREE)  # the shared one: text encoders learn in it too

    @property
    def text_rates(self) -> dict[str, float | None]:
        return {"text_encoder": self.learning_rate_te} if self.train_text_encoder else {}


class Sd1DreamBoothOptions(FullFineTuningMixin, Sd1TrainingOptions, title=NAME):
    """Options that train_db.py adds to those shared by all model families."""

    learning_rate_te: float | None = text_rate("the text encoder, which learns with the U-Net")
    stop_text_encoder_training: int | None = option(
        "the text encoder learns during so many steps; -1: it does not learn; default: to the end",
        minimum=-1,
        facts=CHANGEABLE,
    )
    no_token_padding: bool = option(
        "do not fill captions up to 75 tokens, but to the longest one of each batch",
        excludes="max_token_length",
        hint="both change how many tokens are read",
        facts=IDENTITY,
    )
    full_bf16: bool = option(name="full_bf16", facts=FREE)  # the shared one: text encoders learn in it too

    @property
    def pads_captions(self) -> bool:
        return not self.no_token_padding

    @property
    def text_rates(self) -> dict[str, float | None]:
        return {} if self.text_steps == 0 else {"text_encoder": self.learning_rate_te}

    @property
    def text_steps(self) -> int | None:
        stop = self.stop_text_encoder_training
        return None if stop is None else max(stop, 0)


class Sd1LatentCachingOptions(LatentCachingOptions, title=NAME):
    """Options that sd_cache_latents.py adds to those shared by all model families."""


class Sd1TextCachingOptions(TextCachingOptions, title=NAME):
    """Options that sd_cache_text_encoder_outputs.py adds to those shared by all model families."""

    clip_skip: int | None = _clip_skip()


class Sd1GenerationOptions(StableDiffusionGenerationOptions, title=NAME):
    """Options that sd_generate_image.py adds to those shared by all model families."""
