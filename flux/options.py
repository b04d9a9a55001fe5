"""FLUX.1's and Chroma's own options for caching, training and generation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.command import as_typed
from modules.errors import OptionError
from modules.options import FREE, HABIT, NO_PIXELS, OF_DECODING, Options, option, unsupported
from modules.speed_options import AE, AE_HELP, VaeOptions, dit_dtype_option

FLUX, CHROMA = "flux", "chroma"  # values of --model_type
USUAL_GUIDANCE = 3.5  # default of the embedded guidance, in training and in generation
MOST_TOKENS = 512  # that T5 was trained to read


NAME = "FLUX.1 and Chroma"
_TOKENIZER = "tokenizer: folder or file; default: in or beside the encoder's folder, else from the hub"


class FluxTextOptions(Options):
    """Paths of the two text encoders and their tokenizers, and how they read."""

    clip_l: Path | None = option("CLIP-L text encoder: file or folder; Chroma has none", often=True)
    clip_l_tokenizer: Path | None = option(_TOKENIZER)
    t5xxl: Path | None = option("T5-XXL text encoder: file or folder", often=True)
    t5xxl_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder_dtype: str | None = option(
        "dtype of both encoders; default: bfloat16, but float32 if the transformer is float32, or for a "
        "training with --mixed_precision no"
    )
    fp8_t5: bool = option(
        "keep T5's linear layers in fp8: half the memory of bf16, slightly different states"
    )
    t5xxl_max_token_length: int | None = option(
        "tokens that T5 reads; default: 512, for schnell 256",
        least=2,
        most=MOST_TOKENS,
        hint="tokens of T5 with the end token; 512 for dev and Chroma, 256 for schnell",
    )
    apply_t5_attn_mask: bool = option(
        "leave the padding behind a text out of T5's and of the transformer's attention; always so for Chroma"
    )


def _model_type() -> Any:
    return option(  # the transformer's file says it too
        "kind of model; not needed where the transformer's file says it",
        default=FLUX,
        choices=(FLUX, CHROMA),
        facts={**FREE, **NO_PIXELS},
    )


class FluxLatentCachingOptions(Options, title=NAME):
    """Options of flux_cache_latents.py besides the shared ones."""

    vae: VaeOptions = option(settings=AE)


class FluxTextCachingOptions(Options, title=NAME):
    """Options of flux_cache_text_encoder_outputs.py besides the shared ones."""

    model_type: str = _model_type()
    text: FluxTextOptions

    def __post_init__(self) -> None:
        if self.text.t5xxl is None:
            raise OptionError("--t5xxl is needed: T5 encodes the captions")
        if self.model_type == FLUX and self.text.clip_l is None:
            raise OptionError(
                "--clip_l is needed: CLIP-L encodes the captions too. Captions for Chroma, which has none, "
                "are encoded with --model_type chroma"
            )


class FluxTrainingOptions(Options, title=NAME):
    """Options of flux_train_network.py besides the shared ones."""

    # resume compares its name
    dit: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    dit_dtype: str | None = dit_dtype_option()
    model_type: str = _model_type()
    ae: Path | None = option(AE_HELP, facts=FREE, often=True)  # read as --vae
    vae: VaeOptions = option(facts=FREE, without=("vae",))
    text: FluxTextOptions = option(facts=HABIT)
    embedded_guidance: float = option(name="guidance_scale", facts=HABIT)
    controlnet_model_name_or_path = unsupported(
        "a LoRA is trained without ControlNet", "ControlNet beside the transformer", type=str
    )
    split_mode = unsupported(
        "training both at once with --blocks_to_swap takes as little memory",
        "train double and single blocks apart",
    )


class FluxGenerationOptions(Options, title=NAME):
    """Options of flux_generate_image.py besides the shared ones."""

    dit: Path | None = option(
        "transformer checkpoint",
        flags=("--dit", "--pretrained_model_name_or_path", "--ckpt_path"),
        often=True,
    )
    dit_dtype: str | None = dit_dtype_option()
    model_type: str = _model_type()
    vae: VaeOptions = option(facts=OF_DECODING, settings=AE)
    text: FluxTextOptions


def caching_commands(dataset_config: Path | None, options: FluxTrainingOptions) -> tuple[str, str]:
    """Return the commands that make missing caches of latents and of texts."""
    dataset = ["--dataset_config", str(dataset_config)]
    vae = str(options.vae.vae or "AE_FILE")
    latents = ["python", "flux_cache_latents.py", *dataset, "--ae", vae]
    texts = ["python", "flux_cache_text_encoder_outputs.py", *dataset, *_text_words(options)]
    return as_typed(latents), as_typed(texts)


def generation_words(options: FluxTrainingOptions, sample: Mapping[str, Any]) -> list[str]:
    """Return the script and the options that generate with the models of a training.

    sample: the settings of a sample, by the names of `Request`; may be empty.
    """
    words = ["flux_generate_image.py", "--dit", str(options.dit or "DIT_FILE")]
    words += ["--ae", str(options.vae.vae or "AE_FILE"), *_text_words(options)]
    words += ["--dit_dtype", options.dit_dtype] if options.dit_dtype else []
    guidance = sample.get("embedded_guidance")
    return words + (["--embedded_cfg_scale", str(guidance)] if guidance else [])


def _text_words(options: FluxTrainingOptions) -> list[str]:
    text = options.text
    files = {"--t5xxl": text.t5xxl or "T5_FILE", "--t5xxl_tokenizer": text.t5xxl_tokenizer}
    if options.model_type != CHROMA:
        files |= {"--clip_l": text.clip_l or "CLIP_FILE", "--clip_l_tokenizer": text.clip_l_tokenizer}
    words = [word for name, path in files.items() if path is not None for word in (name, str(path))]
    words += ["--model_type", CHROMA] if options.model_type == CHROMA else []
    if text.t5xxl_max_token_length is not None:
        words += ["--t5xxl_max_token_length", str(text.t5xxl_max_token_length)]
    return words + (["--apply_t5_attn_mask"] if text.apply_t5_attn_mask else [])
