"""Wan's own options for caching, training and generation."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.command import as_typed
from modules.dit_options import add_dit_dtype
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE, HABIT, IDENTITY, NO_PIXELS, OF_DECODING, OF_REQUEST
from modules.parser import add_unsupported, refuse_values
from modules.vae_options import VaeOptions, add_vae_arguments
from wan.configs import TASKS

logger = logging.getLogger(__name__)

NOT_BUILT = {
    "s2v-14B": "speech to video is not built yet; i2v-A14B starts from an image, without sound",
    "animate-14B": "a character that follows a video is not built yet; i2v-A14B-FC follows a video of poses",
}
MOST_TIMESTEP = 1000


@dataclass(frozen=True)
class WanTextOptions:
    """Paths of the umT5 encoder and its tokenizer."""

    t5: Path | None
    t5_tokenizer: Path | None
    fp8_t5: bool


@dataclass(frozen=True)
class WanExpertOptions:
    """The second transformer of a model that has one for much noise and one for little."""

    dit_high_noise: Path | None
    # 0..1 or 0..1000; None: that of the task. Resume compares where the experts begin
    timestep_boundary: float | None = field(metadata=FREE)
    force_v2_1_time_embedding: bool = field(metadata={**FREE, **NO_PIXELS})

    def __post_init__(self) -> None:
        boundary = self.timestep_boundary
        if boundary is not None and not 0 < boundary < MOST_TIMESTEP:
            raise OptionError(
                f"--timestep_boundary {boundary:g}: give a share of noise, such as 0.875, or a timestep, "
                "such as 875"
            )
        if self.force_v2_1_time_embedding:
            logger.info(
                "--force_v2_1_time_embedding is not needed: times are embedded once for each sample anyway"
            )

    @property
    def boundary(self) -> float | None:
        """Return the boundary as a timestep, 0..1000; None: that of the task."""
        boundary = self.timestep_boundary
        return boundary if boundary is None or boundary > 1 else boundary * MOST_TIMESTEP


@dataclass(frozen=True)
class WanLatentCachingOptions:
    """Options of wan_cache_latents.py besides the shared ones."""

    vae: VaeOptions
    vae_cache_cpu: bool
    clip: Path | None
    i2v: bool
    flf2v: bool

    def __post_init__(self) -> None:
        if self.flf2v and self.clip is None and not self.i2v:
            raise OptionError(
                "--flf2v needs --clip: the image encoder encodes the first and the last frame. Or give --i2v "
                "for Wan2.2, which has no image encoder"
            )


@dataclass(frozen=True)
class WanTextCachingOptions:
    """Options of wan_cache_text_encoder_outputs.py besides the shared ones."""

    text: WanTextOptions


@dataclass(frozen=True)
class WanTrainingOptions:
    """Options of wan_train_network.py besides the shared ones."""

    task: str = field(metadata=IDENTITY)
    dit: Path | None = field(metadata=FREE)  # resume compares its name
    dit_dtype: str | None = field(metadata=HABIT)
    experts: WanExpertOptions = field(metadata=FREE)
    sample_dit_other: Path | None = field(metadata=FREE)
    vae: VaeOptions = field(metadata=FREE)
    vae_cache_cpu: bool = field(metadata=FREE)
    text: WanTextOptions = field(metadata=FREE)
    clip: Path | None = field(metadata=FREE)
    rope_func: str = field(metadata=HABIT)
    mixed_precision_transformer: bool = field(metadata=HABIT)
    text_as_image_tokens: bool = field(metadata=HABIT)
    first_frame_probability: float | None = field(metadata=IDENTITY)  # None: that of the task

    def __post_init__(self) -> None:
        self._check_first_frame()
        # checked here, not with `choices`: the established command line has none for it
        if self.rope_func not in {"default", "comfy"}:
            raise OptionError(f"--rope_func {self.rope_func}: use default or comfy")
        _check_dtypes(self.dit_dtype, self.mixed_precision_transformer)
        self._check_other()

    def _check_other(self) -> None:
        other, dits = self.sample_dit_other, (self.dit, self.experts.dit_high_noise)
        if other is not None and None not in dits:
            raise OptionError(
                "--sample_dit_other: samples use both transformers, --dit and --dit_high_noise. Leave it out"
            )
        if other is not None and TASKS[self.task].boundary is None:
            raise OptionError(
                f"--sample_dit_other: --task {self.task} has one transformer. Leave the option out, or use "
                "--task t2v-A14B or i2v-A14B"
            )
        if other is not None and other in dits:
            raise OptionError(
                f"--sample_dit_other {other}: this one is trained. Give the file of the other transformer"
            )

    def _check_first_frame(self) -> None:
        probability, task = self.first_frame_probability, TASKS[self.task]
        if probability is None:
            return
        check_at_least("--first_frame_probability", probability, 0, "0 trains text to video alone")
        check_at_most("--first_frame_probability", probability, 1, "1 trains image to video alone")
        if not task.keeps_image:
            why = "trains on its image condition" if task.takes_image else "starts from no image"
            raise OptionError(
                f"--first_frame_probability {probability:g}: --task {task.name} {why}. Leave the option out, "
                "or use --task ti2v-5B"
            )


@dataclass(frozen=True)
class WanGenerationOptions:
    """Options of wan_generate_video.py besides the shared ones."""

    task: str = field(metadata=OF_REQUEST)
    dit: Path | None
    dit_dtype: str | None
    experts: WanExpertOptions
    vae: VaeOptions = field(metadata=OF_DECODING)
    vae_cache_cpu: bool = field(metadata=NO_PIXELS)
    text: WanTextOptions
    clip: Path | None
    ckpt_dir: Path | None = field(metadata=OF_DECODING)
    rope_func: str
    mixed_precision_transformer: bool
    text_as_image_tokens: bool
    lower_precision_attention: bool
    i2v_extra_noise: float | None
    riflex_index: int  # read here only to be checked early

    def __post_init__(self) -> None:
        if self.riflex_index and self.rope_func != "comfy":
            raise OptionError(
                f"--riflex_index {self.riflex_index} with --rope_func {self.rope_func}: it changes the table "
                "of --rope_func comfy. Add --rope_func comfy."
            )
        usual = "0.02 to 0.04 are usual"
        check_at_least("--i2v_extra_noise", self.i2v_extra_noise, 0, usual)
        check_at_most("--i2v_extra_noise", self.i2v_extra_noise, 10, usual)
        _check_dtypes(self.dit_dtype, self.mixed_precision_transformer)


def _check_dtypes(dit_dtype: str | None, keeps_file_dtypes: bool) -> None:
    """Raise OptionError if one option asks for one dtype and another for those of the file."""
    if dit_dtype is not None and keeps_file_dtypes:
        raise OptionError(
            f"--dit_dtype {dit_dtype} with --mixed_precision_transformer, which keeps those of the file: "
            "leave one of them out"
        )


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --vae and its switches, and --clip for image-to-video caches."""
    group = parser.add_argument_group("Wan")
    _add_vae(group)
    group.add_argument(
        "--clip",
        type=str,
        default=None,
        help="CLIP image encoder; also caches the image features that image-to-video training needs",
    )
    group.add_argument(
        "--i2v",
        action="store_true",
        help="cache the image condition without image features, for i2v-A14B; --clip caches both",
    )
    group.add_argument(
        "--flf2v",
        action="store_true",
        help="with --clip or --i2v: condition on the first and the last frame (flf2v-14B, i2v-A14B)",
    )
    _add_one_frame(group, "a dataset of images and --task t2i-14B or t2v-A14B")


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --t5 and its tokenizer."""
    group = parser.add_argument_group("Wan")
    _add_text(group, required=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoint and the encoders that training samples need."""
    group = parser.add_argument_group("Wan")
    _add_dit(group)
    group.add_argument(
        "--sample_dit_other",
        type=str,
        default=None,
        help="training one transformer of a model with two: the file of the other one, for samples only. It "
        "is not trained and gets no LoRA but those of --sample_lora; both wait in host memory",
    )
    _add_vae(group)
    _add_text(group, required=False)
    group.add_argument(
        "--clip", type=str, default=None, help="CLIP image encoder, for samples of image-to-video models"
    )
    group.add_argument(
        "--rope_func",
        type=str,
        default="default",
        help="precision of the rotary embedding: default (float64) or comfy (float32)",
    )
    _add_one_frame(group, "a dataset of images")
    group.add_argument(
        "--first_frame_probability",
        type=float,
        default=None,
        help="ti2v-5B: share of the batches of clips that are trained from image to video, with the first "
        "frame given; 0 trains text to video alone, 1 image to video alone; default: 0.5",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoints that generation needs."""
    group = parser.add_argument_group("Wan")
    group.add_argument(
        "--ckpt_dir",
        type=str,
        default=None,
        help="folder of the official release or of a pipeline of diffusers: VAE, T5, CLIP and, without "
        "--dit, the transformers are found in it",
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
        help="precision of the rotary embedding: default (float64) or comfy (float32)",
    )
    group.add_argument(
        "--lower_precision_attention",
        action="store_true",
        help="time embedding, modulation and rotary embedding in float16 instead of float32: less memory, "
        "slightly different videos",
    )
    group.add_argument(
        "--i2v_extra_noise",
        type=float,
        default=None,
        help="noise added to the image condition, for more motion",
    )
    reason = (
        "Wan has no one-frame mode with control images; fpack_generate_video.py has. Use --video_length 1"
    )
    for name, words in (
        ("--one_frame_inference", {"type": str, "default": None}),
        ("--control_image_path", {"type": str, "nargs": "*", "default": None}),
        ("--control_image_mask_path", {"type": str, "nargs": "*", "default": None}),
    ):
        add_unsupported(group, name, reason=reason, help="one-frame mode", **words)


def _add_one_frame(group: argparse._ArgumentGroup, instead: str) -> None:
    reason = f"Wan has no one-frame mode; the scripts of FramePack have. Use {instead}"
    add_unsupported(
        group, "--one_frame", action="store_true", default=False, reason=reason, help="one-frame mode"
    )


def _add_dit(group: argparse._ArgumentGroup) -> None:
    task = group.add_argument(
        "--task", type=str, default="t2v-14B", choices=list(TASKS), help="kind of model; sets defaults"
    )
    refuse_values(task, NOT_BUILT)
    group.add_argument(
        "--dit",
        type=str,
        default=None,
        help="transformer checkpoint; of a model with two experts the one for low noise",
    )
    group.add_argument(
        "--dit_high_noise", type=str, default=None, help="transformer for high noise (t2v-A14B, i2v-A14B)"
    )
    add_dit_dtype(group)
    group.add_argument(
        "--timestep_boundary",
        type=float,
        default=None,
        help="from which noise level on --dit_high_noise is used, 0 to 1 or 0 to 1000; default: the task's",
    )
    group.add_argument(
        "--force_v2_1_time_embedding",
        action="store_true",
        help="not needed: this program embeds each time once, whatever the model's version",
    )
    group.add_argument(
        "--mixed_precision_transformer",
        action="store_true",
        help="keep every tensor of the transformer in the dtype its file has",
    )
    group.add_argument(
        "--text_as_image_tokens",
        action="store_true",
        help="Fun-Control without a start image: use text tokens in place of image features, as older tuners "
        "did; for LoRAs trained that way",
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
        help="folder or file of the tokenizer; default: beside the checkpoint, else from the hub",
    )
    group.add_argument(
        "--fp8_t5",
        action="store_true",
        help="keep T5's linear layers in fp8: half the memory of bf16, slightly different embeddings",
    )


def caching_commands(dataset_config: Path | None, options: WanTrainingOptions) -> tuple[str, str]:
    """Return the commands that make missing caches, of latents and of texts."""
    dataset = ["--dataset_config", str(dataset_config)]
    task = TASKS[options.task]
    vae = options.vae.vae or f"WAN_{'2.2' if task.kind == 'ti2v' else '2.1'}_VAE_FILE"
    latents = ["python", "wan_cache_latents.py", *dataset, "--vae", str(vae)]
    if task.has_features:
        latents += ["--clip", str(options.clip or "CLIP_FILE")]
    elif task.takes_image:
        latents.append("--i2v")
    if options.task.startswith("flf2v"):
        latents.append("--flf2v")
    text = [
        "python",
        "wan_cache_text_encoder_outputs.py",
        *dataset,
        "--t5",
        str(options.text.t5 or "T5_FILE"),
    ]
    return as_typed(latents), as_typed(text)


def generation_words(options: WanTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: what a sample was asked for, by the names of `Request`; may be empty.
    """
    task, other = TASKS[options.task], options.sample_dit_other
    low, high = options.dit, options.experts.dit_high_noise
    low, high = (low or other, high) if high is not None else (low, other)
    files = {"--dit": low} | ({} if high is None else {"--dit_high_noise": high})
    files |= {"--vae": options.vae.vae, "--t5": options.text.t5}
    words = ["wan_generate_video.py", "--task", options.task]
    if high is not None and options.experts.timestep_boundary is not None:
        words += ["--timestep_boundary", f"{options.experts.timestep_boundary:g}"]
    words += [
        word for name, path in files.items() for word in (name, str(path or f"{name[2:].upper()}_FILE"))
    ]
    media = ["image_path", "end_image_path", "control_path"]
    if task.has_features:
        words += ["--clip", str(options.clip or "CLIP_FILE")]
    if task.takes_image:
        words += [] if sample.get("image_path") else ["--image_path", "IMAGE_FILE"]
    if task.has_control and not sample.get("control_path"):
        words += ["--control_path", "CONTROL_FILE"]
    words += ["--t5_tokenizer", str(options.text.t5_tokenizer)] if options.text.t5_tokenizer else []
    words += ["--dit_dtype", options.dit_dtype] if options.dit_dtype else []
    words += [word for name in media if sample.get(name) for word in (f"--{name}", str(sample[name]))]
    return words + (["--video_length", str(sample["frames"])] if sample.get("frames") else [])
