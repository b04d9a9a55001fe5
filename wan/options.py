"""Wan's own options for caching, training and generation."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    IDENTITY,
    NO_PIXELS,
    REQUEST_SETTING,
    SAMPLES_ONLY,
    Options,
    make_request_facts,
    not_needed,
    option,
    unsupported,
)
from modules.speed_options import VaeOptions, dit_dtype_option, fp8_text_option, text_form_option
from wan.bernini_options import (
    BERNINI_EXTRAS,
    DEFAULT_TOPIC,
    BerniniGenerationOptions,
    BerniniTextCachingOptions,
    BerniniTrainingOptions,
    find_named_sign,
)
from wan.configs import BERNINI, FUN_CONTROL, TASKS, VACE, WanTask

logger = logging.getLogger(__name__)

UNSUPPORTED_OPTIONS = {
    "s2v-14B": "speech to video is not built yet; i2v-A14B starts from an image, without sound",
    "animate-14B": "a character that follows a video is not built yet; i2v-A14B-FC follows a video of poses",
}
MAX_TIMESTEP = 1000


def check_one_frame(task: WanTask) -> None:
    """Raise OptionError if the task cannot generate single images from control images."""
    able = [other.name for other in TASKS.values() if other.requires_image and not other.has_control]
    if task.name not in able:
        raise OptionError(
            f"--task {task.name} cannot generate single images from control images (--one_frame, "
            f"--one_frame_inference). Use --task {', '.join(able[:-1])} or {able[-1]}"
        )


class WanTextOptions(Options):
    """Paths of the umT5 encoder and its tokenizer."""

    t5: Path | None = option("umT5 text encoder checkpoint", often=True)
    t5_tokenizer: Path | None = option(
        "folder or file of the tokenizer; default: next to the checkpoint, else from the hub"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_t5", "T5's linear layers in fp8: half the memory of bf16, slightly different embeddings"
    )
    text_encoder_form: str | None = text_form_option()


class WanExpertOptions(Options):
    """The second transformer of models with separate transformers for high and for low noise."""

    dit_high_noise: Path | None = option("transformer for high noise (t2v-A14B, i2v-A14B)", often=True)
    # compared when a training run resumes
    timestep_boundary: float | None = option(
        "noise level from which --dit_high_noise is used, 0 to 1 or 0 to 1000; default: the task's",
        above=0,
        below=MAX_TIMESTEP,
        hint="a share of noise, such as 0.875, or a timestep, such as 875",
        facts=FREE,
    )
    force_v2_1_time_embedding = not_needed("each timestep is embedded once, whatever the model's version")


_CACHE_CPU = "keep the VAE's features between frames in host memory"
# in caches of single images: positions in time of the images and their control images
FRAME_INDICES_KEY = "f_indices"
ONE_FRAME = "one_frame"  # a kind of caches, and the name of --one_frame_inference in Request.extra


class WanLatentCachingOptions(Options, title="Wan"):
    """Options of wan_cache_latents.py in addition to the shared ones."""

    vae: VaeOptions
    vae_cache_cpu: bool = option(_CACHE_CPU)
    clip: Path | None = option(
        "CLIP image encoder; also caches the image features that image-to-video training needs", often=True
    )
    i2v: bool = option(
        "cache the image condition without image features, for i2v-A14B; --clip caches both", often=True
    )
    flf2v: bool = option(
        "with --clip or --i2v: condition on the first and the last frame (flf2v-14B, i2v-A14B)",
        needs=("clip", "i2v"),
        hint="--clip has the image encoder, which encodes both frames; Wan2.2 has none and takes --i2v",
    )
    vace: bool = option(
        "cache for VACE, for items that have them: control videos (control_directory), masks whose "
        "white parts are regenerated (control_mask_directory), and references (reference_directory)",
        excludes=("clip", "i2v"),
        often=True,
    )
    bernini: bool = option(
        "cache for Bernini, for items that have them: the clip or image to change (control_directory), and "
        "references, clips or images (reference_directory)",
        excludes=("clip", "i2v", "vace"),
        often=True,
    )
    one_frame: bool = option(
        "cache single images with the control images that they are generated from, for i2v-14B, flf2v-14B "
        "and i2v-A14B",
        needs=("clip", "i2v"),
        excludes=("flf2v",),
        hint="--clip has the image encoder of Wan2.1; Wan2.2 has none and takes --i2v",
    )


class WanTextCachingOptions(Options, title="Wan"):
    """Options of wan_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: WanTextOptions = option(settings={"t5": {"required": True}})
    bernini: BerniniTextCachingOptions


class WanModelOptions(Options, title="Wan"):
    """The files of the model and how they run, in training and generation."""

    task: str = option(
        "kind of model; sets defaults",
        default="t2v-14B",
        choices=tuple(TASKS),
        refused=UNSUPPORTED_OPTIONS,
        facts={**IDENTITY, **REQUEST_SETTING},
        often=True,
    )
    dit: Path | None = option(  # resume compares its name
        "transformer checkpoint; for a model with two experts, the low-noise expert", facts=FREE, often=True
    )
    dit_dtype: str | None = dit_dtype_option()
    experts: WanExpertOptions = option(facts=FREE)
    mixed_precision_transformer: bool = option(
        "keep every tensor of the transformer in the dtype its file has", facts=HABIT
    )
    text_as_image_tokens: bool = option(
        "Fun-Control without a start image: use text tokens in place of image features, as older "
        "trainers did; for LoRAs trained that way",
        facts=HABIT,
    )
    vace: Path | None = option(
        "file with only the VACE blocks, for a text-to-video --dit without them", facts=FREE
    )
    vace_high_noise: Path | None = option(
        "the same for --dit_high_noise; it may be the same file", needs="vace", facts=FREE
    )
    vae: VaeOptions = option(facts={**FREE, **DECODING_SETTING})
    vae_cache_cpu: bool = option(_CACHE_CPU, facts={**FREE, **NO_PIXELS})
    text: WanTextOptions = option(facts=FREE)
    clip: Path | None = option("CLIP image encoder, for image-to-video models", facts=FREE)
    rope_func: str = option(
        "precision of the rotary embedding: default (float64) or comfy (float32)",
        default="default",
        choices=("default", "comfy"),
        facts=HABIT,
    )

    def __post_init__(self) -> None:
        if self.dit_dtype is not None and self.mixed_precision_transformer:
            raise OptionError(
                f"--dit_dtype {self.dit_dtype} with --mixed_precision_transformer, which keeps the file's "
                "dtypes: omit one of them"
            )
        if self.vace is not None and TASKS[self.task].kind != VACE:
            raise OptionError(
                f"--vace {self.vace}: --task {self.task} has no blocks of VACE. Use --task vace-1.3B, "
                "vace-14B or vace-A14B"
            )
        if self.text_as_image_tokens and TASKS[self.task].model_kind != FUN_CONTROL:
            logger.warning(
                "--text_as_image_tokens is ignored because --task %s is not one of Fun-Control of Wan2.1",
                self.task,
            )
        if self.vace is not None:
            # Raise OptionError unless a second transformer, and only a second one, has its own VACE blocks
            # The second transformer is for high noise or, in training, for samples only.
            second_dits = (self.experts.dit_high_noise, getattr(self, "sample_dit_other", None))
            has_second_dit = second_dits != (None, None)
            has_second_vace = self.vace_high_noise is not None
            if has_second_vace != has_second_dit:
                missing = "--dit_high_noise" if has_second_vace else "--vace_high_noise"
                raise OptionError(
                    "--vace with two transformers: each needs VACE blocks, --vace and --vace_high_noise. "
                    f"Pass {missing} too"
                )


class WanTrainingOptions(WanModelOptions, title="Wan"):
    """Options of wan_train_network.py in addition to the shared ones."""

    sample_dit_other: Path | None = option(
        "training one transformer of a model with two: the file of the other one, for samples only. It "
        "is not trained and gets only the LoRAs of --sample_lora; both wait in host memory",
        facts={**FREE, **SAMPLES_ONLY},
    )
    first_frame_probability: float | None = option(
        "ti2v-5B: fraction of the batches of clips that are trained from image to video, with the "
        "first frame given; 0 trains text to video alone, 1 image to video alone; default: 0.5",
        minimum=0,
        maximum=1,
        facts=IDENTITY,
    )
    bernini: BerniniTrainingOptions
    one_frame: bool = option(
        "generate single images as samples (--of and --ci in a prompt line)", facts=HABIT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        task = TASKS[self.task]
        probability = self.first_frame_probability
        if self.one_frame:
            check_one_frame(task)
        if probability is not None and not task.takes_clean_first_frame:
            why = "always trains with an image" if task.requires_image else "takes no start image"
            raise OptionError(
                f"--first_frame_probability {probability:g}: --task {task.name} {why}. Omit the option, "
                "or use --task ti2v-5B"
            )
        if self.sample_dit_other is not None:
            # Check --sample_dit_other: raise OptionError unless samples need a second, untrained transformer
            sample_dit = self.sample_dit_other
            trained = (self.dit, self.experts.dit_high_noise)
            if None not in trained:
                raise OptionError(
                    "--sample_dit_other: samples use both transformers, --dit and --dit_high_noise. Omit it"
                )
            if TASKS[self.task].boundary is None:
                raise OptionError(
                    f"--sample_dit_other: --task {self.task} has one transformer. Omit the option, or use "
                    "--task t2v-A14B or i2v-A14B"
                )
            if sample_dit in trained:
                raise OptionError(
                    f"--sample_dit_other {sample_dit}: this one is trained. Pass the file of the other "
                    "transformer"
                )


MASK, SCALE = "src_mask", "vace_scale"  # options, and their names in Request.extra
MAX_HINT_SCALE = 100
MAX_REFERENCES = 8  # each is a latent frame more; the release was trained with few


class WanGenerationOptions(WanModelOptions, title="Wan"):
    """Options of wan_generate_video.py in addition to the shared ones."""

    ckpt_dir: Path | None = option(
        "folder of the official release or of a pipeline of diffusers: VAE, T5, CLIP and, without --dit, the "
        "transformers are found in it",
        facts=DECODING_SETTING,
    )
    lower_precision_attention: bool = option(
        "time embedding, modulation and rotary embedding in float16 instead of float32: less memory, "
        "slightly different videos"
    )
    i2v_extra_noise: float | None = option(
        "noise added to the image condition, for more motion",
        minimum=0,
        maximum=10,
        hint="0.02 to 0.04 are usual",
    )
    # read here only to be checked early
    riflex_index: int = option()
    control_path: Path | None = option(facts=REQUEST_SETTING)
    control_image_path: tuple[str, ...] | None = option(facts=REQUEST_SETTING)
    from_file: Path | None = option(facts=NO_PIXELS)
    interactive: bool = option(facts=NO_PIXELS)
    src_mask: Path | None = option(
        "mask of --src_video, a video or an image: white is regenerated, black is kept (loss masks of "
        "a training are white where the network learns); without it, everything is regenerated",
        flags=("--src_mask", "--vace_video_mask"),
        facts=make_request_facts(MASK),
        title="VACE",
    )
    vace_scale: tuple[float, ...] = option(
        "strength of VACE: one number, or one for each VACE layer; 0 is text to video",
        default=(1.0,),
        flags=("--vace_scale", "--context_scale", "--conditioning_scale"),
        minimum=-MAX_HINT_SCALE,
        maximum=MAX_HINT_SCALE,
        facts=make_request_facts(SCALE),
        title="VACE",
        nargs="+",
    )
    bernini: BerniniGenerationOptions
    one_frame_inference: str | None = option(
        "generate one image from --control_image_path: positions in time, "
        "'target_index=1,control_index=0+2', or default, which is one control image at 0",
        facts=make_request_facts(ONE_FRAME),
        flags=("--one_frame_inference", "--one_frame"),
        metavar="default|target_index=N,control_index=N+N",
    )
    control_image_mask_path = unsupported(
        "Wan's one-frame mode takes control images whole, as its LoRAs learn them. Use FramePack for masks",
        "masks of control images",
        type=str,
        nargs="*",
    )

    def __post_init__(self) -> None:
        if self.riflex_index and self.rope_func != "comfy":
            raise OptionError(
                f"--riflex_index {self.riflex_index} with --rope_func {self.rope_func}: it changes the table "
                "of --rope_func comfy. Add --rope_func comfy."
            )
        super().__post_init__()
        if self.one_frame_inference is not None:
            check_one_frame(TASKS[self.task])
            if not self.one_frame_inference.strip():
                raise OptionError(
                    "--one_frame_inference is empty: pass default, or positions such as "
                    "target_index=1,control_index=0+2; or omit it for a video"
                )
        task = TASKS[self.task]
        # a file of Bernini is run as such if --task is not given
        takes_references = task.takes_references or find_named_sign(self.dit)
        if task.kind != VACE:
            # Raise OptionError if an option is given that only VACE uses; called for all other tasks
            supports_one_frame = task.requires_image and not task.has_control
            # a single frame is generated from control images; prompt lines may ask for it too
            reads_prompt_lines = self.from_file is not None or self.interactive
            may_make_one_frame = supports_one_frame and reads_prompt_lines
            if self.one_frame_inference is not None:
                may_make_one_frame = True
            unused_options = {
                MASK: self.src_mask,
                SCALE: self.vace_scale != (1.0,),  # the default
                "control_path": self.control_path and not (task.has_control or takes_references),
                "control_image_path": (
                    self.control_image_path and not (may_make_one_frame or takes_references)
                ),
            }
            for name, is_unused in unused_options.items():
                if is_unused:
                    is_for_one_frame = supports_one_frame and name == "control_image_path"
                    raise self._unused_option_error(name, is_for_one_frame)

    def _unused_option_error(self, name: str, is_for_one_frame: bool) -> OptionError:
        condition = " without --one_frame_inference" if is_for_one_frame else ""
        return OptionError(
            f"--{name}: --task {self.task} does not use it{condition}. Use --task vace-1.3B, "
            "vace-14B or vace-A14B, with a checkpoint of VACE"
        )


def text_encoder_options(options: WanLatentCachingOptions) -> dict[str, Any]:
    """Return the options for caching the captions of items whose latents a command caches."""
    texts: dict[str, Any] = {"--t5": Placeholder("T5_FILE")}
    if options.bernini:
        texts["--bernini_prompt"] = DEFAULT_TOPIC
    return texts


def training_options(options: WanLatentCachingOptions, family: Any) -> dict[str, Any]:
    """Return the options for training on the latents of a caching command: none, or --task.

    `family` was built by the caching command. Wan2.1's latents do not show the model's size: 14B is assumed.
    """
    has_features = options.clip is not None
    if options.vace:
        task = "vace-14B"
    elif options.bernini:
        task = "bernini-14B"
    elif options.flf2v and has_features:
        task = "flf2v-14B"
    elif options.i2v or has_features:
        task = "i2v-14B" if has_features else "i2v-A14B"
    else:
        task = family.files.task.name
    return {} if task == "t2v-14B" else {"--task": task}  # the default of --task


def caching_options(options: WanTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    task = TASKS[options.task]
    latents = {
        "--vae": options.vae.vae or Placeholder(f"WAN_{'2.2' if task.kind == 'ti2v' else '2.1'}_VAE_FILE"),
        "--clip": (options.clip or Placeholder("CLIP_FILE")) if task.uses_clip_features else None,
        "--i2v": task.requires_image and not task.uses_clip_features,
        "--flf2v": options.task.startswith("flf2v") and not options.one_frame,
        "--vace": task.kind == VACE,
        "--bernini": task.kind == BERNINI,
        "--one_frame": options.one_frame,
    }
    texts: dict[str, Any] = {"--t5": options.text.t5 or Placeholder("T5_FILE")}
    if task.kind == BERNINI and options.bernini.bernini_prompt != "none":
        texts["--bernini_prompt"] = options.bernini.bernini_prompt or DEFAULT_TOPIC
    return latents, texts


def generation_options(options: WanTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation script that select the models of a training run.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`.
    """
    task = TASKS[options.task]
    low_noise_dit = options.dit
    high_noise_dit = options.experts.dit_high_noise
    # --sample_dit_other is the expert that is not trained: the high-noise one if only --dit is trained
    if high_noise_dit is None:
        high_noise_dit = options.sample_dit_other
    else:
        low_noise_dit = low_noise_dit or options.sample_dit_other
    boundary = None if high_noise_dit is None else options.experts.timestep_boundary
    clip = (options.clip or Placeholder("CLIP_FILE")) if task.uses_clip_features else None
    return {
        "--task": options.task,
        "--timestep_boundary": boundary,
        "--dit": low_noise_dit or Placeholder("DIT_FILE"),
        "--dit_high_noise": high_noise_dit,
        "--vace": options.vace,
        "--vace_high_noise": options.vace_high_noise,
        "--vae": options.vae.vae or Placeholder("VAE_FILE"),
        "--t5": options.text.t5 or Placeholder("T5_FILE"),
        "--clip": clip,
        "--t5_tokenizer": options.text.t5_tokenizer,
        "--dit_dtype": options.dit_dtype,
        **_list_inputs(options, sample),
        "--video_length": sample.get("frames"),
    }


def _list_inputs(options: WanTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for a sample's images and clips, with placeholders for required ones it lacks."""
    # `sample` has the values of a sample, or an item of the dataset as "example".
    task = TASKS[options.task]
    one_frame = options.one_frame or ONE_FRAME in (sample.get("extra") or {})
    if sample.get("example"):
        # only caches of --one_frame have frame indices
        one_frame |= FRAME_INDICES_KEY in sample["example"].cached
        inputs = _list_item_inputs(task, one_frame, sample)
    else:
        # The images and clips that a sample was generated from, by option
        extra = sample.get("extra") or {}
        images = sample.get("control_images")
        inputs = {
            "--image_path": sample.get("image_path"),
            "--end_image_path": sample.get("end_image_path"),
            "--src_video" if task.takes_references else "--control_path": sample.get("control_path"),
        }
        if options.one_frame or ONE_FRAME in extra:
            inputs["--one_frame_inference"] = extra.get(ONE_FRAME, "default")
            inputs["--control_image_path"] = images
        else:
            inputs |= {f"--{name}": extra.get(name) for name in (MASK, SCALE, *BERNINI_EXTRAS)}
            inputs["--src_ref_images"] = images
    present = {flag: value for flag, value in inputs.items() if value}
    needed: dict[str, Any] = {
        "--image_path": Placeholder("IMAGE_FILE") if task.requires_image else None,
        "--end_image_path": Placeholder("END_IMAGE_FILE") if task.kind == "flf2v" else None,
        "--control_path": Placeholder("CONTROL_FILE") if task.has_control else None,
    }
    if one_frame:  # the control images replace all other inputs
        needed = {
            "--one_frame_inference": "default",
            "--control_image_path": Placeholder("CONTROL_IMAGE_FILE"),
        }
    return needed | present


def _list_item_inputs(task: WanTask, one_frame: bool, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation options that give a cached training item's images and clips as inputs."""
    example = sample["example"]
    control = next(iter(example.controls), None)
    if one_frame:
        return {"--one_frame_inference": example.one_frame_settings, "--control_image_path": example.controls}
    if task.kind == VACE:
        return {
            "--src_video": control,
            f"--{MASK}": example.control_mask if control else None,
            "--src_ref_images": example.references,
        }
    if task.kind == BERNINI:
        return {"--src_video": control, "--src_ref_images": example.references}
    return {
        "--image_path": example.image if task.requires_image else None,
        "--control_path": control if task.has_control else None,
    }
