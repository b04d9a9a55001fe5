"""HunyuanImage-2.1's own options for caching, training and generation. Standard library only."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.attention.options import GENERATION_VALUES, TRAINING_FLAGS, add_split_argument
from modules.command import as_typed
from modules.dit_options import add_dit_dtype
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE, HABIT, NO_PIXELS, OF_DECODING
from modules.vae_options import VaeOptions, add_vae_arguments

logger = logging.getLogger(__name__)

NAME = "HunyuanImage-2.1"
TILE = 384  # pixels, as the released VAE
LEAST_TILE = 128  # four latent pixels, of which tiles share one
# the last steps, from 0, that are guided by the plain formula, as released
APG_START_OCR, APG_START = 38, 5
ATTENTION = ("flash", "torch", "sageattn", "xformers", "sdpa")  # values of --attn_mode in training


@dataclass(frozen=True)
class HunyuanImageVaeOptions:
    """Path of the VAE and how it runs."""

    file: VaeOptions = field(metadata=OF_DECODING)
    vae_chunk_size: int | None = field(metadata=NO_PIXELS)

    def __post_init__(self) -> None:
        rows = "the number of rows that a convolution computes at a time"
        check_at_least("--vae_chunk_size", self.vae_chunk_size, 1, rows)
        check_at_most("--vae_chunk_size", self.vae_chunk_size, 100_000, rows)
        size = self.file.vae_spatial_tile_sample_min_size
        check_at_least("--vae_spatial_tile_sample_min_size", size, LEAST_TILE, f"{TILE} pixels are usual")

    @property
    def tile(self) -> int | None:
        """Return the edge of a tile in pixels, None for no tiling. A size implies tiling."""
        size = self.file.vae_spatial_tile_sample_min_size
        return size or (TILE if self.file.vae_tiling else None)


@dataclass(frozen=True)
class HunyuanImageTextOptions:
    """Paths of the two text encoders, and how they run."""

    text_encoder: Path | None
    text_encoder_tokenizer: Path | None
    byt5: Path | None
    text_encoder_dtype: str | None
    fp8_vl: bool
    text_encoder_cpu: bool


@dataclass(frozen=True)
class ProjectedGuidanceOptions:
    """From which step on guidance is projected, and how much of its contrast is taken back there."""

    apg_start_step_ocr: int
    apg_start_step_general: int
    guidance_rescale_apg: float

    def __post_init__(self) -> None:
        steps = "the last step, from 0, that is guided by the plain formula; -1: none is"
        for option, step in {
            "--apg_start_step_ocr": self.apg_start_step_ocr,
            "--apg_start_step_general": self.apg_start_step_general,
        }.items():
            check_at_least(option, step, -1, steps)
        if not 0 <= self.guidance_rescale_apg <= 1:  # nan too
            raise OptionError(
                f"--guidance_rescale_apg {self.guidance_rescale_apg:g}: give a share from 0 to 1"
            )


AS_RELEASED = ProjectedGuidanceOptions(APG_START_OCR, APG_START, 0.0)


@dataclass(frozen=True)
class HunyuanImageLatentCachingOptions:
    """Options of hunyuan_image_cache_latents.py besides the shared ones."""

    vae: HunyuanImageVaeOptions


@dataclass(frozen=True)
class HunyuanImageTextCachingOptions:
    """Options of hunyuan_image_cache_text_encoder_outputs.py besides the shared ones."""

    text: HunyuanImageTextOptions


@dataclass(frozen=True)
class HunyuanImageTrainingOptions:
    """Options of hunyuan_image_train_network.py besides those of all image trainers."""

    # resume compares its name
    dit: Path | None = field(metadata={"option": "pretrained_model_name_or_path", **FREE})
    dit_dtype: str | None = field(metadata=HABIT)
    vae: HunyuanImageVaeOptions = field(metadata=FREE)
    text: HunyuanImageTextOptions = field(metadata=FREE)


@dataclass(frozen=True)
class HunyuanImageGenerationOptions:
    """Options of hunyuan_image_generate_image.py besides the shared ones."""

    dit: Path | None
    dit_dtype: str | None
    vae: HunyuanImageVaeOptions
    text: HunyuanImageTextOptions
    projection: ProjectedGuidanceOptions


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the VAE and how it runs."""
    add_vae(parser.add_argument_group(NAME))


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the text encoders."""
    add_text(parser.add_argument_group(NAME), required=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what image trainers do not share: the encoders, and attention by another name."""
    group = parser.add_argument_group(NAME)
    add_dit_dtype(group)
    add_vae(group, flags=())
    add_text(group, required=False)
    flags = ", ".join(f"{value} is {TRAINING_FLAGS[GENERATION_VALUES[value]]}" for value in ATTENTION)
    group.add_argument(
        "--attn_mode",
        type=str,
        default=None,
        choices=ATTENTION,
        help=f"another spelling of the flags for attention: {flags}",
    )


def translate_training(args: argparse.Namespace) -> None:
    """Put HunyuanImage's own names of shared options into the shared ones.

    Raises OptionError if text encoders alone are to learn, which this model's do not.
    """
    if args.attn_mode is not None:
        flag = TRAINING_FLAGS[GENERATION_VALUES[args.attn_mode]].removeprefix("--")
        setattr(args, flag, True)
    if args.network_train_text_encoder_only:
        raise OptionError(
            f"--network_train_text_encoder_only: the text encoders of {NAME}, a language model of 7 bn "
            "weights and ByT5, do not learn. Leave it out"
        )
    if not args.network_train_unet_only:
        logger.info("The text encoders of %s do not learn: --network_train_unet_only is assumed.", NAME)
        args.network_train_unet_only = True


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoints that generation needs, and this model's guidance."""
    group = parser.add_argument_group(NAME)
    group.add_argument(
        "--dit",
        "--pretrained_model_name_or_path",
        dest="dit",
        type=str,
        default=None,
        help="transformer checkpoint",
    )
    add_dit_dtype(group)
    add_vae(group)
    add_text(group, required=False)
    add_projection(group)
    add_split_argument(group)


def add_vae(group: argparse._ArgumentGroup, flags: tuple[str, ...] = ("--vae",)) -> None:
    """Declare the options of `HunyuanImageVaeOptions`. flags: see `add_vae_arguments`."""
    add_vae_arguments(group, flags=flags, tile=TILE)
    group.add_argument(
        "--vae_chunk_size",
        type=int,
        default=None,
        help="number of rows that a convolution of the VAE computes at a time; fewer take less memory",
    )


def add_text(group: argparse._ArgumentGroup, required: bool) -> None:
    """Declare the options of `HunyuanImageTextOptions`."""
    group.add_argument(
        "--text_encoder",
        type=str,
        default=None,
        required=required,
        help="Qwen2.5-VL (7B) text encoder: file or folder",
    )
    group.add_argument(
        "--text_encoder_tokenizer",
        type=str,
        default=None,
        help="its tokenizer: folder or file; default: in or beside the encoder's folder, else from the hub",
    )
    group.add_argument(
        "--byt5",
        type=str,
        default=None,
        required=required,
        help="ByT5 encoder of the texts to be written in the picture: file or folder",
    )
    group.add_argument(
        "--text_encoder_dtype",
        type=str,
        default=None,
        help="dtype that both encoders compute in; default: bfloat16 and float16, but float32 beside a "
        "float32 transformer, or for a training with --mixed_precision no",
    )
    group.add_argument(
        "--fp8_vl",
        action="store_true",
        help="keep the linear layers of Qwen2.5-VL in fp8: half the memory, slightly different states",
    )
    group.add_argument("--text_encoder_cpu", action="store_true", help="run the text encoders on the CPU")


def add_projection(group: argparse._ArgumentGroup) -> None:
    """Declare the options of `ProjectedGuidanceOptions`."""
    group.add_argument(
        "--apg_start_step_ocr",
        type=int,
        default=APG_START_OCR,
        help="last step, from 0, with plain guidance if the prompt has a text in quotation marks; later ones "
        "have adaptive projected guidance",
    )
    group.add_argument(
        "--apg_start_step_general",
        type=int,
        default=APG_START,
        help="the same for other prompts",
    )
    group.add_argument(
        "--guidance_rescale_apg",
        type=float,
        default=0.0,
        help="--guidance_rescale of the steps with adaptive projected guidance",
    )


def caching_commands(dataset_config: Path | None, options: HunyuanImageTrainingOptions) -> tuple[str, str]:
    """Return the commands that make missing caches of latents and of texts."""
    dataset = ["--dataset_config", str(dataset_config)]
    vae = ["--vae", str(options.vae.file.vae or "VAE_FILE")]
    return (
        as_typed(["python", "hunyuan_image_cache_latents.py", *dataset, *vae]),
        as_typed(
            ["python", "hunyuan_image_cache_text_encoder_outputs.py", *dataset, *_text_words(options.text)]
        ),
    )


def generation_words(options: HunyuanImageTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: what a sample was asked for, by the names of `Request`; may be empty.
    """
    files = {"--dit": options.dit or "DIT_FILE", "--vae": options.vae.file.vae or "VAE_FILE"}
    words = [word for name, path in files.items() for word in (name, str(path))]
    return ["hunyuan_image_generate_image.py", *words, *_text_words(options.text)]


def _text_words(text: HunyuanImageTextOptions) -> list[str]:
    files = {
        "--text_encoder": text.text_encoder or "QWEN_FILE",
        "--byt5": text.byt5 or "BYT5_FILE",
        "--text_encoder_tokenizer": text.text_encoder_tokenizer,
    }
    return [word for name, path in files.items() if path is not None for word in (name, str(path))]
