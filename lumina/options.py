"""Lumina-Image-2.0's own options for caching, training and generation. Standard library only."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.command import as_typed
from modules.dit_options import add_dit_dtype
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE, HABIT, OF_DECODING, OF_REQUEST
from modules.parser import add_unneeded
from modules.vae_options import VaeOptions, add_ae_argument, add_vae_arguments, take_ae

MAX_TOKENS = 256  # of a caption, with the system prompt, where nothing is said
MOST_TOKENS = 8192  # that Gemma 2 was trained with
CFG_TRUNC_RATIO = 0.25  # where nothing is said
RENORM_CFG = 1.0  # likewise
# options of a generation -> their names in Request.extra, which training samples use too
EXTRAS = {"cfg_trunc_ratio": "cfg_trunc_ratio", "renorm_cfg": "renorm_cfg"}


@dataclass(frozen=True)
class LuminaTextOptions:
    """Path of the text encoder, and how it reads prompts."""

    gemma2: Path | None
    gemma2_tokenizer: Path | None
    gemma2_max_token_length: int | None
    text_encoder_dtype: str | None
    system_prompt: str

    def __post_init__(self) -> None:
        meaning = f"tokens of a prompt, with those of --system_prompt; {MAX_TOKENS} is usual"
        check_at_least("--gemma2_max_token_length", self.gemma2_max_token_length, 1, meaning)
        check_at_most("--gemma2_max_token_length", self.gemma2_max_token_length, MOST_TOKENS, meaning)


@dataclass(frozen=True)
class LuminaLatentCachingOptions:
    """Options of lumina_cache_latents.py besides the shared ones."""

    vae: VaeOptions


@dataclass(frozen=True)
class LuminaTextCachingOptions:
    """Options of lumina_cache_text_encoder_outputs.py besides the shared ones."""

    text: LuminaTextOptions


@dataclass(frozen=True)
class LuminaTrainingOptions:
    """Options of lumina_train_network.py besides those of all image trainers."""

    dit: Path | None = field(metadata={"option": "pretrained_model_name_or_path", **FREE})
    dit_dtype: str | None = field(metadata=HABIT)
    vae: VaeOptions = field(metadata=FREE)
    text: LuminaTextOptions = field(metadata=FREE)


@dataclass(frozen=True)
class LuminaGenerationOptions:
    """Options of lumina_generate_image.py besides the shared ones."""

    dit: Path | None
    dit_dtype: str | None
    vae: VaeOptions = field(metadata=OF_DECODING)
    text: LuminaTextOptions
    add_system_prompt_to_negative_prompt: bool
    cfg_trunc_ratio: float = field(metadata=OF_REQUEST)
    renorm_cfg: float = field(metadata=OF_REQUEST)

    def __post_init__(self) -> None:
        check_trunc_ratio(self.cfg_trunc_ratio, "--cfg_trunc_ratio")
        check_renorm(self.renorm_cfg, "--renorm_cfg")


def check_trunc_ratio(ratio: float, option: str) -> None:
    """Raise OptionError for a share of data that is none."""
    if not 0 <= ratio <= 1:
        raise OptionError(
            f"{option} {ratio:g}: give a share from 0 to 1; guidance ends when the picture holds so much. "
            "0.25 is usual, 1 keeps guidance to the end"
        )


def check_renorm(limit: float, option: str) -> None:
    """Raise OptionError for a limit of a norm that is none."""
    if not 0 <= limit <= 1000:
        raise OptionError(f"{option} {limit:g}: give a number from 0 (no limit) to 1000; 1 is usual")


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the autoencoder and its switches."""
    add_vae_arguments(parser.add_argument_group("Lumina-Image-2.0"), flags=("--ae", "--vae"))


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the text encoder and how it reads captions."""
    _add_text(parser.add_argument_group("Lumina-Image-2.0"), required=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what image trainers do not share: encoders, the system prompt, attention by other names."""
    group = parser.add_argument_group("Lumina-Image-2.0")
    add_dit_dtype(group)
    add_ae_argument(group)
    add_vae_arguments(group, flags=())
    _add_text(group, required=False)
    group.add_argument("--use_flash_attn", action="store_true", help="--flash_attn")
    group.add_argument(
        "--use_sage_attn", action="store_true", help="SageAttention: for generation only, refused here"
    )
    add_unneeded(
        group,
        "--sample_batch_size",
        instead="samples are made one after the other, so that none depends on another.",
        type=int,
        default=None,
        help="sample prompts at once",
    )


def translate_training(args: argparse.Namespace) -> None:
    """Put Lumina's own names of shared options into the shared ones. Raises OptionError for SageAttention."""
    if args.use_sage_attn:
        raise OptionError(
            "--use_sage_attn: SageAttention has no backward pass, so nothing would be learned: it is for "
            "generation only. Use --use_flash_attn, or leave it out"
        )
    args.flash_attn = args.flash_attn or args.use_flash_attn
    take_ae(args)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoints that generation needs, and what Lumina's guidance and text encoder do."""
    group = parser.add_argument_group("Lumina-Image-2.0")
    group.add_argument(
        "--dit",
        "--pretrained_model_name_or_path",
        dest="dit",
        type=str,
        default=None,
        help="transformer checkpoint; an all-in-one file too",
    )
    add_dit_dtype(group)
    add_vae_arguments(group, flags=("--ae", "--vae"))
    _add_text(group, required=False)
    group.add_argument(
        "--add_system_prompt_to_negative_prompt",
        action="store_true",
        help="put the system prompt before negative prompts too",
    )
    group.add_argument(
        "--cfg_trunc_ratio",
        type=float,
        default=CFG_TRUNC_RATIO,
        help="share of data in the noisy picture, 0 to 1, from which on guidance is left out; 1 keeps it to "
        "the end (--ctr in a prompt line)",
    )
    group.add_argument(
        "--renorm_cfg",
        type=float,
        default=RENORM_CFG,
        help="largest norm of a guided prediction, in norms of the one without guidance; 0: no limit (--rcfg "
        "in a prompt line)",
    )


def _add_text(group: argparse._ArgumentGroup, required: bool) -> None:
    """Declare the options of `LuminaTextOptions`."""
    group.add_argument(
        "--gemma2",
        type=str,
        default=None,
        required=required,
        help="Gemma 2 (2B) text encoder: file or folder",
    )
    group.add_argument(
        "--gemma2_tokenizer",
        type=str,
        default=None,
        help="tokenizer: folder or file; default: beside or inside the encoder's file, else from the hub",
    )
    group.add_argument(
        "--gemma2_max_token_length",
        type=int,
        default=None,
        help=f"tokens of a prompt that are read, with those of the system prompt; default {MAX_TOKENS}",
    )
    group.add_argument(
        "--text_encoder_dtype",
        type=str,
        default=None,
        help="dtype that the text encoder computes in; default: bfloat16, but float32 beside a float32 "
        "model, or for a training with --mixed_precision no",
    )
    group.add_argument(
        "--system_prompt",
        type=str,
        default="",
        help="instruction that stands before every prompt, as in the model's training, such as 'You are an "
        "assistant designed to generate high-quality images based on user prompts.'; default: none",
    )


def caching_commands(dataset_config: Path | None, options: LuminaTrainingOptions) -> tuple[str, str]:
    """Return the commands that make missing caches of latents and of texts."""
    dataset = ["--dataset_config", str(dataset_config)]
    vae = ["--ae", str(options.vae.vae or "AE_FILE")]
    texts = ["--gemma2", str(options.text.gemma2 or "GEMMA2_FILE"), *_reading_words(options.text)]
    return (
        as_typed(["python", "lumina_cache_latents.py", *dataset, *vae]),
        as_typed(["python", "lumina_cache_text_encoder_outputs.py", *dataset, *texts]),
    )


def generation_words(options: LuminaTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: what a sample was asked for, by the names of `Request`; may be empty.
    """
    files = {
        "--dit": options.dit or "DIT_FILE",
        "--gemma2": options.text.gemma2 or "GEMMA2_FILE",
        "--ae": options.vae.vae or "AE_FILE",
    }
    dtypes = {"--vae_dtype": options.vae.vae_dtype, "--text_encoder_dtype": options.text.text_encoder_dtype}
    given = {**files, **{name: dtype for name, dtype in dtypes.items() if dtype is not None}}
    words = [word for name, value in given.items() for word in (name, str(value))]
    return ["lumina_generate_image.py", *words, *_reading_words(options.text)]


def _reading_words(text: LuminaTextOptions) -> list[str]:
    values = {
        "--gemma2_tokenizer": text.gemma2_tokenizer,
        "--gemma2_max_token_length": text.gemma2_max_token_length,
        "--system_prompt": text.system_prompt or None,
    }
    return [word for name, value in values.items() if value is not None for word in (name, str(value))]
