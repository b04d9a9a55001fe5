"""HunyuanVideo's and SkyReels V1's own options for caching, training and generation."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, HABIT, NO_PIXELS, Options, option
from modules.speed_options import VAE_TILE, VaeOptions, dit_dtype_option, fp8_text_option, text_form_option

# default of --hidden_state_skip_layer: layers of the language model after the state used in training
SKIP_LAYERS = 2
INPUT_CHANNELS = (16, 32)  # input channels of the two kinds of transformer
# settings of `VaeOptions` where the VAE always works in tiles
ALWAYS_TILED: Mapping[str, Any] = {
    "defaults": {"vae_tiling": True},
    "settings": {
        "vae_tiling": {"help": f"encode and decode in tiles of {VAE_TILE} pixels; always on here"},
        "vae_spatial_tile_sample_min_size": {"help": f"edge of a tile in pixels, default {VAE_TILE}"},
    },
}
_TOKENIZER = "tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub"
REPRODUCE = "use only deterministic algorithms: slower, but every run gives the same result"


class HunyuanVaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(facts=DECODING_SETTING)
    vae_chunk_size: int | None = option(
        "number of frames that a layer of the VAE computes at a time; fewer take less memory",
        minimum=1,
        maximum=100_000,
        facts=NO_PIXELS,
    )


class HunyuanTextOptions(Options):
    """Paths of the two text encoders and their tokenizers."""

    text_encoder1: Path | None = option("Llama 3 text encoder (LLaVA): folder or file", often=True)
    text_encoder1_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder2: Path | None = option("CLIP-L text encoder: folder or file", often=True)
    text_encoder2_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder_dtype: str | None = option(
        "dtype that both encoders compute in; default: float16, but float32 if --dit is float32"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_llm", "Llama's linear layers in fp8: half the memory of float16, slightly different states"
    )
    text_encoder_form: str | None = text_form_option()


class TextReadingOptions(Options):
    """Options for the text encoders that HunyuanVideo and FramePack share, in generation."""

    custom_system_prompt: str | None = option(
        "instruction to the language model on what to describe, in place of the default one"
    )
    hidden_state_skip_layer: int = option(
        "number of the language model's last layers to skip; the state before them is used",
        default=SKIP_LAYERS,
        minimum=0,
        hint="0 takes the last layer's state",
    )
    apply_final_norm: bool = option("apply the final norm to that state too")
    te_multiplier: tuple[str, ...] | None = option(
        "factors for the text's tokens in the transformer's refiner, and for their mean",
        nargs=2,
        metavar=("llm_multiplier", "clip_multiplier"),
    )

    def __post_init__(self) -> None:
        _ = self.text_multipliers

    @property
    def text_multipliers(self) -> tuple[float, float] | None:
        """Factors of --te_multiplier for the text's tokens and their mean; None if it is not given.

        Raises OptionError if they are not numbers.
        """
        if self.te_multiplier is None:
            return None
        try:
            tokens, mean = map(float, self.te_multiplier)
        except ValueError:
            tokens = mean = math.nan
        if not (math.isfinite(tokens) and math.isfinite(mean)):
            raise OptionError(
                f"--te_multiplier {' '.join(self.te_multiplier)}: use two numbers, such as 1.2 1.0"
            )
        return tokens, mean


AS_TRAINED = TextReadingOptions()


class HunyuanLatentCachingOptions(Options, title="HunyuanVideo"):
    """Options of cache_latents.py in addition to the shared ones."""

    vae: HunyuanVaeOptions
    i2v: bool = option("also cache the first frame, encoded alone, to train SkyReels V1 image-to-video")


class HunyuanTextCachingOptions(Options, title="HunyuanVideo"):
    """Options of cache_text_encoder_outputs.py in addition to the shared ones."""

    text: HunyuanTextOptions = option(
        settings={"text_encoder1": {"required": True}, "text_encoder2": {"required": True}}
    )


class HunyuanTrainingOptions(Options, title="HunyuanVideo"):
    """HunyuanVideo's options of hv_train_network.py and hv_train.py."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    dit_in_channels: int = option(  # the file says it too
        "number of input channels; 32 requires the image-to-video checkpoint; default: that of the file",
        default=16,
        facts=FREE,
    )
    vae: HunyuanVaeOptions = option(facts=FREE)
    text: HunyuanTextOptions = option(facts=FREE)
    embedded_guidance: float = option(name="guidance_scale", facts=HABIT)

    def __post_init__(self) -> None:
        _check_channels(self.dit_in_channels)


class HunyuanGenerationOptions(Options, title="HunyuanVideo"):
    """Options of hv_generate_video.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint", often=True)
    dit_in_channels: int | None = option(  # the file says it too
        "number of input channels that the checkpoint must have; default: any", facts=NO_PIXELS
    )
    vae: HunyuanVaeOptions = option(**ALWAYS_TILED)
    text: HunyuanTextOptions
    reading: TextReadingOptions
    exclude_single_blocks: bool = option("use only the parts of LoRAs that are for the double blocks")
    reproduce: bool = option(REPRODUCE)

    def __post_init__(self) -> None:
        if self.dit_in_channels is not None:
            _check_channels(self.dit_in_channels)


def _check_channels(channels: int) -> None:
    if channels not in INPUT_CHANNELS:
        raise OptionError(
            f"--dit_in_channels {channels}: 16 for text-to-video, 32 for SkyReels V1 image-to-video"
        )


def caching_options(options: HunyuanTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    text = options.text
    encoders = {"--text_encoder1": text.text_encoder1 or Placeholder("TEXT_ENCODER1_FILE")}
    encoders["--text_encoder2"] = text.text_encoder2 or Placeholder("TEXT_ENCODER2_FILE")
    return options.vae.file.command_options(), encoders


def generation_options(options: HunyuanTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of hv_generate_video.py that generate `sample` with a training run's models."""
    default_image = None
    example = sample.get("example")
    starts_from_image = (sample.get("cached_with") or {}).get("i2v", options.dit_in_channels == 32)
    if starts_from_image:
        default_image = (None if example is None else example.image) or Placeholder("IMAGE_FILE")
    return {
        **model_options(options.dit, options.vae, options.text),
        "--image_path": sample.get("image_path") or default_image,
        "--video_length": sample.get("frames"),
        "--embedded_cfg_scale": sample.get("embedded_guidance"),
        "--prompt_2": sample.get("second_prompt"),
    }


def model_options(dit: Path | None, vae: HunyuanVaeOptions, text: HunyuanTextOptions) -> dict[str, Any]:
    """Return the command-line options for the model's files; unset ones get placeholders."""
    return {
        "--dit": dit or Placeholder("DIT_FILE"),
        **vae.file.command_options(),
        "--text_encoder1": text.text_encoder1 or Placeholder("TEXT_ENCODER1_FILE"),
        "--text_encoder2": text.text_encoder2 or Placeholder("TEXT_ENCODER2_FILE"),
        "--text_encoder1_tokenizer": text.text_encoder1_tokenizer,
        "--text_encoder2_tokenizer": text.text_encoder2_tokenizer,
    }
