"""Wan2.1's own options for caching, training and generation."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from modules.errors import OptionError
from modules.options import FREE, HABIT, IDENTITY, NO_PIXELS, OF_DECODING, OF_REQUEST
from modules.vae_options import VaeOptions, add_vae_arguments
from wan.configs import TASKS


@dataclass(frozen=True)
class WanTextOptions:
    """Where the umT5 encoder and its tokenizer are."""

    t5: Path | None
    t5_tokenizer: Path | None
    fp8_t5: bool


@dataclass(frozen=True)
class WanLatentCachingOptions:
    """Options of wan_cache_latents.py beside the shared ones."""

    vae: VaeOptions
    vae_cache_cpu: bool
    clip: Path | None
    flf2v: bool

    def __post_init__(self) -> None:
        if self.flf2v and self.clip is None:
            raise OptionError(
                "--flf2v needs --clip: the first and the last frame are encoded by the image encoder"
            )


@dataclass(frozen=True)
class WanTextCachingOptions:
    """Options of wan_cache_text_encoder_outputs.py beside the shared ones."""

    text: WanTextOptions


@dataclass(frozen=True)
class WanTrainingOptions:
    """Options of wan_train_network.py beside the shared ones."""

    task: str = field(metadata=IDENTITY)
    dit: Path | None = field(metadata=FREE)  # resume compares its name
    vae: VaeOptions = field(metadata=FREE)
    vae_cache_cpu: bool = field(metadata=FREE)
    text: WanTextOptions = field(metadata=FREE)
    clip: Path | None = field(metadata=FREE)
    rope_func: str = field(metadata=HABIT)
    mixed_precision_transformer: bool = field(metadata=HABIT)
    text_as_image_tokens: bool = field(metadata=HABIT)

    def __post_init__(self) -> None:
        if self.rope_func not in {"default", "comfy"}:  # the known command line has no choices here
            raise OptionError(f"--rope_func {self.rope_func}: use default or comfy")


@dataclass(frozen=True)
class WanGenerationOptions:
    """Options of wan_generate_video.py beside the shared ones."""

    task: str = field(metadata=OF_REQUEST)
    dit: Path | None
    vae: VaeOptions = field(metadata=OF_DECODING)
    vae_cache_cpu: bool = field(metadata=NO_PIXELS)
    text: WanTextOptions
    clip: Path | None
    ckpt_dir: Path | None = field(metadata=OF_DECODING)
    rope_func: str
    mixed_precision_transformer: bool
    text_as_image_tokens: bool
    i2v_extra_noise: float | None


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """--vae and its switches, --clip for image-to-video caches."""
    group = parser.add_argument_group("Wan2.1")
    _add_vae(group)
    group.add_argument(
        "--clip",
        type=str,
        default=None,
        help="CLIP image encoder: also caches what image-to-video training needs",
    )
    group.add_argument(
        "--flf2v",
        action="store_true",
        help="with --clip: condition on the first and the last frame (flf2v-14B)",
    )


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """--t5 and its tokenizer."""
    group = parser.add_argument_group("Wan2.1")
    _add_text(group, required=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and what training samples need."""
    group = parser.add_argument_group("Wan2.1")
    _add_dit(group)
    _add_vae(group)
    _add_text(group, required=False)
    group.add_argument(
        "--clip", type=str, default=None, help="CLIP image encoder, for samples of image-to-video models"
    )
    group.add_argument(
        "--rope_func",
        type=str,
        default="default",
        help="default (float64) or comfy (float32) rotary embedding",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints of a generation."""
    group = parser.add_argument_group("Wan2.1")
    group.add_argument(
        "--ckpt_dir",
        type=str,
        default=None,
        help="folder of the official release: VAE, T5 and CLIP are found in it",
    )
    _add_dit(group)
    _add_vae(group)
    _add_text(group, required=False)
    group.add_argument("--clip", type=str, default=None, help="CLIP image encoder, for image-to-video")
    group.add_argument(
        "--rope_func",
        type=str,
        default="default",
        choices=["default", "comfy"],
        help="float64 or float32 rotary embedding",
    )
    group.add_argument(
        "--i2v_extra_noise", type=float, default=None, help="noise added to the image condition: more motion"
    )


def _add_dit(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--task", type=str, default="t2v-14B", choices=list(TASKS), help="kind of model; sets defaults"
    )
    group.add_argument("--dit", type=str, default=None, help="transformer checkpoint")
    group.add_argument(
        "--mixed_precision_transformer",
        action="store_true",
        help="keep every tensor of the transformer in the dtype its file has",
    )
    group.add_argument(
        "--text_as_image_tokens",
        action="store_true",
        help="Fun-Control without a start image: feed text where image features belong, as older tuners did "
        "(for LoRAs made so)",
    )


def _add_vae(group: argparse._ArgumentGroup) -> None:
    add_vae_arguments(group)
    group.add_argument(
        "--vae_cache_cpu", action="store_true", help="keep the VAE's features between frames in host memory"
    )


def _add_text(group: argparse._ArgumentGroup, required: bool) -> None:
    group.add_argument("--t5", type=str, default=None, required=required, help="umT5 text encoder checkpoint")
    group.add_argument(
        "--t5_tokenizer",
        type=str,
        default=None,
        help="its tokenizer: a folder or a file; default: beside the checkpoint, else the hub",
    )
    group.add_argument(
        "--fp8_t5",
        action="store_true",
        help="keep its linear layers in fp8: half the memory of bf16, slightly other embeddings",
    )
