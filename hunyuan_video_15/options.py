"""HunyuanVideo 1.5's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_image.options import HunyuanImageTextOptions
from hunyuan_video_15.configs import I2V, NAME, TASKS, HunyuanVideo15Task, guess_task
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, IDENTITY, REQUEST_SETTING, Options, not_needed, option
from modules.speed_options import VaeOptions, dit_dtype_option

GENERIC_NAME = "diffusion_pytorch_model"  # of files that only their folders tell apart
_IMAGE_ENCODER = "SigLIP image encoder, which sees the first frame: folder or file"
_TASK = (
    "use of the model: clips from text (t2v) or from text and an image (i2v), for which files have equal "
    "tensors; default: what the name of --dit says, else t2v"
)
# of the record of the text encoders, which HunyuanImage-2.1 has too
_TEXT_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "byt5": {"help": "ByT5 encoder of the texts to be written in the video: file or folder"}
}


class HunyuanVideo15VaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(facts=DECODING_SETTING)
    vae_sample_size: int | None = option(
        "edge of a tile in pixels, as --vae_spatial_tile_sample_min_size; 0: no tiles",
        choices=(0, 128, 256),
        facts=DECODING_SETTING,
    )
    vae_enable_patch_conv = not_needed("the VAE computes one group of frames at a time anyway")

    def __post_init__(self) -> None:
        if self.vae_sample_size is not None and self.file.tile is not None:
            raise OptionError(
                f"--vae_sample_size {self.vae_sample_size} and --vae_tiling or "
                "--vae_spatial_tile_sample_min_size: pass one of them"
            )

    @property
    def tile(self) -> int | None:
        """Edge of a VAE tile in pixels; None for no tiling."""
        return self.file.tile if self.vae_sample_size is None else self.vae_sample_size or None


class HunyuanVideo15LatentCachingOptions(Options, title=NAME):
    """Options of hv_1_5_cache_latents.py in addition to the shared ones."""

    vae: HunyuanVideo15VaeOptions
    i2v: bool = option(
        "also cache the first frame, encoded alone and by --image_encoder, to train --task i2v",
        needs="image_encoder",
    )
    image_encoder: Path | None = option(_IMAGE_ENCODER, ignored_without="i2v")


class HunyuanVideo15TextCachingOptions(Options, title=NAME):
    """Options of hv_1_5_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: HunyuanImageTextOptions = option(
        settings={"text_encoder": {"required": True}, "byt5": {"required": True, **_TEXT_SETTINGS["byt5"]}}
    )


class HunyuanVideo15TrainingOptions(Options, title=NAME):
    """Options of hv_1_5_train_network.py and hv_1_5_train.py in addition to the shared ones."""

    task: str | None = option(_TASK, choices=tuple(TASKS), facts=IDENTITY, often=True)
    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: HunyuanVideo15VaeOptions = option(facts=FREE)
    text: HunyuanImageTextOptions = option(facts=FREE, settings=_TEXT_SETTINGS)
    # for samples only: training takes its states from the caches
    image_encoder: Path | None = option(_IMAGE_ENCODER, facts=FREE, often=True)


class HunyuanVideo15GenerationOptions(Options, title=NAME):
    """Options of hv_1_5_generate_video.py in addition to the shared ones."""

    task: str | None = option(
        f"{_TASK}. With --image_path, it is i2v", choices=tuple(TASKS), facts=REQUEST_SETTING, often=True
    )
    dit: Path | None = option("transformer checkpoint", often=True)
    dit_dtype: str | None = dit_dtype_option()
    vae: HunyuanVideo15VaeOptions
    text: HunyuanImageTextOptions = option(settings=_TEXT_SETTINGS)
    image_encoder: Path | None = option(_IMAGE_ENCODER, often=True)


def release_name(dit: Path | None) -> str:
    """Return the name of a transformer's file that shows its release; "" without a file.

    It includes the names of two folders if the file has the name that all releases have.
    """
    if dit is None:
        return ""
    if not dit.suffix:  # a folder
        return " ".join((dit.parent.name, dit.name))
    if not dit.name.startswith(GENERIC_NAME):
        return dit.name
    return " ".join((dit.parent.parent.name, dit.parent.name, dit.name))


def find_task(name: str | None, dit: Path | None) -> HunyuanVideo15Task:
    """Return the task that --task names, or the one that the name of --dit suggests.

    Args:
        name: Value of --task; None if it is not given.
        dit: Value of --dit; None if it is not given.
    """
    return guess_task(release_name(dit)) if name is None else TASKS[name]


def caching_options(options: HunyuanVideo15TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    latents = options.vae.file.command_options()
    if find_task(options.task, options.dit).requires_image:
        latents |= {"--i2v": True, "--image_encoder": options.image_encoder or Placeholder("SIGLIP_FILE")}
    return latents, _list_text_options(options.text)


def training_options(options: HunyuanVideo15LatentCachingOptions, family: Any) -> dict[str, Any]:
    """Return the options for training on the latents of a caching command: --task i2v, or none."""
    return {"--task": I2V} if options.i2v else {}


def generation_options(options: HunyuanVideo15TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of hv_1_5_generate_video.py that generate `sample` with a run's models."""
    task = find_task(options.task, options.dit)
    values = {
        "--task": task.name,
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **_list_text_options(options.text),
        "--video_length": sample.get("frames"),
    }
    if task.requires_image:
        example = sample.get("example")
        default_image = (None if example is None else example.image) or Placeholder("IMAGE_FILE")
        values["--image_encoder"] = options.image_encoder or Placeholder("SIGLIP_FILE")
        values["--image_path"] = sample.get("image_path") or default_image
    return values


def _list_text_options(text: HunyuanImageTextOptions) -> dict[str, Any]:
    return {
        "--text_encoder": text.text_encoder or Placeholder("QWEN_FILE"),
        "--byt5": text.byt5 or Placeholder("BYT5_FILE"),
        "--text_encoder_tokenizer": text.text_encoder_tokenizer,
        "--fp8_vl": text.in_fp8,
        "--text_encoder_form": text.text_encoder_form,
    }
