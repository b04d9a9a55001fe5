"""Options of the scripts that train Stable Diffusion XL and cache for it. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import CHANGEABLE, FREE, IDENTITY, not_needed, option, unsupported
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
    rate_option,
    read_block_rates,
    text_rate,
    text_switch,
    weights_option,
)

__all__ = ("caching_options", "generation_options")
NAME = "Stable Diffusion XL"
GENERATION = script_defaults(1024, side_step=32)
_IN_GUIDES = (
    "guides name it, and the known script itself does not have it. Pass both rates to --text_encoder_lr: "
    "first that of CLIP-L, then that of OpenCLIP, such as --text_encoder_lr 1e-5 1e-5"
)


_ONE_RATE = "both text encoders have one rate. Pass it to --learning_rate"
_NO_TEXTS = "the text encoders are not trained. Omit it"
_NO_MASKS = (
    "control images of Stable Diffusion XL have 3 channels, and no program reads a mask as a fourth. To "
    "repaint, train with --train_inpainting (sdxl_train_network.py), or a ControlNet-LLLite of Anima"
)
MAX_WIDTH = 1024  # maximum width of the embedding of a control image; released files have 16 to 64


class SdxlLearningOptions(StableDiffusionTrainingOptions, title=NAME):
    """SDXL options of training scripts, in addition to those shared by all model families."""

    v2 = unsupported("this script trains Stable Diffusion XL. Train 2.x with train_network.py --v2")
    clip_skip = not_needed(
        "Stable Diffusion XL was trained on the last but one layer of both text encoders, which is used.",
        type=int,
    )


class SdxlTrainingOptions(SdxlLearningOptions, title=NAME):
    """Options that sdxl_train_network.py adds to those shared by all model families."""

    text_encoder_lr1 = unsupported(_IN_GUIDES, type=float)
    text_encoder_lr2 = unsupported(_IN_GUIDES, type=float)


class SdxlLlliteTrainingOptions(SdxlLearningOptions, title=NAME):
    """Options that sdxl_train_control_net_lllite.py adds to those shared by all model families."""

    cond_emb_dim: int | None = option(
        "number of values for the control image at each position, even; default: those of "
        "--network_weights, else 32",
        minimum=2,
        maximum=MAX_WIDTH,
        hint="32 is usual",
        often=True,
        facts=IDENTITY,
    )
    network_dim: int | None = option(name="network_dim", facts=FREE)
    network_dropout: float | None = option(name="network_dropout", facts=FREE)
    network_weights: Path | None = option(name="network_weights", facts=FREE)
    text_encoder_lr1 = unsupported(_NO_TEXTS, type=float)
    text_encoder_lr2 = unsupported(_NO_TEXTS, type=float)
    lllite_cond_in_channels = unsupported(_NO_MASKS, type=int, default=3)

    def __post_init__(self) -> None:
        if self.cond_emb_dim is not None and self.cond_emb_dim % 2:
            raise OptionError(
                f"--cond_emb_dim {self.cond_emb_dim} is odd: the first convolutions have half as many "
                f"channels. Pass {self.cond_emb_dim + 1}"
            )


class SdxlControlNetTrainingOptions(SdxlLearningOptions, title=NAME):
    """Options that sdxl_train_control_net.py adds to those shared by all model families."""

    controlnet_model_name_or_path: Path | None = weights_option()
    control_net_lr: float = rate_option()
    gradient_checkpointing: bool = option(name="gradient_checkpointing", facts=FREE)
    text_encoder_lr1 = unsupported(_NO_TEXTS, type=float)
    text_encoder_lr2 = unsupported(_NO_TEXTS, type=float)


class SdxlInversionTrainingOptions(InversionOptions, SdxlLearningOptions, title=NAME):
    """Options that sdxl_train_textual_inversion.py adds to those shared by all model families."""

    text_encoder_lr1 = unsupported(_ONE_RATE, type=float)
    text_encoder_lr2 = unsupported(_ONE_RATE, type=float)


_LORA_ONLY = "it is of LoRAs. Pass the rate of {} to --{}"


class SdxlFullTrainingOptions(FullFineTuningMixin, SdxlLearningOptions, title=NAME):
    """Options that sdxl_train.py adds to those shared by all model families."""

    train_text_encoder: bool = text_switch("train both text encoders with the U-Net")
    learning_rate_te1: float | None = text_rate("CLIP-L, the first text encoder", IF_TRAINED)
    learning_rate_te2: float | None = text_rate("OpenCLIP, the second one", IF_TRAINED)
    block_lr: str | None = option(
        "learning rates of the U-Net's 23 blocks, with commas: embeddings of time and size, 9 input blocks, "
        "3 middle blocks, 9 output blocks, output; 0 freezes a block",
        facts=CHANGEABLE,
    )
    full_bf16: bool = option(name="full_bf16", facts=FREE)  # the shared one: text encoders learn in it too
    text_encoder_lr1 = unsupported(_LORA_ONLY.format("CLIP-L", "learning_rate_te1"), type=float)
    text_encoder_lr2 = unsupported(_LORA_ONLY.format("OpenCLIP", "learning_rate_te2"), type=float)

    @property
    def text_rates(self) -> dict[str, float | None]:
        rates = {"text_encoder": self.learning_rate_te1, "text_encoder_2": self.learning_rate_te2}
        return rates if self.train_text_encoder else {}

    @property
    def block_rates(self) -> tuple[float, ...]:
        return read_block_rates(self.block_lr)


class SdxlLatentCachingOptions(LatentCachingOptions, title=NAME):
    """Options that sdxl_cache_latents.py adds to those shared by all model families."""


class SdxlTextCachingOptions(TextCachingOptions, title=NAME):
    """Options that sdxl_cache_text_encoder_outputs.py adds to those shared by all model families."""


class SdxlGenerationOptions(StableDiffusionGenerationOptions, title=NAME):
    """Options that sdxl_generate_image.py adds to those shared by all model families."""
