"""HunyuanImage-2.1's own options for caching, training and generation. Standard library only."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, NO_PIXELS, Options, option
from modules.parser import typed_names
from modules.speed_options import (
    GENERATION_VALUES,
    TRAINING_FLAGS,
    VaeOptions,
    dit_dtype_option,
    fp8_text_option,
    text_form_option,
)

logger = logging.getLogger(__name__)

NAME = "HunyuanImage-2.1"
TILE = 384  # pixels, as the released VAE
MIN_TILE = 128  # four latent pixels, of which tiles share one
# the last steps, from 0, that are guided by the plain formula, as released
APG_START_OCR, APG_START = 38, 5
ATTENTION = ("flash", "torch", "sageattn", "xformers", "sdpa")  # values of --attn_mode in training


class HunyuanImageVaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(
        facts=DECODING_SETTING,
        settings={"vae_tiling": {"help": f"encode and decode in tiles of {TILE} pixels: less memory"}},
    )
    vae_chunk_size: int | None = option(
        "number of rows that a convolution of the VAE computes at a time; fewer take less memory",
        minimum=1,
        maximum=100_000,
        facts=NO_PIXELS,
    )

    def __post_init__(self) -> None:
        size = self.file.vae_spatial_tile_sample_min_size
        if size is not None and size < MIN_TILE:
            raise OptionError(
                f"--vae_spatial_tile_sample_min_size {size}: use at least {MIN_TILE}; {TILE} are usual"
            )

    @property
    def tile(self) -> int | None:
        """Edge length of a VAE tile in pixels; None disables tiling."""
        size = self.file.vae_spatial_tile_sample_min_size
        return size or (TILE if self.file.vae_tiling else None)


class HunyuanImageTextOptions(Options):
    """Paths of the two text encoders, and how they run."""

    text_encoder: Path | None = option("Qwen2.5-VL (7B) text encoder: file or folder", often=True)
    text_encoder_tokenizer: Path | None = option(
        "its tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub"
    )
    byt5: Path | None = option(
        "ByT5 encoder of the texts to be written in the image: file or folder", often=True
    )
    text_encoder_dtype: str | None = option(
        "dtype that both encoders compute in; default: bfloat16 and float16, but float32 with a float32 "
        "transformer, or for a training with --mixed_precision no"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen2.5-VL in fp8: half the memory, slightly different states"
    )
    text_encoder_form: str | None = text_form_option()
    text_encoder_cpu: bool = option("run the text encoders on the CPU")


_LAST_PLAIN: Mapping[str, Any] = {
    "minimum": -1,
    "hint": "the last step, from 0, that is guided by the plain formula; -1: none is",
}


class ProjectedGuidanceOptions(Options):
    """Options of projected guidance: its first step, and the fraction of contrast that it removes."""

    apg_start_step_ocr: int = option(
        "last step, from 0, with plain guidance if the prompt has a text in quotation marks; later ones have "
        "adaptive projected guidance",
        default=APG_START_OCR,
        **_LAST_PLAIN,
    )
    apg_start_step_general: int = option("the same for other prompts", default=APG_START, **_LAST_PLAIN)
    guidance_rescale_apg: float = option(
        "--guidance_rescale of the steps with adaptive projected guidance", default=0.0, minimum=0, maximum=1
    )


RELEASED_GUIDANCE = ProjectedGuidanceOptions()


class HunyuanImageLatentCachingOptions(Options, title=NAME):
    """Options of hunyuan_image_cache_latents.py in addition to the shared ones."""

    vae: HunyuanImageVaeOptions


class HunyuanImageTextCachingOptions(Options, title=NAME):
    """Options of hunyuan_image_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: HunyuanImageTextOptions = option(
        settings={"text_encoder": {"required": True}, "byt5": {"required": True}}
    )


class HunyuanImageTrainingOptions(Options, title=NAME):
    """Options of hunyuan_image_train_network.py in addition to those of all image trainers."""

    # resume compares its name
    dit: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    dit_dtype: str | None = dit_dtype_option()
    vae: HunyuanImageVaeOptions = option(facts=FREE, without=("vae",))
    text: HunyuanImageTextOptions = option(facts=FREE)
    attn_mode: str | None = option(
        "another spelling of the flags for attention: "
        + ", ".join(f"{value} is {TRAINING_FLAGS[GENERATION_VALUES[value]]}" for value in ATTENTION),
        choices=ATTENTION,
        facts=FREE,
    )


class HunyuanImageGenerationOptions(Options, title=NAME):
    """Options of hunyuan_image_generate_image.py in addition to the shared ones."""

    dit: Path | None = option(
        "transformer checkpoint", flags=("--dit", "--pretrained_model_name_or_path"), often=True
    )
    dit_dtype: str | None = dit_dtype_option()
    vae: HunyuanImageVaeOptions
    text: HunyuanImageTextOptions
    projection: ProjectedGuidanceOptions


def translate_attention(args: argparse.Namespace) -> None:
    """Translate HunyuanImage's names of the attention options into the shared ones."""
    if args.attn_mode is not None:
        flag = TRAINING_FLAGS[GENERATION_VALUES[args.attn_mode]]
        setattr(args, flag.removeprefix("--"), True)
        args.typed_names = {**typed_names(args), flag: f"--attn_mode {args.attn_mode}"}


def translate_training(args: argparse.Namespace) -> None:
    """Translate HunyuanImage's option names to the shared ones, for training a LoRA.

    Raises OptionError if only text encoders are to be trained, because this model's cannot be trained.
    """
    translate_attention(args)
    if args.network_train_text_encoder_only:
        raise OptionError(
            f"--network_train_text_encoder_only: the text encoders of {NAME}, a language model of 7 bn "
            "weights and ByT5, do not learn. Omit it"
        )
    if not args.network_train_unet_only:
        logger.info("The text encoders of %s do not learn: --network_train_unet_only is assumed.", NAME)
        args.network_train_unet_only = True


# of `ImageTrainerDefaults`, in the scripts that train
TRAINER: Mapping[str, Any] = {
    "timestep_sampling": "sigma",
    "discrete_flow_shift": 5.0,
    "model_prediction_type": "raw",
    "translate": translate_training,
    "tokenizers": {"text_encoder_tokenizer": "Qwen_Qwen2.5-VL-7B-Instruct"},
}


def caching_options(options: HunyuanImageTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), _list_text_options(options.text)


def generation_options(options: HunyuanImageTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    files = {"--dit": options.dit or Placeholder("DIT_FILE"), **options.vae.file.command_options()}
    return files | _list_text_options(options.text)


def _list_text_options(text: HunyuanImageTextOptions) -> dict[str, Any]:
    return {
        "--text_encoder": text.text_encoder or Placeholder("QWEN_FILE"),
        "--byt5": text.byt5 or Placeholder("BYT5_FILE"),
        "--text_encoder_tokenizer": text.text_encoder_tokenizer,
    }
