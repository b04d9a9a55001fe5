"""Options of Kandinsky 5 and 6 for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky.configs import NAME, REFUSED_TASKS, TASKS
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    IDENTITY,
    NO_PIXELS,
    REQUEST_SETTING,
    Options,
    not_needed,
    option,
    unsupported,
)
from modules.speed_options import VaeOptions, dit_dtype_option, fp8_text_option, text_form_option

_TOKENIZER = "tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub"
_TASK = (
    "use of the model, which sets defaults: lite or pro, from text (t2v) or an image (i2v), 5 or 10 seconds, "
    "sd or hd; t2i makes images, k6 clips with sound; default: what the size of --dit and its name say"
)
_SOUND = "of Kandinsky 6: folder audio_vae of its release, whose config.json has the scale of the latents"


def _task_option(**facts: Any) -> Any:
    return option(_TASK, choices=tuple(TASKS), refused=REFUSED_TASKS, often=True, **facts)


class KandinskyVaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(facts=DECODING_SETTING)
    vae_chunk_size: int | None = option(
        "number of frames that a layer of the VAE computes at a time; fewer take less memory",
        minimum=1,
        maximum=100_000,
        facts=NO_PIXELS,
    )
    audio_vae: Path | None = option(
        f"VAE of the sound {_SOUND}; without it, clips have no sound", facts=DECODING_SETTING, often=True
    )


class KandinskyDecodingOptions(KandinskyVaeOptions):
    """Paths of the VAEs and of the vocoder, to generate clips."""

    vocoder: Path | None = option(
        "vocoder of Kandinsky 6: folder vocoder of its release, which turns spectrograms into sound",
        needs="audio_vae",
        facts=DECODING_SETTING,
        often=True,
    )

    def command_options(self) -> dict[str, Any]:
        """Return options for a printed command that decodes with the same networks."""
        return {
            **self.file.command_options(),
            "--audio_vae": self.audio_vae,
            "--vocoder": self.vocoder,
        }


class KandinskyTextOptions(Options):
    """Paths of the two text encoders and their tokenizers."""

    text_encoder_qwen: Path | None = option("Qwen2.5-VL (7B) text encoder: file or folder", often=True)
    text_encoder_qwen_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder_clip: Path | None = option("CLIP-L text encoder: folder or file", often=True)
    text_encoder_clip_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder_dtype: str | None = option(
        "dtype that both encoders compute in; default: bfloat16, but float32 if --dit is float32"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen2.5-VL in fp8: half the memory, slightly different states"
    )
    text_encoder_form: str | None = text_form_option()
    text_encoder_cpu: bool = option("run the text encoder on the CPU")

    def command_options(self) -> dict[str, Any]:
        """Return options for a printed command that encodes prompts with the same text encoders."""
        return {
            "--text_encoder_qwen": self.text_encoder_qwen or Placeholder("QWEN_FILE"),
            "--text_encoder_qwen_tokenizer": self.text_encoder_qwen_tokenizer,
            "--text_encoder_clip": self.text_encoder_clip or Placeholder("CLIP_FILE"),
            "--text_encoder_clip_tokenizer": self.text_encoder_clip_tokenizer,
            "--fp8_vl": self.in_fp8,
            "--text_encoder_form": self.text_encoder_form,
        }


class KandinskyLatentCachingOptions(Options, title=NAME):
    """Options of kandinsky_cache_latents.py in addition to the shared ones."""

    task: str | None = _task_option()
    vae: KandinskyVaeOptions


class KandinskyTextCachingOptions(Options, title=NAME):
    """Options of kandinsky_cache_text_encoder_outputs.py in addition to the shared ones."""

    task: str | None = _task_option()
    text: KandinskyTextOptions = option(
        settings={"text_encoder_qwen": {"required": True}, "text_encoder_clip": {"required": True}}
    )


_FULL_ATTENTION = "attention is always full, which is as good as the sparse one of long clips, and slower"


class KandinskySparseOptions(Options):
    """musubi-tuner's options for a sparse attention, which does not exist here."""

    force_nabla_attention = not_needed(_FULL_ATTENTION)
    nabla_resize = not_needed(_FULL_ATTENTION)
    nabla_P = not_needed(_FULL_ATTENTION, type=float)
    nabla_wT = not_needed(_FULL_ATTENTION, type=int)
    nabla_wH = not_needed(_FULL_ATTENTION, type=int)
    nabla_wW = not_needed(_FULL_ATTENTION, type=int)
    i2v_mode = unsupported(
        "a clip begins with an image and ends freely. Omit it",
        values=("first",),
        choices=("first", "first_last"),
    )


class KandinskyModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    task: str | None = _task_option(facts={**IDENTITY, **REQUEST_SETTING})
    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: KandinskyDecodingOptions = option(facts={**FREE, **DECODING_SETTING})
    text: KandinskyTextOptions = option(facts=FREE)
    sparse: KandinskySparseOptions


class KandinskyTrainingOptions(KandinskyModelOptions, title=NAME):
    """Options of kandinsky_train_network.py and kandinsky_train.py in addition to the shared ones."""

    first_frame_probability: float | None = option(
        "fraction of the batches of clips that are trained from image to video, with the first frame given; "
        "0 trains text to video alone, 1 image to video alone; default: 1 for i2v tasks, else 0",
        flags=("--first_frame_probability", "--visual_cond_prob"),
        minimum=0,
        maximum=1,
        facts=IDENTITY,
    )
    audio_loss_weight: float = option(
        "weight of the audio loss; clips without audio have none",
        default=1.0,
        minimum=0,
        facts=HABIT,
    )

    def __post_init__(self) -> None:
        task = None if self.task is None else TASKS[self.task]
        if self.first_frame_probability and task is not None and task.makes_images:
            raise OptionError(
                f"--first_frame_probability {self.first_frame_probability:g}: --task {task.name} makes "
                "images, which have no first frame. Omit the option"
            )


class KandinskyGenerationOptions(KandinskyModelOptions, title=NAME):
    """Options of kandinsky_generate_video.py in addition to the shared ones."""

    height: int | None = option("with --width: the same as --video_size", minimum=1, facts=NO_PIXELS)
    width: int | None = option("with --height: the same as --video_size", minimum=1, facts=NO_PIXELS)

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            given = "--height" if self.width is None else "--width"
            raise OptionError(f"{given} alone: pass both --height and --width, or --video_size")


def caching_options(options: KandinskyTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    task = {"--task": options.task}
    latents = {**task, **options.vae.file.command_options(), "--audio_vae": options.vae.audio_vae}
    return latents, {**task, **options.text.command_options()}


def generation_options(options: KandinskyTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of kandinsky_generate_video.py that generate `sample` with a run's models."""
    image = sample.get("image_path")
    example = sample.get("example")
    if image is None and options.task is not None and TASKS[options.task].requires_image:
        image = (None if example is None else example.image) or Placeholder("IMAGE_FILE")
    return {
        "--task": options.task,
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.command_options(),
        **options.text.command_options(),
        "--dit_dtype": options.dit_dtype,
        "--image_path": image,
        "--video_length": sample.get("frames"),
        "--prompt_2": sample.get("second_prompt"),
    }
