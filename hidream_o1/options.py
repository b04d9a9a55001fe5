"""HiDream-O1-Image's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.option_values import Placeholder
from modules.options import FREE, Options, not_needed, option
from modules.speed_options import dit_dtype_option

NAME = "HiDream-O1-Image"
SIDE = 2048  # default width and height of images
STEPS, GUIDANCE = 50, 5.0
DEV_STEPS, DEV_GUIDANCE = 28, 1.0
SHIFT = 3.0  # shift of the noise levels in generations; training has none
MODEL_TYPES = FULL, DEV = ("full", "dev")
RELEASED_SOLVER = "released"  # value of --sample_solver: the solver of the variant
TOKENIZER_OPTION = "--tokenizer"
_DIT = "network, which is text encoder and transformer: file or folder"
_TOKENIZER = "its tokenizer: folder or file; default: in the network's folder, else from the hub"
_ONE_CACHE = "the full model and Dev have the same caches."
_NO_VAE = "the model works with pixels, so there is no VAE."


class HiDreamO1LatentCachingOptions(Options, title=NAME):
    """Options of hidream_o1_cache_latents.py in addition to the shared ones."""

    vae = not_needed(_NO_VAE, type=Path)
    model_type = not_needed(_ONE_CACHE, type=str)


class HiDreamO1TextCachingOptions(Options, title=NAME):
    """Options of hidream_o1_cache_text_encoder_outputs.py in addition to the shared ones."""

    dit: Path | None = option(_DIT, required=True, often=True)
    tokenizer: Path | None = option(_TOKENIZER)
    model_type = not_needed(_ONE_CACHE, type=str)


class HiDreamO1ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option(_DIT, facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    tokenizer: Path | None = option(_TOKENIZER, facts=FREE)
    model_type: str | None = option(
        "variant that --dit is, full or dev, whose noise has another scale; default: what the names of the "
        "file and its folders say",
        choices=MODEL_TYPES,
        facts=FREE,
    )
    vae = not_needed(_NO_VAE, type=Path)


class HiDreamO1TrainingOptions(HiDreamO1ModelOptions, title=NAME):
    """Options of hidream_o1_train_network.py and hidream_o1_train.py in addition to the shared ones."""


class HiDreamO1GenerationOptions(HiDreamO1ModelOptions, title=NAME):
    """Options of hidream_o1_generate_image.py in addition to the shared ones."""


def caching_options(options: HiDreamO1TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    texts = {"--dit": options.dit or Placeholder("DIT_FILE"), TOKENIZER_OPTION: options.tokenizer}
    return {}, texts


def generation_options(options: HiDreamO1TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`. None of them is an option of
            this model alone.
    """
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        TOKENIZER_OPTION: options.tokenizer,
        "--dit_dtype": options.dit_dtype,
        "--model_type": options.model_type,
    }
