"""FLUX.1's and Chroma's own options for caching, training and generation."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.attention.options import add_split_argument
from modules.command import as_typed
from modules.dit_options import add_dit_dtype
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE, HABIT, NO_PIXELS, OF_DECODING
from modules.parser import add_unsupported
from modules.vae_options import VaeOptions, add_ae_argument, add_vae_arguments

FLUX, CHROMA = "flux", "chroma"  # values of --model_type
USUAL_GUIDANCE = 3.5  # default of the embedded guidance, in training and in generation
MOST_TOKENS = 512  # that T5 was trained to read


@dataclass(frozen=True)
class FluxTextOptions:
    """Paths of the two text encoders and their tokenizers, and how they read."""

    clip_l: Path | None
    t5xxl: Path | None
    clip_l_tokenizer: Path | None
    t5xxl_tokenizer: Path | None
    text_encoder_dtype: str | None
    fp8_t5: bool
    t5xxl_max_token_length: int | None  # None: as the transformer was trained
    apply_t5_attn_mask: bool

    def __post_init__(self) -> None:
        what = "tokens of T5 with the end token; 512 for dev and Chroma, 256 for schnell"
        check_at_least("--t5xxl_max_token_length", self.t5xxl_max_token_length, 2, what)
        check_at_most("--t5xxl_max_token_length", self.t5xxl_max_token_length, MOST_TOKENS, what)


@dataclass(frozen=True)
class FluxLatentCachingOptions:
    """Options of flux_cache_latents.py besides the shared ones."""

    vae: VaeOptions


@dataclass(frozen=True)
class FluxTextCachingOptions:
    """Options of flux_cache_text_encoder_outputs.py besides the shared ones."""

    text: FluxTextOptions
    model_type: str

    def __post_init__(self) -> None:
        if self.text.t5xxl is None:
            raise OptionError("--t5xxl is needed: T5 encodes the captions")
        if self.model_type == FLUX and self.text.clip_l is None:
            raise OptionError(
                "--clip_l is needed: CLIP-L encodes the captions too. Captions for Chroma, which has none, "
                "are encoded with --model_type chroma"
            )


@dataclass(frozen=True)
class FluxTrainingOptions:
    """Options of flux_train_network.py besides the shared ones."""

    # resume compares its name
    dit: Path | None = field(metadata={"option": "pretrained_model_name_or_path", **FREE})
    dit_dtype: str | None = field(metadata=HABIT)
    model_type: str = field(metadata=FREE)  # the file says it too
    vae: VaeOptions = field(metadata=FREE)
    text: FluxTextOptions = field(metadata=HABIT)
    embedded_guidance: float = field(metadata={"option": "guidance_scale", **HABIT})


@dataclass(frozen=True)
class FluxGenerationOptions:
    """Options of flux_generate_image.py besides the shared ones."""

    dit: Path | None
    dit_dtype: str | None
    model_type: str = field(metadata=NO_PIXELS)  # the file says it too
    vae: VaeOptions = field(metadata=OF_DECODING)
    text: FluxTextOptions


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --ae and its switches."""
    add_vae_arguments(parser.add_argument_group("FLUX.1 and Chroma"), flags=("--ae", "--vae"))


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the text encoders, and for which model they encode."""
    group = parser.add_argument_group("FLUX.1 and Chroma")
    _add_model_type(group)
    _add_text(group)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the image trainers' own options do not have."""
    group = parser.add_argument_group("FLUX.1 and Chroma")
    add_dit_dtype(group)
    _add_model_type(group)
    add_ae_argument(group)
    add_vae_arguments(group, flags=())
    _add_text(group)
    add_unsupported(
        group,
        "--controlnet_model_name_or_path",
        type=str,
        default=None,
        reason="a LoRA is trained without ControlNet",
        help="ControlNet beside the transformer",
    )
    add_unsupported(
        group,
        "--split_mode",
        action="store_true",
        reason="training both at once with --blocks_to_swap takes as little memory",
        help="train double and single blocks apart",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoints that generation needs, and the options of the text encoders."""
    group = parser.add_argument_group("FLUX.1 and Chroma")
    group.add_argument(
        "--dit",
        "--pretrained_model_name_or_path",
        "--ckpt_path",
        type=str,
        default=None,
        help="transformer checkpoint",
    )
    add_dit_dtype(group)
    _add_model_type(group)
    add_vae_arguments(group, flags=("--ae", "--vae"))
    _add_text(group)
    add_split_argument(group)


def _add_model_type(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model_type",
        type=str,
        default=FLUX,
        choices=[FLUX, CHROMA],
        help="kind of model; not needed where the transformer's file says it",
    )


def _add_text(group: argparse._ArgumentGroup) -> None:
    what = {
        "clip_l": "CLIP-L text encoder: file or folder; Chroma has none",
        "t5xxl": "T5-XXL text encoder: file or folder",
    }
    for name, text in what.items():
        group.add_argument(f"--{name}", type=str, default=None, help=text)
        group.add_argument(
            f"--{name}_tokenizer",
            type=str,
            default=None,
            help="tokenizer: folder or file; default: in or beside the encoder's folder, else from the hub",
        )
    group.add_argument(
        "--text_encoder_dtype",
        type=str,
        default=None,
        help="dtype of both encoders; default: bfloat16, but float32 if the transformer is float32, or for a "
        "training with --mixed_precision no",
    )
    group.add_argument(
        "--fp8_t5",
        action="store_true",
        help="keep T5's linear layers in fp8: half the memory of bf16, slightly different states",
    )
    group.add_argument(
        "--t5xxl_max_token_length",
        type=int,
        default=None,
        help="tokens that T5 reads; default: 512, for schnell 256",
    )
    group.add_argument(
        "--apply_t5_attn_mask",
        action="store_true",
        help="leave the padding behind a text out of T5's and of the transformer's attention; always so for "
        "Chroma",
    )


def caching_commands(dataset_config: Path | None, options: FluxTrainingOptions) -> tuple[str, str]:
    """Return the commands that make missing caches of latents and of texts."""
    dataset = ["--dataset_config", str(dataset_config)]
    vae = str(options.vae.vae or "AE_FILE")
    latents = ["python", "flux_cache_latents.py", *dataset, "--ae", vae]
    texts = ["python", "flux_cache_text_encoder_outputs.py", *dataset, *_text_words(options)]
    return as_typed(latents), as_typed(texts)


def generation_words(options: FluxTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: what a sample was asked for, by the names of `Request`; may be empty.
    """
    words = ["flux_generate_image.py", "--dit", str(options.dit or "DIT_FILE")]
    words += ["--ae", str(options.vae.vae or "AE_FILE"), *_text_words(options)]
    words += ["--dit_dtype", options.dit_dtype] if options.dit_dtype else []
    guidance = sample.get("embedded_guidance")
    return words + (["--embedded_cfg_scale", str(guidance)] if guidance else [])


def _text_words(options: FluxTrainingOptions) -> list[str]:
    text = options.text
    files = {"--t5xxl": text.t5xxl or "T5_FILE", "--t5xxl_tokenizer": text.t5xxl_tokenizer}
    if options.model_type != CHROMA:
        files |= {"--clip_l": text.clip_l or "CLIP_FILE", "--clip_l_tokenizer": text.clip_l_tokenizer}
    words = [word for name, path in files.items() if path is not None for word in (name, str(path))]
    words += ["--model_type", CHROMA] if options.model_type == CHROMA else []
    if text.t5xxl_max_token_length is not None:
        words += ["--t5xxl_max_token_length", str(text.t5xxl_max_token_length)]
    return words + (["--apply_t5_attn_mask"] if text.apply_t5_attn_mask else [])
