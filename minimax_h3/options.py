"""MiniMax-H3's own options for caching, training and generation. Standard library only."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from minimax_h3.reference_options import (
    BY_KIND,
    CONDITION_IMAGES,
    IMAGE_EDGE,
    INDEX,
    JSONL,
    KEYFRAMES,
    MAX_EDGE,
    ONE_FRAME,
    REF,
    TASK,
    TOKEN,
    VIDEO_EDGE,
    H3MediaOptions,
    warn_about_unused_edges,
)
from minimax_h3.training_options import (
    CONDITION_SET_BY_TASK,
    CONDITION_SETS,
    H3LossOptions,
    H3RejectedOptions,
    H3TargetOptions,
    granularity_option,
    name_teacher_conditions,
)
from modules.errors import OptionError
from modules.option_values import Placeholder, Repeated
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    IDENTITY,
    REQUEST_SETTING,
    SAMPLES_ONLY,
    Options,
    make_request_facts,
    not_needed,
    option,
    override_options,
    unsupported,
)
from modules.speed_options import (
    TextEncoderOptions,
    VaeOptions,
    dit_dtype_option,
    fp8_text_option,
    text_form,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

NAME = "MiniMax-H3"
FPS = 24.0  # frame rate of all clips
SIZE = (1344, 768)  # default height and width, as in musubi-tuner
FRAMES, MIN_FRAMES, MAX_FRAMES = 124, 124, 345  # 5 to 15 seconds
TASK_NAMES = ("t2va", "fl2va", "ref2va")
STEPS = 30

# number of frames that are encoded together, and number of frames after the last such group
CLIP, LAST_FRAMES = 17, 5
MAX_RATIO = 4  # maximum ratio of the sides of keyframes and references, in either direction
ADAPTIVE = "adaptive"  # a value of --ratio
MAX_SHIFT = 1000.0
_ATTENTION = "the text encoder computes attention with PyTorch's own kernels"
_FP4 = "weights in nvfp4 are read, and multiplied in 16 bits. Omit it"
_FP4_FORM = "nvfp4 is a form of files, which are read without an option. Omit it, and pass such a file"
_FIRST_ALONE = "clips are trained with both frames, or with none. Use --task fl2va"
_OMNI = "items have references, or none: cache those with --task ref2va, and the others with --task t2va"
_TEXTS = "prompts are encoded each time. Pass the text encoder to --text_encoder"
_BANDS = "frames are written as they are decoded. Omit it"
_TRAJECTORY = "latents of single steps are not written. Pass --preview_latent_every to see them"
_COMPILING = "blocks are compiled by --compile and its own options. Pass --compile, or omit it"
_WAITING = "layers of the text encoder that do not fit on the device stay in host memory automatically."
LAYOUT_KEY = "ss_h3_qkv_layout"  # in the metadata of a trained transformer
FREQUENCIES_KEY = "ss_h3_rope_freq_dim"  # also in its metadata, because tensors do not show it
_LAYOUT = (
    "order of the rows of fused queries, keys and values in --dit. Shards of the release have them "
    "interleaved by head, single files stacked; default: by the file's name. Files that "
    "minimax_h3_train.py wrote say it themselves"
)


class H3TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (32B) text encoder: file, first shard or folder", often=True)
    text_encoder_tokenizer: Path | None = option(
        "its tokenizer, MiniMax-H3's own: folder or file; default: in or next to the encoder's folder, else "
        "from the hub",
        flags=("--tokenizer",),
        often=True,
    )
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )
    text_encoder_quantization: str = option(
        "another spelling of --text_encoder_form; none: as the file has them",
        default="none",
        choices=("none", "int8", "nf4"),
        refused={"nvfp4_awq": _FP4_FORM},
        excludes=("text_encoder_form", "fp8_vl"),
    )
    text_encoder_attn_mode: str | None = option(
        "kernels of the text encoder's attention; default: sdpa, PyTorch's own",
        choices=("sdpa",),
        refused=dict.fromkeys(("flash_attention_2", "eager"), _ATTENTION),
    )
    text_encoder_blocks_to_swap = not_needed(_WAITING, type=int, default=0)
    nvfp4_scaled_mm = unsupported(_FP4)

    @property
    def form(self) -> str | None:
        """Return the storage format of linear layers; None for the file's own format."""
        quantization = self.text_encoder_quantization
        return text_form(self) if quantization == "none" else quantization


class H3VaeOptions(Options):
    """Paths of the image VAE and the audio VAE."""

    file: VaeOptions = option(
        facts=DECODING_SETTING,
        settings={"vae": {"help": "video VAE: file or folder", "flags": ("--video_vae",)}},
    )
    audio_vae: Path | None = option("audio VAE: file or folder", facts=DECODING_SETTING, often=True)


class H3TextCachingOptions(Options, title=NAME):
    """Options of minimax_h3_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: H3TextOptions = option(settings={"text_encoder": {"required": True}})
    task: str | None = option(
        "what a clip is made from: t2va, a text; fl2va: also its first and last frame; ref2va: references of "
        "its row in a list. Default: t2va",
        choices=("t2va", "fl2va", "ref2va"),
        refused={"i2va": _FIRST_ALONE, "ref2va_omni": _OMNI},
        often=True,
    )
    teacher_conditions: str | None = option(
        "also cache the teacher's input, for --h3_teacher_matching: first,last, with the first and the "
        "last frame; ref, with the clip and its audio; subject_ref, with images of its subject",
        choices=tuple(CONDITION_SETS),
        often=True,
        known_as=("h3_teacher_conditions",),
    )
    text_cache_dtype: str | None = option(
        "dtype of cached states: bf16, half the size, or float32; default: that of --text_encoder_dtype",
        choices=("bf16", "float32"),
    )
    reference_image_short_edge: int = option(
        "short side of reference images in pixels, as their latents are cached",
        default=IMAGE_EDGE,
        minimum=TOKEN,
        maximum=MAX_EDGE,
    )
    reference_video_short_edge: int = option(
        "short side of reference clips in pixels, as their latents are cached",
        default=VIDEO_EDGE,
        minimum=TOKEN,
        maximum=MAX_EDGE,
    )
    uncond_output: Path | None = option(
        "also write the states of --uncond_text to this file, for --h3_guidance_loss_uncond_cache; implies "
        "--empty_prompt",
        place="safetensors",
        often=True,
    )
    uncond_text: str = option("text of the empty prompt; default: a space", default=" ")
    cache_guidance_empty: bool = option("another spelling of --empty_prompt")

    def __post_init__(self) -> None:
        if self.teacher_conditions is not None and self.task not in (None, "t2va"):
            raise OptionError(
                f"--teacher_conditions {self.teacher_conditions} and --task {self.task}: what learns from a "
                "teacher reads the caption alone. Pass --task t2va, or omit the teacher"
            )
        if self.task != "ref2va" and self.teacher_conditions != "subject_ref":
            edges = self.reference_image_short_edge, self.reference_video_short_edge
            warn_about_unused_edges(*edges, "it is for the references of --task ref2va")
        if not self.uncond_text:
            raise OptionError("--uncond_text: an empty text has no states. Use at least a space")

    @property
    def caches_empty_prompt(self) -> bool:
        """Return whether the empty prompt is cached too."""
        return self.cache_guidance_empty or self.uncond_output is not None


class H3ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option(  # resume compares its name
        "transformer: file, first shard or folder", flags=("--model",), facts=FREE, often=True
    )
    dit_dtype: str | None = dit_dtype_option()
    h3_qkv_layout: str | None = option(_LAYOUT, choices=("stacked", "interleaved"), facts=HABIT)
    vae: H3VaeOptions = option(facts=FREE)
    text: H3TextOptions = option(facts=FREE)


class H3LatentCachingOptions(Options, title=NAME):
    """Options of minimax_h3_cache_latents.py in addition to the shared ones."""

    task: str | None = option(
        "what a clip is made from: t2va, a text; fl2va: also its first and last frame; ref2va: references of "
        "its row in a list. Default: t2va",
        choices=TASK_NAMES,
        often=True,
    )
    vae: H3VaeOptions
    cache_seed: int | None = option("seed of the samples of posteriors; default: 42", often=True)
    allow_experimental_duration: bool = option(
        f"also cache clips of less than {MIN_FRAMES} or more than {MAX_FRAMES} frames, for which the "
        "model was not trained"
    )
    one_frame: bool = option(
        "images have a position in time (fp_1f_target_index); with --task fl2va their control images do too "
        "(fp_1f_clean_indices)"
    )

    reference_image_short_edge: int = option(
        "short side of reference images in pixels", default=IMAGE_EDGE, minimum=TOKEN, maximum=MAX_EDGE
    )
    reference_video_short_edge: int = option(
        "short side of reference clips in pixels", default=VIDEO_EDGE, minimum=TOKEN, maximum=MAX_EDGE
    )

    def __post_init__(self) -> None:
        if self.task != "ref2va":
            edges = self.reference_image_short_edge, self.reference_video_short_edge
            warn_about_unused_edges(*edges, "it is for the references of --task ref2va")
        if self.vae.file.vae_dtype not in (None, "float32", "fp32"):
            logger.warning(
                "--vae_dtype %s: ignored, because the VAE of %s encodes in float32 alone",
                self.vae.file.vae_dtype,
                NAME,
            )


class H3TrainingOptions(H3ModelOptions, title=NAME):
    """Options of minimax_h3_train_network.py in addition to the shared ones."""

    task: str | None = option(
        "what a clip is made from; t2va: a text, fl2va: also its first and last frame, ref2va: references. "
        "Default: t2va",
        choices=("t2va", "fl2va", "ref2va"),
        often=True,
        facts=IDENTITY,
    )
    h3_training_mode: str = option(
        "the transformer to train, of fl2va (--task t2va and fl2va) or ref2va (the same as --task ref2va)",
        default="fl2va",
        choices=("fl2va", "ref2va"),
        refused={"ref2va_omni": "a run has one task. Train references and other clips one after the other"},
        facts=IDENTITY,
    )
    one_frame: bool = option("all tables contain images, each of which is one frame", facts=HABIT)
    loss: H3LossOptions = option(facts=HABIT)
    targets: H3TargetOptions = option(facts=HABIT)
    refused: H3RejectedOptions = option(facts=FREE)
    h3_allow_experimental_sample_duration: bool = option(
        f"also generate samples of less than {MIN_FRAMES} or more than {MAX_FRAMES} frames, for which the "
        "model was not trained",
        facts={**FREE, **SAMPLES_ONLY},
    )

    def __post_init__(self) -> None:
        if self.h3_training_mode == "ref2va" and self.task not in (None, "ref2va"):
            raise OptionError(f"--h3_training_mode ref2va and --task {self.task} differ: pass --task alone")

    @property
    def chosen_task(self) -> str:
        """Task of the training run, from --task or else from --h3_training_mode."""
        return self.task or ("ref2va" if self.h3_training_mode == "ref2va" else "t2va")


class H3FullTrainingOptions(H3TrainingOptions, title=NAME):
    """Options of minimax_h3_train.py in addition to the shared ones. Its files state the order of rows."""


class H3GenerationOptions(H3ModelOptions, title=NAME):
    """Options of minimax_h3_generate_video.py in addition to the shared ones."""

    task: str | None = option(
        "what a clip is made from: t2va, a text; fl2va, first or last frame too; ref2va, references too. "
        "Default: by what is given",
        choices=("t2va", "fl2va", "ref2va"),
        facts=make_request_facts(TASK),
        often=True,
    )
    height: int | None = option("with --width: the same as --video_size", minimum=1, facts=REQUEST_SETTING)
    width: int | None = option("with --height: the same as --video_size", minimum=1, facts=REQUEST_SETTING)
    duration: float | None = option(
        "seconds, in place of --video_length: the next length that the model makes",
        above=0,
        facts=REQUEST_SETTING,
    )
    ratio: str | None = option(
        "aspect ratio as width:height, instead of --video_size: gives the size that the model was trained "
        "with; adaptive: that of the first keyframe",
        choices=(ADAPTIVE, "21:9", "16:9", "4:3", "1:1", "3:4", "9:16"),
        excludes=("height", "width"),
        facts=REQUEST_SETTING,
    )
    dtype: str | None = option(
        "the same as --dit_dtype", choices=("bfloat16", "float16", "float32"), facts=REQUEST_SETTING
    )
    block_swap_granularity: str | None = granularity_option(None)
    h3_shift_audio: float | None = option(
        "time shift of the audio's schedule (--fsa in a prompt line); 3 for LoRAs of four steps",
        default=3.0,
        above=0,
        maximum=MAX_SHIFT,
        facts=make_request_facts("h3_shift_audio"),
    )
    media: H3MediaOptions
    allow_experimental_duration: bool = option(
        f"also generate clips of less than {MIN_FRAMES} or more than {MAX_FRAMES} frames, for which the "
        "model was not trained",
        facts=REQUEST_SETTING,
    )
    prune_adaln = unsupported(
        "a file is read as it is, whole or pruned. Pass minimax_h3_*_pruned_*.safetensors"
    )
    text_cache = unsupported(_TEXTS, type=str)
    stretch_keep_bands = unsupported(_BANDS, type=int, default=0)
    trajectory_dir = unsupported(_TRAJECTORY, type=str)
    trajectory_stride = unsupported(_TRAJECTORY, type=int, default=1)
    compile_auto_cache_size_limit = unsupported(_COMPILING)
    compile_fallback_to_eager = unsupported(_COMPILING)
    inductor_config = unsupported(_COMPILING, type=str, nargs="*")
    h3_fused_qk_norm_rope = unsupported("--compile fuses norms and positions. Use it")
    inspect = unsupported("files are checked before any of them is loaded. Omit it")
    lora_runtime_attach = not_needed(
        "merging keeps small LoRAs: --lora_rounding rounds 16-bit weights at random where the nearest would "
        "lose them."
    )

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise OptionError("--height and --width: pass both")


def caching_options(options: H3TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    # --h3_training_mode ref2va alone selects a task too; otherwise, the scripts have the same default
    task = {"--task": options.chosen_task if options.h3_training_mode == "ref2va" else options.task}
    latents = {
        "--video_vae": options.vae.file.vae or Placeholder("VIDEO_VAE_FILE"),
        "--audio_vae": options.vae.audio_vae or Placeholder("AUDIO_VAE_FILE"),
    }
    return {**latents, **task}, {**_text_encoder_options(options), **task}


def teacher_caching_options(condition_set: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that a teacher's conditions need in latent caching and in text caching, by name."""
    tasks = {conditions: task for task, conditions in CONDITION_SET_BY_TASK.items()}
    latents = {"--task": tasks[condition_set]} if condition_set in tasks else {}
    return latents, {"--teacher_conditions": name_teacher_conditions(condition_set)}


def _text_encoder_options(options: H3ModelOptions) -> dict[str, Any]:
    return {
        "--text_encoder": options.text.text_encoder or Placeholder("QWEN3_VL_FILE"),
        "--tokenizer": options.text.text_encoder_tokenizer,
    }


def generation_options(options: H3TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    latents, _ = caching_options(options)
    extra = sample.get("extra") or {}
    shifts = {f"--{name}": extra[name] for name in ("h3_shift_audio",) if name in extra}
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        "--dit_dtype": options.dit_dtype,
        **latents,
        **_text_encoder_options(options),
        **_media_options(options.chosen_task, sample),
        "--video_length": sample.get("frames"),
        "--allow_experimental_duration": options.h3_allow_experimental_sample_duration,
        **shifts,  # without one, the training's own is repeated
    }


def _media_options(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation options for a sample's media; without any, placeholders for those of the task."""
    # An option whose value is None is left out.
    extra = sample.get("extra") or {}
    one_frame = {"--one_frame_inference": extra.get(ONE_FRAME)}
    names = (KEYFRAMES, CONDITION_IMAGES, REF, *BY_KIND.values())
    media: dict[str, Any] = {
        f"--{name}": Repeated(extra[name].split("\n")) for name in names if extra.get(name)
    }
    frames = {"--first_frame": sample.get("image_path"), "--last_frame": sample.get("end_image_path")}
    media |= {flag: path for flag, path in frames.items() if path}
    if extra.get(JSONL):
        media |= {f"--{JSONL}": extra[JSONL], f"--{INDEX}": extra.get(INDEX)}
    if media:  # they decide the task, which need not be that of the training
        return {f"--{TASK}": extra.get(TASK), **media, **one_frame}
    if task == "fl2va":
        return {"--first_frame": Placeholder("IMAGE_FILE"), **one_frame}
    return {f"--{JSONL}": Placeholder("REFERENCES_JSONL")} if task == "ref2va" else one_frame


def check_guidance(scale: float | None, flag: str) -> None:
    """Raise OptionError for any guidance scale but 1, because the model has no pass to guide against."""
    if scale not in (None, 1):
        raise OptionError(
            f"{flag} {scale:g}: the guidance of {NAME} is built in, so no pass omits the prompt. Omit it"
        )


def resolve_generation(shared: T, own_options: H3GenerationOptions) -> tuple[T, H3GenerationOptions]:
    """Set the shared options for size, length and dtype from --width, --height, --ratio, --duration, --dtype.

    Raises OptionError if another option contradicts them, or for guidance, which is built into the model.
    """
    options: Any = shared  # the generation scripts' shared options
    request = options.request
    check_guidance(request.guidance_scale, "--guidance_scale")
    option = options.speed.modes.divides_passes
    if option:
        raise OptionError(
            f"{option} distributes the passes with and without the prompt over processes, but "
            f"{NAME} has one pass for each step. Use --context_parallel, which distributes the tokens"
        )
    if options.guidance.nag.is_on:
        raise OptionError(
            f"--nag_scale {options.guidance.nag.nag_scale:g}: {NAME} has one attention for text, audio and "
            "images together, and none for the text alone. Omit it"
        )
    request = replace(
        request,
        video_size=_resolve_size(request.video_size, own_options),
        video_length=_resolve_frames(request.video_length, own_options),
    )
    dtype = own_options.dtype
    if dtype is not None:
        if own_options.dit_dtype not in (None, dtype):
            raise OptionError(
                f"--dtype {dtype} and --dit_dtype {own_options.dit_dtype} mean the same: pass one of them"
            )
        own_options = override_options(own_options, {"dit_dtype": dtype})
    return replace(options, request=request), own_options


def _resolve_size(size: Sequence[int] | None, own_options: H3GenerationOptions) -> tuple[int, int] | None:
    """Return height and width from the options; None if each prompt line's first keyframe sets the size."""
    ratio = own_options.ratio
    if ratio == ADAPTIVE:
        if size is not None:
            raise OptionError(f"--ratio {ratio} and --video_size: pass one of them")
        return None
    if ratio is not None:
        width, height = map(int, ratio.split(":"))
        return _match_video_size(size, canvas(width / height), f"--ratio {ratio}")
    if own_options.height is not None and own_options.width is not None:
        typed = f"--height {own_options.height} --width {own_options.width}"
        return _match_video_size(size, (own_options.height, own_options.width), typed)
    return SIZE if size is None else (size[0], size[1])


def _match_video_size(
    video_size: Sequence[int] | None, own_size: tuple[int, int], typed: str
) -> tuple[int, int]:
    """Return the size that `typed` options set; raise OptionError if --video_size sets another one."""
    if video_size is not None and tuple(video_size) != own_size:
        raise OptionError(
            f"{typed} and --video_size {' '.join(map(str, video_size))} differ: pass one of them"
        )
    return own_size


def _resolve_frames(frames: int | None, own_options: H3GenerationOptions) -> int:
    """Return the number of frames; raise OptionError if two options conflict."""
    if own_options.media.one_frame_inference is None:
        return resolve_length(frames, own_options.duration)
    if own_options.duration is not None or frames not in (None, 1):
        raise OptionError(
            "--one_frame_inference generates a single image: pass --video_length 1, or no length"
        )
    return 1


def resolve_length(frames: int | None, seconds: float | None) -> int:
    """Return the number of frames. Raises OptionError if both options are set."""
    if seconds is None:
        return FRAMES if frames is None else frames
    if frames is not None:
        raise OptionError(f"--duration {seconds:g} and --video_length {frames}: pass one of them")
    clips = math.ceil(max(round(seconds * FPS) - LAST_FRAMES, 0) / CLIP)
    return clips * CLIP + LAST_FRAMES


def check_ratio(what: str, width: int, height: int) -> None:
    """Raise OptionError for an aspect ratio that the model was not trained with; `what` names the file."""
    if max(width, height) > MAX_RATIO * min(width, height):
        raise OptionError(
            f"{what} has {width}x{height} pixels: the model takes shapes of 1:{MAX_RATIO} to "
            f"{MAX_RATIO}:1. Pass a cropped one"
        )


def canvas(ratio: float, short_edge: int = SIZE[1], step: int = TOKEN) -> tuple[int, int]:
    """Return the trained height and width for an aspect `ratio`, width by height.

    The short side is `short_edge`, the area at most 768 x 1344; then both are rounded to multiples of `step`.
    Source: the released code, as in diffusers.
    """
    short = float(short_edge)
    width, height = (short * ratio, short) if ratio >= 1 else (short, short / ratio)
    scale = min(1.0, math.sqrt(SIZE[0] * SIZE[1] / (width * height)))
    sides = [max(step, round(side * scale / step) * step) for side in (height, width)]
    return sides[0], sides[1]
