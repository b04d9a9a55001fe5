"""Options of the checkpoint and of how it is loaded. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least


@dataclass(frozen=True)
class ModelOptions:
    """The checkpoint, and how its networks are loaded and computed."""

    ckpt: Path  # a single file or a diffusers folder
    vae: Path | None  # None: the checkpoint's own
    tokenizer_cache_dir: Path | None
    v1: bool  # what the user says the file is; it is compared with its keys
    v2: bool
    sdxl: bool
    v_parameterization: bool
    fp16: bool  # neither: float32
    bf16: bool
    xformers: bool
    sdpa: bool
    diffusers_xformers: bool
    opt_channels_last: bool
    no_half_vae: bool  # the VAE computes in float32
    vae_slices: int | None  # bands that the VAE works in, to save memory
    vae_batch_size: float | None  # pictures that the VAE takes at once; below 1: a share of the batch

    def __post_init__(self) -> None:
        kinds = [f"--{name}" for name in ("v1", "v2", "sdxl") if getattr(self, name)]
        if len(kinds) > 1:
            raise OptionError(f"{' and '.join(kinds)}: a checkpoint is of one kind. Give one of them or none")
        if self.fp16 and self.bf16:
            raise OptionError("--fp16 and --bf16: give one of them")
        if self.sdpa and (self.xformers or self.diffusers_xformers):
            raise OptionError("--sdpa and --xformers or --diffusers_xformers: give one of them")
        check_at_least("--vae_slices", self.vae_slices, 1, "the number of bands")
        if self.vae_batch_size is not None and self.vae_batch_size <= 0:
            raise OptionError(
                f"--vae_batch_size {self.vae_batch_size}: give a number of pictures, or a share of the batch "
                "below 1, such as 0.5"
            )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ModelOptions`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt", required=True, help="checkpoint: a single file, or a folder in the layout of diffusers"
    )
    group.add_argument("--vae", help="another VAE: a single file, or a folder in the layout of diffusers")
    group.add_argument(
        "--tokenizer_cache_dir",
        help="folder with openai_clip-vit-large-patch14 and laion_CLIP-ViT-bigG-14-laion2B-39B-b160k, the "
        "files of the tokenizers",
    )
    group.add_argument(
        "--sdxl",
        action="store_true",
        help="the checkpoint is Stable Diffusion XL; read from the file if not given",
    )
    group.add_argument("--v1", action="store_true", help="it is Stable Diffusion 1.x; likewise")
    group.add_argument("--v2", action="store_true", help="it is Stable Diffusion 2.x; likewise")
    group.add_argument(
        "--v_parameterization",
        action="store_true",
        help="the model predicts velocity (v-prediction), as Stable Diffusion 2.x of 768 pixels does",
    )
    group = parser.add_argument_group("precision, speed and memory")
    group.add_argument("--fp16", action="store_true", help="compute in float16; else in float32")
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16; else in float32")
    group.add_argument("--no_half_vae", action="store_true", help="the VAE computes in float32")
    group.add_argument("--vae_slices", type=int, help="the VAE works in this many bands, to save memory")
    group.add_argument(
        "--vae_batch_size",
        type=float,
        help="pictures that the VAE takes at once; below 1: this share of --batch_size; usually all",
    )
    group.add_argument("--xformers", action="store_true", help="attention by the package xformers")
    group.add_argument("--sdpa", action="store_true", help="attention by torch itself, which is usual")
    group.add_argument(
        "--diffusers_xformers",
        action="store_true",
        help="attention by the package xformers, in the VAE too",
    )
    group.add_argument(
        "--opt_channels_last", action="store_true", help="keep channels last in memory, faster on some GPUs"
    )
