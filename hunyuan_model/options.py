"""HunyuanVideo's and SkyReels V1's own options for caching, training and generation."""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_model.configs import SKIP_LAYERS
from modules.attention.options import add_split_argument
from modules.command import as_typed
from modules.dit_options import add_dit_dtype
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE, HABIT, NO_PIXELS, OF_DECODING
from modules.vae_options import VaeOptions, add_vae_arguments

INPUT_CHANNELS = (16, 32)  # of the two kinds of transformer


@dataclass(frozen=True)
class HunyuanVaeOptions:
    """Path of the VAE and how it runs."""

    file: VaeOptions = field(metadata=OF_DECODING)
    vae_chunk_size: int | None = field(metadata=NO_PIXELS)

    def __post_init__(self) -> None:
        frames = "the number of frames that a layer computes at a time"
        check_at_least("--vae_chunk_size", self.vae_chunk_size, 1, frames)
        check_at_most("--vae_chunk_size", self.vae_chunk_size, 100_000, frames)


@dataclass(frozen=True)
class HunyuanTextOptions:
    """Paths of the two text encoders and their tokenizers."""

    text_encoder1: Path | None
    text_encoder2: Path | None
    text_encoder1_tokenizer: Path | None
    text_encoder2_tokenizer: Path | None
    text_encoder_dtype: str | None
    fp8_llm: bool


@dataclass(frozen=True)
class TextReadingOptions:
    """How a generation reads its texts, with the encoders that HunyuanVideo and FramePack share."""

    custom_system_prompt: str | None
    hidden_state_skip_layer: int
    apply_final_norm: bool
    te_multiplier: tuple[str, ...] | None

    def __post_init__(self) -> None:
        check_at_least(
            "--hidden_state_skip_layer", self.hidden_state_skip_layer, 0, "0 takes the last layer's state"
        )
        _ = self.text_multipliers

    @property
    def text_multipliers(self) -> tuple[float, float] | None:
        """Return the factors of --te_multiplier for the text's tokens and for their mean."""
        return read_multipliers(self.te_multiplier)


@dataclass(frozen=True)
class HunyuanLatentCachingOptions:
    """Options of cache_latents.py besides the shared ones."""

    vae: HunyuanVaeOptions
    i2v: bool


@dataclass(frozen=True)
class HunyuanTextCachingOptions:
    """Options of cache_text_encoder_outputs.py besides the shared ones."""

    text: HunyuanTextOptions


@dataclass(frozen=True)
class HunyuanTrainingOptions:
    """Options of hv_train_network.py and hv_train.py besides the shared ones."""

    dit: Path | None = field(metadata=FREE)  # resume compares its name
    dit_dtype: str | None = field(metadata=HABIT)
    dit_in_channels: int = field(metadata=FREE)  # the file says it too
    vae: HunyuanVaeOptions = field(metadata=FREE)
    text: HunyuanTextOptions = field(metadata=FREE)
    embedded_guidance: float = field(metadata={"option": "guidance_scale", **HABIT})

    def __post_init__(self) -> None:
        _check_channels(self.dit_in_channels)


@dataclass(frozen=True)
class HunyuanGenerationOptions:
    """Options of hv_generate_video.py besides the shared ones."""

    dit: Path | None
    dit_in_channels: int | None = field(metadata=NO_PIXELS)  # the file says it too
    vae: HunyuanVaeOptions
    text: HunyuanTextOptions
    reading: TextReadingOptions
    exclude_single_blocks: bool
    reproduce: bool

    def __post_init__(self) -> None:
        if self.dit_in_channels is not None:
            _check_channels(self.dit_in_channels)


def read_multipliers(words: tuple[str, ...] | None) -> tuple[float, float] | None:
    """Return the numbers of --te_multiplier; None if it is not given.

    Raises OptionError if they are not numbers.
    """
    if words is None:
        return None
    try:
        tokens, mean = map(float, words)
    except ValueError:
        tokens = mean = math.nan
    if not (math.isfinite(tokens) and math.isfinite(mean)):
        raise OptionError(f"--te_multiplier {' '.join(words)}: give two numbers, such as 1.2 1.0")
    return tokens, mean


def add_latent_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --vae and its switches, and --i2v for image-to-video caches."""
    group = parser.add_argument_group("HunyuanVideo")
    add_vae(group)
    group.add_argument(
        "--i2v",
        action="store_true",
        help="also cache the first frame, encoded alone, to train SkyReels V1 image-to-video",
    )


def add_text_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two text encoders and their tokenizers."""
    group = parser.add_argument_group("HunyuanVideo")
    add_text(group, required=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoint and the encoders that training samples need."""
    group = parser.add_argument_group("HunyuanVideo")
    group.add_argument("--dit", type=str, default=None, help="transformer checkpoint")
    add_dit_dtype(group)
    group.add_argument(
        "--dit_in_channels",
        type=int,
        default=16,
        help="number of input channels; 32 requires the image-to-video checkpoint; default: that of the file",
    )
    add_vae(group)
    add_text(group, required=False)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoints that generation needs, and the options of the text encoders."""
    group = parser.add_argument_group("HunyuanVideo")
    group.add_argument("--dit", type=str, default=None, help="transformer checkpoint")
    group.add_argument(
        "--dit_in_channels",
        type=int,
        default=None,
        help="number of input channels that the checkpoint must have; default: any",
    )
    add_vae(group, always_tiled=True)
    add_text(group, required=False)
    add_text_reading(group)
    group.add_argument(
        "--exclude_single_blocks",
        action="store_true",
        help="use only the parts of LoRAs that are for the double blocks",
    )
    add_reproduce(group)
    add_split_argument(group)


def caching_commands(
    dataset_config: Path | None, options: HunyuanTrainingOptions, switches: Iterable[str] = ()
) -> tuple[str, str]:
    """Return the commands that make missing caches of latents and of texts.

    switches: options of cache_latents.py that the transformer needs.
    """
    dataset = ["--dataset_config", str(dataset_config)]
    latents = [
        "python",
        "cache_latents.py",
        *dataset,
        "--vae",
        str(options.vae.file.vae or "VAE_FILE"),
        *switches,
    ]
    encoders = {"1": options.text.text_encoder1, "2": options.text.text_encoder2}
    files = [
        word
        for number, path in encoders.items()
        for word in (f"--text_encoder{number}", str(path or f"ENCODER{number}"))
    ]
    return as_typed(latents), as_typed(["python", "cache_text_encoder_outputs.py", *dataset, *files])


def generation_words(options: HunyuanTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: what a sample was asked for, by the names of `Request`; may be empty.
    """
    words = ["hv_generate_video.py", *model_words(options.dit, options.vae, options.text)]
    values = {
        "--image_path": sample.get("image_path") or ("IMAGE_FILE" if options.dit_in_channels == 32 else None),
        "--video_length": sample.get("frames"),
        "--embedded_cfg_scale": sample.get("embedded_guidance"),
    }
    return words + [word for name, value in values.items() if value for word in (name, str(value))]


def model_words(dit: Path | None, vae: HunyuanVaeOptions, text: HunyuanTextOptions) -> list[str]:
    """Return the options that name the models of a training, as generation takes them."""
    files = {
        "--dit": dit or "DIT_FILE",
        "--vae": vae.file.vae or "VAE_FILE",
        "--text_encoder1": text.text_encoder1 or "ENCODER1",
        "--text_encoder2": text.text_encoder2 or "ENCODER2",
        "--text_encoder1_tokenizer": text.text_encoder1_tokenizer,
        "--text_encoder2_tokenizer": text.text_encoder2_tokenizer,
    }
    return [word for name, path in files.items() if path is not None for word in (name, str(path))]


def add_vae(group: argparse._ArgumentGroup, always_tiled: bool = False) -> None:
    """Declare the options of `HunyuanVaeOptions`. always_tiled: see `add_vae_arguments`."""
    add_vae_arguments(group, always_tiled=always_tiled)
    group.add_argument(
        "--vae_chunk_size",
        type=int,
        default=None,
        help="number of frames that a layer of the VAE computes at a time; fewer take less memory",
    )


def add_text_reading(group: argparse._ArgumentGroup) -> None:
    """Declare the options of `TextReadingOptions`."""
    group.add_argument(
        "--custom_system_prompt",
        type=str,
        default=None,
        help="instruction to the language model on what to describe, in place of the default one",
    )
    group.add_argument(
        "--hidden_state_skip_layer",
        type=int,
        default=SKIP_LAYERS,
        help="number of the language model's last layers to skip; the state before them is used",
    )
    group.add_argument(
        "--apply_final_norm", action="store_true", help="apply the final norm to that state too"
    )
    group.add_argument(
        "--te_multiplier",
        type=str,
        nargs=2,
        default=None,
        metavar=("llm_multiplier", "clip_multiplier"),
        help="factors for the text's tokens in the transformer's refiner, and for their mean",
    )


def add_reproduce(group: argparse._ArgumentGroup) -> None:
    """Declare --reproduce."""
    group.add_argument(
        "--reproduce",
        action="store_true",
        help="use only deterministic algorithms: slower, but every run gives the same result",
    )


def add_text(group: argparse._ArgumentGroup, required: bool) -> None:
    """Declare the options of `HunyuanTextOptions`."""
    what = {1: "Llama 3 text encoder (LLaVA): folder or file", 2: "CLIP-L text encoder: folder or file"}
    for number, text in what.items():
        group.add_argument(f"--text_encoder{number}", type=str, default=None, required=required, help=text)
        group.add_argument(
            f"--text_encoder{number}_tokenizer",
            type=str,
            default=None,
            help="tokenizer: folder or file; default: in or beside the encoder's folder, else from the hub",
        )
    dtype = "dtype that both encoders compute in; default: float16, but float32 if --dit is float32"
    group.add_argument("--text_encoder_dtype", type=str, default=None, help=dtype)
    group.add_argument(
        "--fp8_llm",
        action="store_true",
        help="keep Llama's linear layers in fp8: half the memory of float16, slightly different states",
    )


def _check_channels(channels: int) -> None:
    if channels not in INPUT_CHANNELS:
        raise OptionError(
            f"--dit_in_channels {channels}: 16 for text-to-video, 32 for SkyReels V1 image-to-video"
        )
