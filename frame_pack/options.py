"""FramePack's own options for caching, training and generation."""

import argparse
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frame_pack.section_syntax import parse_entries
from hunyuan_model.options import (
    HunyuanTextOptions,
    HunyuanVaeOptions,
    TextReadingOptions,
    add_reproduce,
    add_text,
    add_text_reading,
    add_vae,
    model_words,
)
from modules.command import as_typed
from modules.errors import OptionError
from modules.option_values import check_at_least
from modules.options import FREE, HABIT, OF_DECODING, OF_REQUEST

logger = logging.getLogger(__name__)

# options of each video, which a prompt line may give too -> their names in Request.extra
REQUEST_OPTIONS = {
    "image_path": "image_path",
    "video_seconds": "video_seconds",
    "video_sections": "video_sections",
    "one_frame_inference": "one_frame",
    "control_image_path": "control_image_path",
    "control_image_mask_path": "control_image_mask_path",
}
FRAMES_PER_SECOND = 30  # as in training; --fps only sets the rate in the file
WINDOW = 9  # latent frames of a section, as the model was trained
LARGEST_WINDOW = 1000  # over two minutes in one section: more is a slip of the finger
ROPE_FACTOR = 0.5  # of --rope_scaling_factor, where nothing is said


@dataclass(frozen=True)
class FramePackLatentCachingOptions:
    """Options of fpack_cache_latents.py besides the shared ones."""

    vae: HunyuanVaeOptions
    image_encoder: Path | None
    f1: bool
    one_frame: bool
    one_frame_no_2x: bool
    one_frame_no_4x: bool

    def __post_init__(self) -> None:
        _warn_of_both(self.f1, self.one_frame)
        for coarse in ("2x", "4x"):
            if getattr(self, f"one_frame_no_{coarse}") and not self.one_frame:
                logger.warning("--one_frame_no_%s is ignored because --one_frame is not given", coarse)


@dataclass(frozen=True)
class FramePackTextCachingOptions:
    """Options of fpack_cache_text_encoder_outputs.py besides the shared ones."""

    text: HunyuanTextOptions


@dataclass(frozen=True)
class FramePackTrainingOptions:
    """Options of fpack_train_network.py besides the shared ones."""

    dit: Path | None = field(metadata=FREE)  # resume compares its name
    vae: HunyuanVaeOptions = field(metadata=FREE)
    text: HunyuanTextOptions = field(metadata=FREE)
    image_encoder: Path | None = field(metadata=FREE)
    latent_window_size: int = field(metadata=FREE)  # of samples: the caches say what is trained
    bulk_decode: bool = field(metadata=FREE)
    f1: bool = field(metadata=HABIT)  # these two: of samples, and of what files say they were trained for
    one_frame: bool = field(metadata=HABIT)
    embedded_guidance: float = field(metadata={"option": "guidance_scale", **HABIT})

    def __post_init__(self) -> None:
        _check_window(self.latent_window_size)
        _warn_of_both(self.f1, self.one_frame)


@dataclass(frozen=True)
class FramePackGenerationOptions:
    """Options of fpack_generate_video.py besides the shared ones, the same for all videos of a run."""

    dit: Path | None
    vae: HunyuanVaeOptions
    text: HunyuanTextOptions
    image_encoder: Path | None
    latent_window_size: int = field(metadata=OF_REQUEST)
    bulk_decode: bool = field(metadata=OF_DECODING)
    f1: bool = field(metadata=OF_REQUEST)
    latent_paddings: str | None
    reading: TextReadingOptions
    rope_scaling_factor: float
    rope_scaling_timestep_threshold: int | None
    reproduce: bool
    # of the command line: read here only to be checked early
    image_path: str | None = field(metadata=OF_REQUEST)
    one_frame_inference: str | None = field(metadata=OF_REQUEST)  # likewise
    one_frame_auto_resize: bool = field(metadata=OF_REQUEST)

    def __post_init__(self) -> None:
        _check_window(self.latent_window_size)
        parse_entries(self.image_path or "", "--image_path")
        if self.one_frame_inference is not None and not self.one_frame_inference.strip():
            raise OptionError(
                "--one_frame_inference is empty: give default for an image, or leave the option out for a "
                "video."
            )
        threshold = self.rope_scaling_timestep_threshold
        if threshold is not None and not 0 <= threshold <= 1000:
            raise OptionError(
                f"--rope_scaling_timestep_threshold {threshold}: give a timestep from 0 to 1000, such as 800"
            )
        if not (math.isfinite(self.rope_scaling_factor) and self.rope_scaling_factor > 0):
            raise OptionError(
                f"--rope_scaling_factor {self.rope_scaling_factor}: give a number above 0, such as 0.5"
            )
        if self.rope_scaling_factor != ROPE_FACTOR and self.rope_scaling_timestep_threshold is None:
            factor = self.rope_scaling_factor
            logger.warning(
                "--rope_scaling_factor %g is ignored because --rope_scaling_timestep_threshold is not given",
                factor,
            )


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the VAE, the image encoder, and the kind of caches."""
    group = parser.add_argument_group("FramePack")
    add_vae(group)
    _add_image_encoder(group)
    group.add_argument(
        "--f1",
        action="store_true",
        help="make caches for FramePack-F1, which generates sections in playing order",
    )
    group.add_argument(
        "--one_frame", action="store_true", help="make caches for single images generated from control images"
    )
    for coarse in ("2x", "4x"):
        group.add_argument(
            f"--one_frame_no_{coarse}",
            action="store_true",
            help=f"with --one_frame: leave out the black frames at {coarse}",
        )


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two text encoders and their tokenizers."""
    group = parser.add_argument_group("FramePack")
    add_text(group, required=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoint and the options that training samples need."""
    group = parser.add_argument_group("FramePack")
    group.add_argument("--dit", type=str, default=None, help="transformer checkpoint")
    _add_encoders(group)
    _add_sections(group, "generate samples")
    group.add_argument(
        "--one_frame",
        action="store_true",
        help="generate single images as samples (--of and --ci in a prompt line)",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoints that generation needs, and how sections are generated."""
    group = parser.add_argument_group("FramePack")
    group.add_argument("--dit", type=str, default=None, help="transformer checkpoint")
    _add_encoders(group)
    _add_sections(group, "generate the video")
    _add_video_arguments(parser)
    group.add_argument(
        "--one_frame_auto_resize",
        action="store_true",
        help="with --one_frame_inference: as many pixels as --video_size says, in the shape of the first "
        "control image, or of the start image if there is none",
    )
    group.add_argument(
        "--latent_paddings",
        type=str,
        default=None,
        help="distance of each section to the start image, last section first: 3,2,1,0",
    )
    add_text_reading(group)
    group.add_argument(
        "--rope_scaling_factor",
        type=float,
        default=ROPE_FACTOR,
        help="factor for the positions within a frame at the noisy steps; 0.7 for 1.5 times the trained size",
    )
    group.add_argument(
        "--rope_scaling_timestep_threshold",
        type=int,
        default=None,
        help="apply --rope_scaling_factor at this timestep and above (0 to 1000)",
    )
    add_reproduce(group)


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that REQUEST_OPTIONS lists."""
    group = parser.add_argument_group("length and images of a video")
    group.add_argument(
        "--image_path",
        type=str,
        default=None,
        help="start image, or one for each section, as with --prompt: "
        "'0:first.png;;;1-2:then.png;;;-1:last.png'",
    )
    group.add_argument(
        "--video_seconds",
        type=float,
        default=5.0,
        help="length of the video, rounded to whole sections; default 5",
    )
    group.add_argument(
        "--video_sections", type=int, default=None, help="number of sections, in place of --video_seconds"
    )
    group.add_argument(
        "--one_frame_inference",
        type=str,
        default=None,
        help="generate an image, not a video: default, or with commas no_2x, no_4x, no_post, target_index=N, "
        "control_index=N;N",
    )
    group.add_argument(
        "--control_image_path",
        type=str,
        nargs="*",
        default=None,
        help="images that a single image is generated from",
    )
    group.add_argument(
        "--control_image_mask_path",
        type=str,
        nargs="*",
        default=None,
        help="a mask for each control image: white parts are used; default: its alpha channel",
    )


def caching_commands(
    dataset_config: Path | None, options: FramePackTrainingOptions, switches: Iterable[str] = ()
) -> tuple[str, str]:
    """Return the commands that make missing caches of latents and of texts.

    switches: options of fpack_cache_latents.py.
    """
    dataset = ["--dataset_config", str(dataset_config)]
    files = {"--vae": options.vae.file.vae, "--image_encoder": options.image_encoder}
    encoders = {"--text_encoder1": options.text.text_encoder1, "--text_encoder2": options.text.text_encoder2}
    latents = [word for option, path in files.items() for word in (option, str(path or option[2:].upper()))]
    texts = [word for option, path in encoders.items() for word in (option, str(path or option[2:].upper()))]
    return (
        as_typed(["python", "fpack_cache_latents.py", *dataset, *latents, *switches]),
        as_typed(["python", "fpack_cache_text_encoder_outputs.py", *dataset, *texts]),
    )


def generation_words(options: FramePackTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: what a sample was asked for, by the names of `Request`; may be empty.
    """
    words = ["fpack_generate_video.py", *model_words(options.dit, options.vae, options.text)]
    words += ["--image_encoder", str(options.image_encoder or "IMAGE_ENCODER")]
    words += ["--image_path", str(sample.get("image_path") or "IMAGE_FILE")]
    extra, frames, guidance = (sample.get(name) for name in ("extra", "frames", "embedded_guidance"))
    words += [] if guidance is None else ["--embedded_cfg_scale", f"{guidance:g}"]
    words += (
        []
        if options.latent_window_size == WINDOW
        else ["--latent_window_size", str(options.latent_window_size)]
    )
    if options.one_frame:
        named = extra or {}
        words += ["--one_frame_inference", named.get("one_frame", "default")]
        controls = named.get("control_image_path", "").split("\n")
        return words + (["--control_image_path", *controls] if any(controls) else [])
    words += ["--f1"] if options.f1 else []
    return words + ([] if not frames else ["--video_seconds", f"{frames / FRAMES_PER_SECOND:.4g}"])


def _add_encoders(group: argparse._ArgumentGroup) -> None:
    add_vae(group, always_tiled=True)
    add_text(group, required=False)
    _add_image_encoder(group)


def _add_image_encoder(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image_encoder", type=str, default=None, help="SigLIP image encoder: folder or file")


def _add_sections(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--latent_window_size", type=int, default=WINDOW, help=f"latent frames of a section; default {WINDOW}"
    )
    group.add_argument(
        "--bulk_decode", action="store_true", help="decode all sections at once: no seams, more memory"
    )
    group.add_argument("--f1", action="store_true", help=f"{what} as FramePack-F1 does, in playing order")


def _warn_of_both(f1: bool, one_frame: bool) -> None:
    if f1 and one_frame:
        logger.warning(
            "--f1 is ignored because --one_frame is given: FramePack makes single images, F1 does not"
        )


def _check_window(window: int) -> None:
    check_at_least(
        "--latent_window_size", window, 1, f"latent frames of a section; the model was trained with {WINDOW}"
    )
    if window > LARGEST_WINDOW:
        raise OptionError(
            f"--latent_window_size {window}: give at most {LARGEST_WINDOW}; the model was trained with "
            f"{WINDOW}"
        )
