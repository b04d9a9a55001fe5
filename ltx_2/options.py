"""LTX-2's own options for caching, training and generation. Standard library only."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import fields
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

from ltx_2.audio_reference_options import (
    AUTO,
    IDENTITY_SCALE,
    OLDER,
    STRATEGIES,
    Ltx2AudioReferences,
    Ltx2GivenAudioReference,
    ReferenceStrategy,
    find_strategy,
)
from ltx_2.given_media_options import Ltx2GivenMedia, read_request_values
from ltx_2.given_options import Ltx2GivenParts, check_value, read_conditioning_config
from ltx_2.learned_media import list_learned_media
from ltx_2.model_options import (
    AUDIO,
    VIDEO,
    Ltx2GuidanceOptions,
    Ltx2ModelOptions,
    Ltx2TextOptions,
    Ltx2VaeOptions,
    is_version_2_5,
)
from ltx_2.reference_options import Ltx2GivenReferences, Ltx2ReferenceOptions
from ltx_2.refused_options import ALWAYS_GIVEN, GENERATION, LATENTS, TEXTS, TRAINING, declare_all
from ltx_2.stage_options import Ltx2OfficialStages, Ltx2StageOptions
from modules.errors import OptionError
from modules.option_values import Placeholder, Repeated
from modules.options import (
    FREE,
    HABIT,
    IDENTITY,
    NO_PIXELS,
    SAMPLES_ONLY,
    Options,
    is_set,
    not_needed,
    option,
    option_name,
    option_values,
    override_options,
    unsupported,
)
from modules.output_files import check_output_name
from modules.speed_options import GENERATION_VALUES, dit_dtype_option

T = TypeVar("T")
R = TypeVar("R", bound="Ltx2TrainingOptions")
logger = getLogger(__name__)

NAME = "LTX-2"
VERSIONS = ("2.0", "2.3", "2.5")
# values of --lora_target_preset: the modules of a block that get a LoRA
PRESETS = (
    *("t2v", "video_sa", "video_sa_ff", "video_sa_ca_ff", "audio", "audio_v2a", "v2v", "full"),
    *("audio_ref_ic", "av_ic", "video_ref_only_av"),
)
_TIMES = "--show_timesteps draws the distribution of timesteps."
_ONE_FILE = "one LoRA file is saved, with the names of --lora_format; convert_lora.py makes others of it."
FPS = 24.0  # frame rate of the release
# options for video, or for the attention between both streams
_VIDEO_OPTIONS = {
    "video_loss_weight",
    "independent_audio_timestep",
    "first_frame_probability",
    "reference_downscale",
    "reference_temporal_scale",
    "reference_frames",
    "is_hidden_from_video",
    "video_cfg_scale",
    "video_modality_scale",
    "audio_modality_scale",
    "video_rescale_scale",
    "image_crf",
}
# options for audio, or for the attention between both streams
_AUDIO_OPTIONS = {
    "video_loss_weight",  # weight of the only loss
    "audio_vae",
    "ltx2_audio_source",
    "ltx2_audio_dir",
    "audio_loss_weight",
    "independent_audio_timestep",
    "audio_cfg_scale",
    "video_modality_scale",
    "audio_modality_scale",
    "audio_rescale_scale",
    "ends_before_audio",
    "is_hidden_from_video",
    "is_without_text",
    "identity_scale",
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # values of --mixed_precision


def _silent(facts: Mapping[str, Any] | None = None) -> Any:
    return option("generate no audio, even with --ltx2_mode av", name="sample_disable_audio", facts=facts)


def _given_first() -> Any:
    return unsupported(ALWAYS_GIVEN, action=argparse.BooleanOptionalAction, default=True)


def _strategy(text: str, facts: Any) -> Any:
    return option(text, default=AUTO, choices=tuple(STRATEGIES), facts={**facts, "same_as": OLDER})


def _precision(dtype: str, **facts: Any) -> Any:
    text = f"bf16, fp16: the same as {dtype} bfloat16, float16; no: {dtype} says it"
    return option(text, choices=("no", "fp16", "bf16"), **facts)


def _version() -> Any:
    return not_needed("the file says which release it is.", type=str, default="2.3", metavar="VALUE")


def log_ignored(streams: Collection[str], *records: Options) -> None:
    """Warn about set options that have no effect because audio or video is missing."""
    if VIDEO not in streams:
        lacking, reason = _VIDEO_OPTIONS, "audio alone has no images"
    elif AUDIO not in streams:
        lacking, reason = _AUDIO_OPTIONS, "images alone have no audio"
    else:
        return
    given = [field for record in records for field in fields(record) if is_set(record, field)]
    ignored = [f"--{option_name(field)}" for field in given if field.name in lacking]
    if ignored:
        logger.warning("%s: ignored, because %s", ", ".join(ignored), reason)


class Ltx2LatentCachingOptions(Options, title=NAME):
    """Options of ltx2_cache_latents.py in addition to the shared ones."""

    model: Ltx2ModelOptions
    vae: Ltx2VaeOptions
    ltx2_audio_source: str = option(
        "where audio is: in the clips, or in separate files of the same names; a table's audio_directory "
        "takes precedence",
        default="video",
        choices=("video", "audio_files"),
    )
    ltx2_audio_dir: Path | None = option(
        "folder of the files of --ltx2_audio_source audio_files; default: next to the clips",
        place="there",
        ignored_without="ltx2_audio_source",
    )
    references: Ltx2ReferenceOptions
    ltx_version = _version()

    @property
    def audio_files(self) -> tuple[str, Path | None] | None:
        """Return the option for separate audio files and their folder; None if audio is in the clips."""
        if self.ltx2_audio_source == "video":
            return None
        return "--ltx2_audio_source audio_files", self.ltx2_audio_dir


class Ltx2TextCachingOptions(Options, title=NAME):
    """Options of ltx2_cache_text_encoder_outputs.py in addition to the shared ones."""

    model: Ltx2ModelOptions
    text: Ltx2TextOptions
    ltx_version = _version()
    mixed_precision: str = _precision("--text_encoder_dtype", default="no")

    @property
    def text_dtype(self) -> str | None:
        """Return the text encoder's dtype by name; raise OptionError if two are given."""
        mixed = DTYPES.get(self.mixed_precision)
        return _select_value("text_encoder_dtype", self.text.text_encoder_dtype, mixed)

    def __post_init__(self) -> None:
        _ = self.text_dtype


class Ltx2TransformerOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    model: Ltx2ModelOptions
    dit: Path | None = option(  # resume compares its name
        "transformer alone, such as an fp8 file; default: that in --ltx2_checkpoint", facts=FREE, often=True
    )
    dit_dtype: str | None = dit_dtype_option()
    vae: Ltx2VaeOptions = option(facts=FREE)
    text: Ltx2TextOptions = option(facts=FREE)

    @property
    def dit_file(self) -> Path:
        """Return the transformer's file: --dit, else the released file."""
        return self.dit or self.model.ltx2_checkpoint


class Ltx2SigmaOptions(Options):
    """Options of shifted_logit_normal, which draws levels from a normal distribution shifted by length."""

    shifted_logit_mode: str | None = option(
        "legacy: as LTX-2 2.0 was trained; stretched: as 2.3, from 0 to 1, with a fraction of uniform "
        "draws; default: that of the file's release",
        choices=("legacy", "stretched"),
    )
    shifted_logit_eps: float = option(
        "stretched: lower draws are mirrored at this value", default=1e-3, minimum=0, below=1
    )
    shifted_logit_uniform_prob: float = option(
        "stretched: fraction of uniform draws", default=0.1, minimum=0, maximum=1
    )
    shifted_logit_shift: float | None = option("shift of all clips; default: follows the number of tokens")
    shifted_logit_clamp_auto_shift: bool = option(
        "limit a shift that follows the tokens to the range of the next two; default: beyond 4096 tokens "
        "it keeps growing"
    )
    shifted_logit_min_shift: float = option("shift at 1024 tokens", default=0.95)
    shifted_logit_max_shift: float = option("shift at 4096 tokens", default=2.05)


def warn_about_unused_sigmas(args: argparse.Namespace, sampler: str) -> None:
    """Warn about options in `Ltx2SigmaOptions` that have no effect with another timestep sampler."""
    if args.timestep_sampling == sampler:
        return
    default = option_values(Ltx2SigmaOptions.from_defaults())
    for name, value in default.items():
        if getattr(args, name) != value or name in args.typed_options:
            logger.warning("--%s is ignored because --timestep_sampling is not %s", name, sampler)


class Ltx2TrainingOptions(Ltx2TransformerOptions, title=NAME):
    """Options of ltx2_train_network.py in addition to the shared ones."""

    ltx_version: str | None = option(
        "release of the file; only compared with the one that the file records",
        choices=VERSIONS,
        facts=FREE,
    )
    ltx_version_check_mode: str = option(
        "if the file is a different release than --ltx_version: off, warn or error",
        default="warn",
        choices=("off", "warn", "error"),
        ignored_without="ltx_version",
        facts=FREE,
    )
    lora_target_preset: str = option(
        "modules that get a LoRA. t2v: all attention of the trained streams, and between them; full: "
        "feed-forward too; video_sa, video_sa_ff, video_sa_ca_ff: self-attention (feed-forward, "
        "attention to texts) of images; v2v: all of images, for references; audio: all of audio; "
        "audio_v2a: and its attention to images; audio_ref_ic: all of audio, and attention between the "
        "streams; av_ic, video_ref_only_av: all attention and feed-forward. Names of --ic_lora_strategy "
        "imply it",
        default="t2v",
        choices=PRESETS,
        refused={"lycoris": "--network_module chooses LoHa, LoKr or LyCORIS, and this option their modules"},
        facts=IDENTITY,
        often=True,
    )
    video_loss_weight: float = option("weight of the video loss", default=1.0, minimum=0, facts=HABIT)
    audio_loss_weight: float = option("weight of the audio loss", default=1.0, minimum=0, facts=HABIT)
    ltx2_train_direction: str = option(
        "what is learned from clips with audio. joint: both; a2v: images for given audio; v2a: audio for "
        "given images",
        default="joint",
        choices=("joint", "a2v", "v2a"),
        facts=HABIT,
    )
    independent_audio_timestep: bool = option(
        "draw a separate noise level for the audio; default: that of the video", facts=HABIT
    )
    sigmas: Ltx2SigmaOptions = option(facts=HABIT)
    first_frame_probability: float = option(
        "fraction of clips whose first frame is given, without noise and out of the loss",
        name="ltx2_first_frame_conditioning_p",
        default=0.1,
        minimum=0,
        maximum=1,
        facts=HABIT,
    )
    height: int = option(
        "height of samples, if their line gives none", default=512, minimum=1, facts={**FREE, **SAMPLES_ONLY}
    )
    width: int = option(
        "width of samples, if their line gives none", default=768, minimum=1, facts={**FREE, **SAMPLES_ONLY}
    )
    sample_num_frames: int = option(
        "frames of samples, if their line gives none: 8n + 1",
        default=41,
        minimum=1,
        facts={**FREE, **SAMPLES_ONLY},
    )
    given: Ltx2GivenParts = option(facts=HABIT)
    references: Ltx2ReferenceOptions = option(facts=HABIT)
    ic_lora_strategy: str = _strategy(
        "what clips are generated from. auto: what their tables have; none: reject tables with "
        "references; v2v, video_ref_only_av: clips and images of reference_directory, the latter with "
        "audio of their own; audio_ref_ic: audio of reference_audio_directory; av_ic: both, in each batch",
        HABIT,
    )
    audio_references: Ltx2AudioReferences = option(facts=HABIT)
    ic_lora_ref_probability: float = option(
        "fraction of batches that use their references", default=1.0, minimum=0, maximum=1, facts=HABIT
    )
    guidance: Ltx2GuidanceOptions = option(facts={**FREE, **SAMPLES_ONLY})
    stages: Ltx2StageOptions = option(facts={**FREE, **SAMPLES_ONLY})
    silent: bool = _silent(SAMPLES_ONLY)
    sample_i2v_token_timestep_mask = _given_first()
    log_timestep_distribution_tensorboard = not_needed(_TIMES, action="store_true", default=True)
    disable_timestep_distribution_tensorboard = not_needed(
        _TIMES, action="store_false", dest="log_timestep_distribution_tensorboard"
    )
    save_original_lora = not_needed(_ONE_FILE, action="store_true", default=True)
    no_save_original_lora = not_needed(_ONE_FILE, action="store_false", dest="save_original_lora")
    no_convert_to_comfy = not_needed(_ONE_FILE, action="store_false", dest="convert_to_comfy")

    def __post_init__(self) -> None:
        """Raise OptionError for conflicting options, or options that leave nothing to train."""
        if not self.video_loss_weight + self.audio_loss_weight:
            raise OptionError("--video_loss_weight 0 with --audio_loss_weight 0: nothing would be learned")
        if self.ic_lora_strategy == "none" and self.ic_lora_ref_probability < 1:
            raise OptionError("--ic_lora_strategy none and --ic_lora_ref_probability: pass one of them")
        self._check_streams()
        # Raise OptionError if --ltx2_train_direction keeps a stream clean that other options change
        direction = self.ltx2_train_direction
        # v2a trains audio from clean images, a2v images from clean audio
        clean_title = None
        if direction == "v2a" and self.given.gives_images:
            clean_title = "the images are"
        elif direction == "a2v" and self.given.gives_audio:
            clean_title = "the audio is"
        if clean_title is not None:
            raise OptionError(
                f"--ltx2_train_direction {direction}: {clean_title} always clean. Omit the options "
                "for parts of them"
            )
        if AUDIO in self.strategy.needs and direction == "a2v":
            raise OptionError(
                f"{self.strategy_option} and --ltx2_train_direction a2v: the audio is always clean, so none "
                "is generated from a reference. Omit one of them"
            )
        if self.given.ltx2_conditioning_config is not None:
            apply_conditioning_config(self)

    def _check_streams(self) -> None:
        """Raise OptionError if options need a stream, video or audio, that --ltx2_mode leaves out."""
        preset, direction = self.lora_target_preset, self.ltx2_train_direction
        is_one_way = direction != "joint"
        # (option, stream that it needs, whether it is given), in the order in which they are reported
        needs = [
            (f"--lora_target_preset {preset}", AUDIO, preset.startswith("a")),
            (f"--lora_target_preset {preset}", VIDEO, preset.startswith("v")),
            (self.strategy_option, AUDIO, AUDIO in self.strategy.streams),
            (self.strategy_option, VIDEO, VIDEO in self.strategy.streams),
            (f"--ltx2_train_direction {direction}", AUDIO, is_one_way),
            (f"--ltx2_train_direction {direction}", VIDEO, is_one_way),
            # a loss weight of 0 trains the other stream only
            ("--video_loss_weight 0", AUDIO, not self.video_loss_weight),
            ("--audio_loss_weight 0", VIDEO, not self.audio_loss_weight),
            ("--sample_disable_audio", VIDEO, self.silent),
            ("given parts of images", VIDEO, self.given.gives_images),
            ("given parts of the audio", AUDIO, self.given.gives_audio),
        ]
        for option_text, stream, is_given in needs:
            if is_given and stream not in self.model.streams:
                title = "audio" if stream == AUDIO else "images"
                raise OptionError(
                    f"{option_text}: without {title} nothing would be learned or heard. Pass --ltx2_mode av"
                )

    @property
    def strategy(self) -> ReferenceStrategy:
        """Return which references are used, from --ic_lora_strategy or else the preset of that name."""
        return find_strategy(self.ic_lora_strategy, self.lora_target_preset)[1]

    @property
    def strategy_option(self) -> str:
        """Return the option that sets the strategy, with its value, for messages."""
        return find_strategy(self.ic_lora_strategy, self.lora_target_preset)[0]


def apply_conditioning_config(options: R) -> R:
    """Return the options with the settings of --ltx2_conditioning_config applied and that option cleared.

    Raises:
        OptionError: If the file is not valid, or contradicts an option that was typed.
    """
    path = options.given.ltx2_conditioning_config
    if path is None:
        return options
    source = f"--ltx2_conditioning_config {path}"
    values = read_conditioning_config(path, options.model.streams)
    # options of both records can be set by the file
    for record in (options, options.given):
        for field in fields(record):
            name = option_name(field)
            if name in values:
                values[name] = check_value(name, values[name], source)
                typed = getattr(record, field.name)
                if is_set(record, field) and typed != values[name]:
                    raise OptionError(
                        f"--{name} {typed} and {source}, which sets {values[name]}: pass one of them"
                    )
    return override_options(options, {**values, "ltx2_conditioning_config": None})


class Ltx2FullTrainingOptions(Ltx2TrainingOptions, title=NAME, must_give=True):
    """Options of ltx2_train.py in addition to the shared ones, which have the dtypes of weights."""

    full_fp16 = None
    full_bf16 = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.model.streams) == 1:
            raise OptionError(
                f"--ltx2_mode {self.model.ltx_mode} with a whole transformer: weights of the other stream "
                "would be missing in the file, which nothing could load. Pass --ltx2_mode av, or train a LoRA"
            )


class Ltx2GenerationOptions(Ltx2TransformerOptions, title=NAME):
    """Options of ltx2_generate_video.py in addition to the shared ones."""

    model: Ltx2ModelOptions = option(defaults={"ltx_mode": "video"})
    guidance: Ltx2GuidanceOptions
    stages: Ltx2OfficialStages
    references: Ltx2GivenReferences
    audio_references: Ltx2GivenAudioReference
    given: Ltx2GivenMedia
    silent: bool = _silent()
    sample_audio_only: bool = option("generate audio alone: the same as --ltx2_mode audio")
    ltx_version = _version()
    height: int | None = option("with --width: the same as --video_size", minimum=1, facts=NO_PIXELS)
    width: int | None = option("with --height: the same as --video_size", minimum=1, facts=NO_PIXELS)
    frame_count: int | None = option("as --video_length", flags=("--sample_num_frames",), facts=NO_PIXELS)
    frame_rate: float | None = option("the same as --fps", facts=NO_PIXELS)
    sample_steps: int | None = option("the same as --infer_steps", facts=NO_PIXELS)
    cfg_scale: float | None = option("the same as --guidance_scale", facts=NO_PIXELS)
    reference_image: Path | None = option("the same as --image_path", facts=NO_PIXELS)
    discrete_flow_shift: float | None = option("the same as --flow_shift", facts=NO_PIXELS)
    mixed_precision: str | None = _precision("--dit_dtype", facts=NO_PIXELS)
    flash_attn: bool = option("the same as --attn_mode flash", facts=NO_PIXELS)
    flash3: bool = option("the same as --attn_mode flash3", facts=NO_PIXELS)
    sage_attn: bool = option("the same as --attn_mode sageattn", facts=NO_PIXELS)
    xformers: bool = option("the same as --attn_mode xformers", facts=NO_PIXELS)
    ic_lora_strategy: str = _strategy("none: reject references; otherwise they are used as given", NO_PIXELS)
    output_name: str | None = option("start of file names, before time and seed", facts=NO_PIXELS)
    image_crf: int | None = option(
        "compress the first image like a frame of a video of this H.264 quality, because the model "
        "learned from such frames; 0: do not compress; default: 33, for LTX-2.5 18",
        minimum=0,
        maximum=51,
    )
    drive_video: Path | None = option(
        "generate audio for this video or folder of images, which does not change; with --ltx2_mode av",
        place="there",
    )
    sample_prompts = unsupported("--from_file reads prompts with their options", type=str)
    sample_i2v_token_timestep_mask = _given_first()

    def __post_init__(self) -> None:
        if self.output_name is not None:
            check_output_name("--output_name", self.output_name)
        if (self.height is None) != (self.width is None):
            raise OptionError("--height and --width: pass both")
        if self.drive_video is not None and (self.silent or AUDIO not in self.model.streams):
            raise OptionError(f"--drive_video {self.drive_video}: no audio is generated. Pass --ltx2_mode av")
        if self.given.audio_files and (self.silent or AUDIO not in self.streams):
            name, path = next(iter(self.given.audio_files.items()))
            raise OptionError(f"--{name} {path}: no audio is generated. Pass --ltx2_mode av")
        if self.silent and VIDEO not in self.streams:
            raise OptionError("--sample_disable_audio: nothing would be generated. Pass --ltx2_mode av or v")

    @property
    def streams(self) -> tuple[str, ...]:
        """Return the streams to generate."""
        return (AUDIO,) if self.sample_audio_only else self.model.streams


# options of LTX-2's official script -> ours
_OFFICIAL_NAMES = {
    "frame_count": "video_length",
    "sample_steps": "infer_steps",
    "cfg_scale": "guidance_scale",
    "reference_image": "image_path",
    "frame_rate": "fps",
    "discrete_flow_shift": "flow_shift",
}

_KERNELS = {"flash_attn": "flash", "flash3": "flash3", "sage_attn": "sageattn", "xformers": "xformers"}


def resolve_generation(shared: T, own_options: Ltx2GenerationOptions) -> tuple[T, Ltx2GenerationOptions]:
    """Copy options under the official script's names into the shared options; return shared and own options.

    Raises OptionError if an option is given under both names, with two values.
    """
    values = option_values(shared)
    # Values of shared options that also have an official name, by shared name
    copied = {}
    for official_name, name in _OFFICIAL_NAMES.items():
        # the frame rate always has a value: the default counts as not given
        is_default = name == "fps" and values[name] == FPS
        shared_value = None if is_default else values[name]
        value = _select_value(name, shared_value, getattr(own_options, official_name), official_name)
        if value is not None:
            copied[name] = value
    changes = copied
    # flags that choose an attention kernel become --attn_mode
    kernels = _list_chosen_kernels(values, own_options)
    kernel = next(iter(kernels.values()), "torch")
    changes["attn_mode"] = kernel
    if kernels:
        changes["settings"] = {**values["settings"], "attn_mode": kernel}
    changes["typed_names"] = {**values["typed_names"], **_list_typed_names(own_options, kernels)}
    if own_options.height is not None:
        changes["video_size"] = (own_options.height, own_options.width)
    if own_options.output_name is not None:
        changes["name_start"] = own_options.output_name
    # --mixed_precision is another name of --dit_dtype
    mixed = DTYPES.get(own_options.mixed_precision or "")
    dtype = _select_value("dit_dtype", own_options.dit_dtype, mixed)
    own_options = override_options(own_options, {"dit_dtype": dtype})
    return override_options(shared, changes), own_options


def _list_typed_names(own_options: Ltx2GenerationOptions, kernels: Mapping[str, str]) -> dict[str, str]:
    """Return the names to show in messages: shared option (with its value) -> the option that was typed."""
    # `kernels` are the selected attention modes by option name.
    typed_names = {}
    for official_name, name in _OFFICIAL_NAMES.items():
        if getattr(own_options, official_name) is not None:
            typed_names[f"--{name}"] = f"--{official_name}"
    if own_options.sample_audio_only:
        typed_names["--ltx2_mode audio"] = "--sample_audio_only"
    for flag in _KERNELS.keys() & {name.removeprefix("--") for name in kernels}:
        typed_names[f"--attn_mode {_KERNELS[flag]}"] = f"--{flag}"
    return typed_names


def _list_chosen_kernels(values: Mapping[str, Any], own_options: Ltx2GenerationOptions) -> dict[str, str]:
    """Return the selected attention modes by option name; raise OptionError if they conflict."""
    # `values` are the shared options. An option of the official script overrides a preset's mode.
    kernels = {f"--{flag}": mode for flag, mode in _KERNELS.items() if getattr(own_options, flag)}
    mode = values["attn_mode"]
    is_overridden = bool(kernels) and "attn_mode" in values["by_preset"]
    if mode is not None and not is_overridden:
        kernels[f"--attn_mode {mode}"] = mode
    if len({GENERATION_VALUES[mode] for mode in kernels.values()}) > 1:
        raise OptionError(f"{' and '.join(kernels)} choose different kernels: pass one of them")
    return kernels


def _select_value(name: str, ours: Any, theirs: Any, other_name: str = "mixed_precision") -> Any:
    """Return an option's value given under either of two names; None if neither is given."""
    if None not in (ours, theirs) and ours != theirs:
        raise OptionError(f"--{name} {ours} and --{other_name} {theirs} mean the same: pass one of them")
    return theirs if ours is None else ours


declare_all(Ltx2LatentCachingOptions, LATENTS)
declare_all(Ltx2TextCachingOptions, TEXTS)
declare_all(Ltx2TrainingOptions, TRAINING)
declare_all(Ltx2GenerationOptions, GENERATION)


def caching_options(options: Ltx2TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    checkpoint = options.model.ltx2_checkpoint
    model = {"--ltx2_checkpoint": checkpoint, "--ltx2_mode": options.model.ltx_mode}
    latents: dict[str, Any] = {"--ltx2_video_vae": options.vae.file.vae}
    latents["--ltx2_audio_vae"] = options.vae.audio_vae
    if is_version_2_5(checkpoint):  # LTX-2.5 has the VAEs in separate files
        latents["--ltx2_video_vae"] = options.vae.file.vae or Placeholder("VIDEO_VAE_FILE")
        if AUDIO in options.model.streams:
            latents["--ltx2_audio_vae"] = options.vae.audio_vae or Placeholder("AUDIO_VAE_FILE")
    texts = options.text.command_options(checkpoint)
    return {**model, **latents, **options.references.command_options()}, {**model, **texts}


def text_encoder_options(options: Ltx2LatentCachingOptions) -> dict[str, Any]:
    """Return the options that cache texts with a release's text encoder; its path is a placeholder."""
    return Ltx2TextOptions.from_defaults().command_options(options.model.ltx2_checkpoint)


def generation_options(options: Ltx2TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes `sample` with a training run's models."""
    latents, texts = caching_options(options)
    extra = sample.get("extra") or {}
    example = sample.get("example")  # the dataset item that the sample repeats
    paths = extra.get("reference_video", "").split("\n")
    references = [path for path in paths if path] if example is None else example.references
    rate = sample.get("fps")  # an input of the model
    guidance = {f"--{name}": value for name, value in option_values(options.guidance).items()}
    given = {  # each keyframe and latent frame has its own option
        f"--{name}": Repeated(value) if isinstance(value, tuple) else value
        for name, value in read_request_values(extra).items()
    }
    learned = apply_conditioning_config(options)
    given |= list_learned_media(learned.given, learned.ltx2_train_direction, sample)
    # a LoRA that has always been given the first frame
    first_frame = Placeholder("IMAGE_FILE") if learned.first_frame_probability >= 1 else None
    # a value of None leaves the option out of the command
    left_out = [
        *options.references.command_options(),  # these factors are in the LoRA's metadata
        *("--height", "--width", "--sample_num_frames"),  # the training's; the sample has its own size
    ]
    return {
        **latents,
        **dict.fromkeys(left_out),
        "--reference_video": references[:1],
        "--reference_videos": references[1:],
        "--reference_audio": extra.get("reference_audio"),
        **given,
        f"--{IDENTITY_SCALE}": options.audio_references.identity_scale or None,
        **texts,
        "--dit": options.dit,
        "--dit_dtype": options.dit_dtype,
        "--image_path": sample.get("image_path") or first_frame,
        "--video_length": sample.get("frames") or given.get("--video_length"),
        "--fps": None if rate is None else f"{rate:g}",  # without a decimal point, as --fps reads it
        "--sample_disable_audio": options.silent,
        **guidance,
    }
